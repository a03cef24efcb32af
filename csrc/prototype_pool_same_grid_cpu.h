// prototype_pool's passes where labels and features share their grid, a tile of pixels at a time. With labels each pixel
// meets its own class alone; soft masks take the products with all classes.
#pragma once

#include "common/own_class_cpu.h"
#include "common/tile_pass_cpu.h"
#include "prototype_pool_cpu.h"

namespace pssl::PSSL_SIMD_NAMESPACE {
namespace pool {

// With labels, the steps on a pixel are too few to be worth a copy of its features.
template <class T>
Tiling<T> tiling_of(const PoolArguments& p, const FeatureView& f) {
  return p.soft() ? Tiling<T>::packed(f) : Tiling<T>::in_place(f);
}

// 1 / |F| of n pixels, 1 where features are taken as they are.
template <class T>
PSSL_NOINLINE void inverse_norms(const PoolArguments& p, const T* squares, int64_t n, T* inverse) {
  const T eps = T(p.eps);
  if (!p.normalize) std::fill_n(inverse, n, T(1));
  for (int64_t i = 0; i < n && p.normalize; ++i) inverse[i] = inverse_norm(squares[i], eps);
}

template <class T>
PSSL_NOINLINE void multiply(const T* a, const T* b, int64_t n, T* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = a[i] * b[i];
}

template <class T>
void pool_labels(const PoolArguments& p, const FeatureView& f, LabelCheck& check, Sums<T>& sums) {
  const Tiling<T> tiling = tiling_of<T>(p, f);
  const int64_t C = p.C, tile = tiling.tile, padded = round_up(tile, kLanes<T>);
  const Buffer<T> total = sum_over_tiles<T>(f, tiling, C * f.D, [&] {
    return [&, masks = Masks<T>(p, check), own = OwnClasses<T>(tile, C), squares = Buffer<T>(padded),
            scale = Buffer<T>(padded, true)](Tile<T>& t, T* total) mutable {
      masks.read(t.b, t.y, t.x, t.n);
      own.find(masks.labels.get(), t.n);
      for (int64_t i = 0; i < t.n; ++i)
        if (masks.labels[i] >= 0) sums.masses[t.index * C + masks.labels[i]] += double(masks.weights[i]);
      const Channels<T> features = t.place(p.normalize ? squares.get() : nullptr);
      inverse_norms(p, squares.get(), t.n, scale.get());
      multiply(scale.get(), masks.weights.get(), t.n, scale.get());
      own.add_sums(features.f, features.ld, f.D, scale.get(), total);
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
  const Tiling<T> tiling = tiling_of<T>(p, f);
  const int64_t tile = tiling.tile, padded = round_up(tile, kLanes<T>), ld = tile_stride<T>(tile);
  const bool products = p.normalize || to.written.weights, streaming = to.features && can_stream<T>(to.out);
  sum_over_tiles<T>(f, tiling, 0, [&] {
    return [&, masks = Masks<T>(p, to.check), own = OwnClasses<T>(tile, p.C), dots = Buffer<T>(padded, true),
            squares = Buffer<T>(padded, true), inverse = Buffer<T>(padded), along = Buffer<T>(padded, true),
            back = Buffer<T>(padded, true),
            result = Buffer<T>(Tile<T>::kChannels * ld)](Tile<T>& t, T*) mutable {
      const T* vectors = &q[t.b * p.C * f.D];
      masks.read(t.b, t.y, t.x, t.n);
      own.find(masks.labels.get(), t.n);
      std::fill_n(dots.get(), padded, T(0));
      std::fill_n(squares.get(), padded, T(0));
      const Channels<T> features = t.place_channels([&](int64_t d, int64_t n, Channels<T> some) {
        if (products) own.add_dots(some.f, some.ld, n, vectors + d, f.D, dots.get(), squares.get());
      });
      inverse_norms(p, squares.get(), t.n, inverse.get());
      multiply(dots.get(), inverse.get(), t.n, dots.get());
      multiply(masks.weights.get(), inverse.get(), t.n, along.get());
      for (int64_t i = 0; i < t.n; ++i)
        back[i] = T(2) * squared_norm_gradient(inverse[i], masks.weights[i] * dots[i]);
      for (int64_t i = 0; i < t.n && to.written.weights; ++i)
        to.written.write(masks, i, t.b, t.y, t.x + i, [&](int64_t) { return dots[i]; });
      if (!to.features) return;
      auto write = [&](int64_t d, int64_t n, const auto& to_rows) {
        to_rows(to.out.channels(d, n), t.b, t.y, t.x, t.n, result.get(), ld, [&](T* o, int64_t ldo) {
          own.gradient(features.f + d * features.ld, features.ld, n, vectors + d, f.D, along.get(),
                       p.normalize ? back.get() : nullptr, o, ldo);
        });
      };
      if (streaming && t.n % kLanes<T> == 0) {
        for_channel_blocks(f.D, [&](auto block, int64_t d) {
          write(d, decltype(block)::value, [](const auto&... row) { stream_row(row...); });
        });
        streamed();
      } else {
        t.each_channels(
            [&](int64_t d, int64_t n) { write(d, n, [](const auto&... row) { write_row(row...); }); });
      }
    };
  });
}

template <class T>
void backward_masks(const Backward<T>& to, const Buffer<T>& q) {
  const PoolArguments& p = to.p;
  const FeatureView& f = to.f;
  const int64_t C = p.C, cp = round_up(C, kLanes<T>);
  const int64_t tile = tile_pixels(f.D, sizeof(T)), ldg = tile_stride<T>(tile);
  sum_over_tiles<T>(f, tiling_of<T>(p, f), 0, [&] {
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
