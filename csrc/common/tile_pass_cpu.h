// Passes over all tiles of a feature map, with class sums whose order of additions depends on the sizes alone.
#pragma once

#include "common/channel_blocks_cpu.h"
#include "common/label_grid_cpu.h"
#include "common/row_cpu.h"
#include "common/tasks_cpu.h"

namespace pssl::PSSL_SIMD_NAMESPACE {

// The tiles of an image: each row of the map cut into tiles of `tile` pixels up to `whole`, and one tile with what is left.
template <class T>
struct Tiling {
  int64_t w, tile, whole, per_row, count;

  // Tiles that stay in the second-level cache when they are packed.
  static Tiling packed(const FeatureView& f) { return Tiling(f, tile_pixels(f.D, sizeof(T)), f.w); }

  // Tiles for steps that read the features twice from where they lie, from memory and then from the last-level cache: four
  // kilobytes of each channel at a time, which come in faster than the shorter runs of tiles that are packed. Where the
  // features do not lie side by side in this type, as `packed`.
  static Tiling in_place(const FeatureView& f) {
    if (f.type != scalar_type_of<T> || f.sx != 1) return packed(f);
    const int64_t fits = kInPlaceBytes / std::max<int64_t>(1, f.D * int64_t(sizeof(T)));
    const int64_t shared = f.B * f.h * f.w / kInPlaceTiles;  // so that threads can share them
    const int64_t tile = std::clamp<int64_t>(std::min(fits, shared) / 64 * 64, kTilePixels, 4 * kTilePixels);
    return Tiling(f, tile, f.w / kLanes<T> * kLanes<T>);
  }
  static constexpr int64_t kInPlaceBytes = int64_t(1) << 20, kInPlaceTiles = 32;

  int64_t begin(int64_t i) const { return std::min(i % per_row * tile, whole); }
  int64_t pixels(int64_t i) const { return begin(i) < whole ? std::min(tile, whole - begin(i)) : w - whole; }

 private:
  Tiling(const FeatureView& f, int64_t tile, int64_t whole)
      : w(f.w),
        tile(tile),
        whole(whole),
        per_row((whole + tile - 1) / tile + (whole < f.w)),
        count(per_row * f.h) {}
};

// Channels of some pixels: [D][ld].
template <class T>
struct Channels {
  const T* f;
  int64_t ld;
};

template <class T>
struct Tile {
  const FeatureView& view;
  int64_t b, y, x, n;  // pixels [x, x + n) of row y of image b
  int64_t index;       // among the tiles of the batch, see tile_count
  T* f;                // packed features [D][ld], zero behind n to the end of the last vector
  int64_t ld;

  void pack(T* squares = nullptr) {
    pack_channels(squares, [](int64_t, int64_t) {});
  }
  // Packs a few channels at a time and calls f(d, count) for each of these runs, while it is in the first-level cache;
  // squares[p] = |f(p)|^2 unless it is null; with `labels`, see clear_uncounted.
  template <class F>
  void pack_channels(T* squares, const F& f, const BitsOf<T>* labels = nullptr) {
    const bool direct = is_direct();
    if (squares) std::fill_n(squares, padded(), T(0));
    each_channels([&](int64_t d, int64_t count) {
      T* own = this->f + d * ld;
      if (direct) {
        take(d, count, nullptr, 0, 0, nullptr, 0, squares, true, labels);
      } else {
        pack_row(view.channels(d, count), b, y, x, n, ld, own, ld);
        const int64_t next = std::min(kChannels, view.D - d - count);
        if (next > 0) prefetch_row(view.channels(d + count, next), b, y, x, n);
        if (squares) add_packed_products<T>(own, ld, padded(), count, nullptr, 0, 0, nullptr, 0, squares);
        if (labels) clear_uncounted(labels, d, count);
      }
      f(d, count);
    });
  }
  // Where the features can be read: where they lie, if that is by whole vectors, else packed. Calls f(d, count, channels)
  // for all channels at once in the first case, as pack_channels in the other.
  template <class F>
  Channels<T> place_channels(const F& f) {
    if (!is_direct()) {
      pack_channels(nullptr,
                    [&](int64_t d, int64_t count) { f(d, count, Channels<T>{this->f + d * ld, ld}); });
      return {this->f, ld};
    }
    const Channels<T> own{row(), view.sd};
    f(0, view.D, own);
    return own;
  }
  // The same with squares as pack_channels.
  Channels<T> place(T* squares) {
    if (!is_direct()) {
      pack(squares);
      return {f, ld};
    }
    if (squares) {
      std::fill_n(squares, n, T(0));
      take(0, view.D, nullptr, 0, 0, nullptr, 0, squares, false, nullptr);
    }
    return {row(), view.sd};
  }
  template <class F>
  void each_channels(const F& f) const {
    for (int64_t d = 0; d < view.D; d += kChannels) f(d, std::min(kChannels, view.D - d));
  }
  static constexpr int64_t kChannels = 16;

  // z[c][p] = <f(p), q_c> for C classes, q as [D][cp], up to the end of the last vector, and squares as pack_channels. Reads
  // the features once; packs them on the way if they are to be `packed` for later steps, see clear_uncounted for `labels`.
  void products(const T* q, int64_t cp, int64_t C, T* z, int64_t ldz, T* squares, bool packed,
                const BitsOf<T>* labels = nullptr) {
    if (squares) std::fill_n(squares, padded(), T(0));
    for_class_runs<T>(C, ldz, [&](int64_t c, int64_t classes) {
      for (int64_t k = c; k < c + classes; ++k) std::fill_n(z + k * ldz, padded(), T(0));
      auto from_packed = [&](int64_t d, int64_t count) {
        add_packed_products<T>(f + d * ld, ld, padded(), count, q + d * cp + c, cp, classes, z + c * ldz, ldz,
                               c == 0 ? squares : nullptr);
        if (c == 0 && packed && labels) clear_uncounted(labels, d, count);
      };
      if (c > 0) {
        from_packed(0, view.D);
      } else if (is_direct()) {
        take(0, view.D, q, cp, classes, z, ldz, squares, packed || classes < C, labels);
      } else {
        pack_channels(nullptr, from_packed);
      }
    });
  }
  // Zeros in channels [d, d + count) of the packed pixels that do not count, see counted_lanes.
  void clear_uncounted(const BitsOf<T>* labels, int64_t d, int64_t count) {
    for (T* row = f + d * ld; row < f + (d + count) * ld; row += ld)
      for (int64_t p = 0; p < n; p += kLanes<T>)
        store<T>(row + p, keep<T>(load<T>(row + p), counted_lanes<T>(labels, p)));
  }

 private:
  int64_t padded() const { return round_up(n, kLanes<T>); }
  // Whether features can be taken from where they lie, by whole vectors.
  bool is_direct() const { return view.type == scalar_type_of<T> && view.sx == 1 && padded() == n; }
  const T* row() const { return static_cast<const T*>(view.data) + b * view.sb + y * view.sy + x; }
  // add_products for channels [d, d + count) from where they lie.
  void take(int64_t d, int64_t count, const T* q, int64_t cp, int64_t C, T* z, int64_t ldz, T* squares,
            bool packed, const BitsOf<T>* labels) {
    const T* const row = this->row();
    for_channel_blocks(count, [&](auto block, int64_t i) {
      constexpr int N = decltype(block)::value;
      const int64_t own = d + i, next = own + N;
      const OnTheWay<T> way{packed ? f + own * ld : nullptr, ld, labels,
                            next + N <= view.D ? row + next * view.sd : nullptr};
      add_products<N, T>(row + own * view.sd, view.sd, n, q + own * cp, cp, C, z, ldz, squares, way);
    });
  }
};

// Calls the functions that `make_body()` returns, one a thread, as body(tile, sums) on every tile, which is left to them
// to pack. Returns [B][size]: what they added to `sums`, which starts as zeros for each of an image's chunks of tiles.
template <class T, class MakeBody>
Buffer<T> sum_over_tiles(const FeatureView& f, const Tiling<T>& tiling, int64_t size,
                         const MakeBody& make_body) {
  const int64_t ld = tile_stride<T>(tile_pixels(f.D, sizeof(T))), tiles = tiling.count;
  // About 64 chunks in all, so that they share out well; fewer where their sums would take more than 64 MiB.
  const int64_t fits = (int64_t(64) << 20) / std::max<int64_t>(1, f.B * size * int64_t(sizeof(T)));
  const int64_t wanted = (63 + f.B) / std::max<int64_t>(1, f.B);
  const int64_t chunks = std::max<int64_t>(1, std::min({tiles, wanted, fits}));
  Buffer<T> partial(f.B * chunks * size);
  share_tasks(f.B * chunks, [&] {
    return [&, packed = Buffer<T>(f.D * ld), body = make_body()](int64_t task) mutable {
      const int64_t b = task / chunks, chunk = task % chunks;
      T* const sums = &partial[task * size];
      std::fill_n(sums, size, T(0));
      for (int64_t i = tiles * chunk / chunks; i < tiles * (chunk + 1) / chunks; ++i) {
        Tile<T> t{f, b, i / tiling.per_row, tiling.begin(i), tiling.pixels(i), b * tiles + i, packed.get(),
                  ld};
        body(t, sums);
      }
    };
  });
  Buffer<T> total(f.B * size, true);
  torch::stable::parallel_for(0, f.B * size, 1 << 12, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin, next; i < end; i = next) {
      const int64_t b = i / size;
      next = std::min(end, (b + 1) * size);
      for (int64_t chunk = 0; chunk < chunks; ++chunk)
        add_row(&partial[(b * chunks + chunk) * size + i - b * size], next - i, &total[i]);
    }
  });
  return total;
}

// The same with body(tile, g), which packs the tile and fills in g, [C][ld of the tile]. Returns [B][D][cp]: for each image
// sum over its pixels of f[d][p] g[c][p], for C classes.
template <class T, class MakeBody>
Buffer<T> tile_class_sums(const FeatureView& f, int64_t C, const MakeBody& make_body) {
  const int64_t tile = tile_pixels(f.D, sizeof(T)), ld = tile_stride<T>(tile), cp = round_up(C, kLanes<T>);
  return sum_over_tiles<T>(f, Tiling<T>::packed(f), f.D * cp, [&] {
    return [&, cp, body = make_body(), g = Buffer<T>(C * ld)](Tile<T>& t, T* total) mutable {
      const int64_t padded = round_up(t.n, kLanes<T>);
      body(t, g.get());
      for (int64_t c = 0; c < C; ++c) std::fill(&g[c * ld + t.n], &g[c * ld + padded], T(0));
      for_channel_blocks(f.D, [&](auto block, int64_t d) {
        add_class_sums<decltype(block)::value, T>(t.f + d * ld, ld, padded, g.get(), ld, C, total + d * cp,
                                                  cp);
      });
    };
  });
}

// [B][D][cp]: the sums over the cells of f times the products' gradients.
template <class T>
Buffer<T> adjoint_class_sums(const FeatureView& f, const CellAdjoint<T>& adjoint, int64_t C) {
  return tile_class_sums<T>(f, C, [&] {
    return [&, touched = Buffer<BitsOf<T>>(tile_stride<T>(tile_pixels(f.D, sizeof(T))))](Tile<T>& t, T* g) {
      std::fill_n(touched.get(), t.n, BitsOf<T>(-1));
      for (int64_t c = 0; c < C; ++c)
        for (int64_t p = 0; p < t.n; ++p) {
          const T v = adjoint.dot(t.b, t.y, t.x + p, c);
          g[c * t.ld + p] = v;
          if (v != T(0)) touched[p] = 0;
        }
      t.pack_channels(nullptr, [&](int64_t d, int64_t n) { t.clear_uncounted(touched.get(), d, n); });
    };
  });
}

// The gradient of the features from the gradients of the products: every cell's class vectors, and, with `gram`, the
// eight neighbours and the cell itself.
template <class T, class Vectors>
void adjoint_feature_gradient(const FeatureView& f, const FeatureView& out, const CellAdjoint<T>& adjoint,
                              int64_t C, const Vectors& vectors, bool gram) {
  const int64_t tile = tile_pixels(f.D, sizeof(T)), lanes = kLanes<T>;
  const int64_t ldg = round_up(tile, lanes), ld = tile_stride<T>(ldg + 2 + lanes);
  const int64_t cp = round_up(C, lanes);
  torch::stable::parallel_for(0, f.B * f.h, 1, [&](int64_t begin, int64_t end) {
    RowWindow<T, 3> rows(f, gram ? ld : 0);
    Buffer<T> result(f.D * ld), gt(C * ldg), coefficients(9 * ldg);
    for (int64_t x = 0; x < f.w; x += tile) {
      rows.restart();
      for (int64_t task = begin; task < end; ++task) {
        const int64_t b = task / f.h, y = task % f.h;
        const int64_t n = std::min(tile, f.w - x), padded = round_up(n, lanes);
        for (int64_t c = 0; c < C; ++c)
          for (int64_t p = 0; p < padded; ++p) gt[c * ldg + p] = p < n ? adjoint.dot(b, y, x + p, c) : T(0);
        Multiple<T> neighbours[9];
        if (gram) {
          std::fill_n(coefficients.get(), 9 * ldg, T(0));
          for (int64_t p = 0; p < n; ++p) {
            const int64_t i = x + p;
            const T values[9] = {adjoint.diagonal(b, y - 1, i - 1),
                                 adjoint.lower_product(b, y - 1, i),
                                 adjoint.diagonal(b, y - 1, i),
                                 adjoint.right(b, y, i - 1),
                                 adjoint.self(b, y, i),
                                 adjoint.right(b, y, i),
                                 adjoint.diagonal(b, y, i - 1),
                                 adjoint.lower_product(b, y, i),
                                 adjoint.diagonal(b, y, i)};
            for (int k = 0; k < 9; ++k) coefficients[k * ldg + p] = values[k];
          }
          for (int64_t dy = 0; dy < 3; ++dy) {
            const T* row = rows.at(b, y + dy - 1, x - 1, n + 2);
            for (int64_t dx = 0; dx < 3; ++dx)
              neighbours[dy * 3 + dx] = {row + dx, &coefficients[(dy * 3 + dx) * ldg]};
          }
        }
        const auto first = sum_of_multiples(neighbours, gram ? 9 : 0, ld);
        write_row(out, b, y, x, n, result.get(), ld, [&](T* o, int64_t ldo) {
          tile_combine(vectors(b), cp, C, f.D, gt.get(), ldg, first, o, ldo, n);
        });
      }
    }
  });
}

}  // namespace pssl::PSSL_SIMD_NAMESPACE
