// prototype_pool's passes where labels and features share their grid, a tile of pixels at a time. With labels each pixel
// meets its own class alone; soft masks take the products with all classes.
#pragma once

#include "common/own_class_cpu.h"
#include "common/tile_pass_cpu.h"
#include "prototype_pool_cpu.h"

namespace pssl::PSSL_SIMD_NAMESPACE {
namespace pool {

template <class T>
void pool_labels(const PoolArguments& p, const FeatureView& f, LabelCheck& check, Sums<T>& sums) {
  const int64_t C = p.C, tile = tile_pixels(f.D, sizeof(T)), padded = round_up(tile, kLanes<T>);
  const Buffer<T> total = sum_over_tiles<T>(f, C * f.D, [&] {
    return [&, masks = Masks<T>(p, check), own = OwnClasses<T>(tile, C), squares = Buffer<T>(padded),
            scale = Buffer<T>(padded, true)](Tile<T>& t, T* total) mutable {
      masks.read(t.b, t.y, t.x, t.n);
      t.pack(p.normalize ? squares.get() : nullptr);
      for (int64_t i = 0; i < t.n; ++i) {
        scale[i] = masks.weights[i] * (p.normalize ? inverse_norm(squares[i], T(p.eps)) : T(1));
        if (masks.labels[i] >= 0) sums.masses[t.index * C + masks.labels[i]] += double(masks.weights[i]);
      }
      own.find(masks.labels.get(), t.n);
      own.add_sums(t.f, t.ld, f.D, scale.get(), total);
    };
  });
  std::copy_n(total.get(), f.B * C * f.D, sums.out);
}

template <class T>
void pool_masks(const PoolArguments& p, const FeatureView& f, LabelCheck& check, Sums<T>& sums) {
  const int64_t C = p.C, cp = round_up(C, kLanes<T>),
                padded = round_up(tile_pixels(f.D, sizeof(T)), kLanes<T>);
  const Buffer<T> total = tile_class_sums<T>(f, C, [&] {
    return [&, masks = Masks<T>(p, check), squares = Buffer<T>(padded)](Tile<T>& t, T* g) mutable {
      masks.read(t.b, t.y, t.x, t.n);
      t.pack(p.normalize ? squares.get() : nullptr);
      for (int64_t i = 0; i < t.n; ++i) {
        const T scale = masks.weights[i] * (p.normalize ? inverse_norm(squares[i], T(p.eps)) : T(1));
        masks.each(i, [&](int64_t c, T m) {
          g[c * t.ld + i] = m * scale;
          sums.masses[t.index * C + c] += double(m) * double(masks.weights[i]);
        });
      }
    };
  });
  write_sums(total, f.B, C, f.D, cp, sums.out);
}

template <class T>
void backward_labels(const Backward<T>& to, const Buffer<T>& q) {
  const PoolArguments& p = to.p;
  const FeatureView& f = to.f;
  const int64_t tile = tile_pixels(f.D, sizeof(T)), padded = round_up(tile, kLanes<T>);
  sum_over_tiles<T>(f, 0, [&] {
    return [&, masks = Masks<T>(p, to.check), own = OwnClasses<T>(tile, p.C), dots = Buffer<T>(padded),
            squares = Buffer<T>(padded), along = Buffer<T>(padded), back = Buffer<T>(padded),
            result = Buffer<T>(Tile<T>::kChannels * tile_stride<T>(tile))](Tile<T>& t, T*) mutable {
      const T* vectors = &q[t.b * p.C * f.D];
      masks.read(t.b, t.y, t.x, t.n);
      own.find(masks.labels.get(), t.n);
      std::fill_n(dots.get(), padded, T(0));
      t.pack_channels(p.normalize ? squares.get() : nullptr, [&](int64_t d, int64_t n) {
        own.add_dots(t.f + d * t.ld, t.ld, n, vectors + d, f.D, dots.get());
      });
      std::fill_n(along.get(), padded, T(0));
      std::fill_n(back.get(), padded, T(0));
      for (int64_t i = 0; i < t.n; ++i) {
        const T inverse = p.normalize ? inverse_norm(squares[i], T(p.eps)) : T(1), dot = dots[i] * inverse;
        if (masks.labels[i] >= 0) {
          along[i] = masks.weights[i] * inverse;
          if (p.normalize) back[i] = T(2) * squared_norm_gradient(inverse, masks.weights[i] * dot);
        }
        to.written.write(masks, i, t.b, t.y, t.x + i, [&](int64_t) { return dot; });
      }
      if (!to.features) return;
      t.each_channels([&](int64_t d, int64_t n) {
        write_row(to.out.channels(d, n), t.b, t.y, t.x, t.n, result.get(), t.ld, [&](T* o, int64_t ldo) {
          own.gradient(t.f + d * t.ld, t.ld, n, vectors + d, f.D, along.get(), back.get(), o, ldo);
        });
      });
    };
  });
}

template <class T>
void backward_masks(const Backward<T>& to, const Buffer<T>& q) {
  const PoolArguments& p = to.p;
  const FeatureView& f = to.f;
  const int64_t C = p.C, cp = round_up(C, kLanes<T>);
  const int64_t tile = tile_pixels(f.D, sizeof(T)), ldg = tile_stride<T>(tile);
  sum_over_tiles<T>(f, 0, [&] {
    return [&, masks = Masks<T>(p, to.check), squares = Buffer<T>(ldg), z = Buffer<T>(C * ldg),
            gt = Buffer<T>(C * ldg), norm = Buffer<T>(ldg),
            result = Buffer<T>(to.features ? f.D * tile_stride<T>(tile) : 0)](Tile<T>& t, T*) mutable {
      const T* vectors = &q[t.b * f.D * cp];
      masks.read(t.b, t.y, t.x, t.n);
      t.products(vectors, cp, C, z.get(), ldg, p.normalize ? squares.get() : nullptr, to.features);
      std::fill_n(gt.get(), C * ldg, T(0));
      std::fill_n(norm.get(), ldg, T(0));
      for (int64_t i = 0; i < t.n; ++i) {
        const T inverse = p.normalize ? inverse_norm(squares[i], T(p.eps)) : T(1);
        T s = T(0);
        masks.each(i, [&](int64_t c, T m) {
          gt[c * ldg + i] = m * masks.weights[i] * inverse;
          s += m * masks.weights[i] * z[c * ldg + i] * inverse;
        });
        if (p.normalize) norm[i] = T(2) * squared_norm_gradient(inverse, s);
        to.written.write(masks, i, t.b, t.y, t.x + i, [&](int64_t c) { return z[c * ldg + i] * inverse; });
      }
      if (!to.features) return;
      const Multiple<T> own{t.f, norm.get()};
      const auto first = sum_of_multiples(&own, p.normalize ? 1 : 0, t.ld);
      write_row(to.out, t.b, t.y, t.x, t.n, result.get(), t.ld, [&](T* o, int64_t ldo) {
        tile_combine(vectors, cp, C, f.D, gt.get(), ldg, first, o, ldo, t.n);
      });
    };
  });
}

}  // namespace pool
}  // namespace pssl::PSSL_SIMD_NAMESPACE
