// Tiles: a run of pixels of one feature row packed as [D][pixels], since a plane size that is a power of two makes the D
// strided reads of one pixel collide in the cache; and two of the products that both prototype operators are made of,
// with the sums in registers (channel_blocks_cpu.h has the other two):
//
//   dots:     z[p][c] = sum_d f[d][p] q[d][c]           pixels against class vectors, a pixel's classes side by side
//   combine:  o[d][p] = sum_c q[d][c] g[c][p] + ...     the gradient of the features
//
// Class vectors are padded to `cp` columns, a multiple of the vector length, with zeros.
#pragma once

#include "common/tensors.h"
#include "common/vec.h"

namespace pssl::PSSL_SIMD_NAMESPACE {

constexpr int kPixelBlock = 8;  // pixels that dots keeps in registers at once
constexpr int kTilePixels = 256;

// Pixels of a tile: a kilobyte of each channel at a time, less where D is so large that the tile would leave the
// second-level cache.
inline int64_t tile_pixels(int64_t D, int64_t element_bytes) {
  int64_t fits = (int64_t(1) << 19) / std::max<int64_t>(1, D * element_bytes) / 16 * 16;
  return std::clamp<int64_t>(fits, 16, kTilePixels);
}

// Distance between the rows of a packed tile; an odd number of cache lines, so that rows do not fall onto each other.
template <class T>
int64_t tile_stride(int64_t pixels) {
  int64_t stride = round_up(pixels, 64 / int64_t(sizeof(T)));
  return stride + (stride / (64 / int64_t(sizeof(T))) % 2 ? 0 : 64 / int64_t(sizeof(T)));
}

// move(d, p, stride of d, stride of p) for all D channels of n pixels, in the order that suits the layout: along the
// pixels, or for channels last in blocks of 16×16, since one side is read and the other written across its rows.
template <class Move>
inline void for_plane(const FeatureView& f, int64_t n, const Move& move) {
  using One = std::integral_constant<int64_t, 1>;
  if (f.sx == 1) {
    for (int64_t d = 0; d < f.D; ++d)
      for (int64_t p = 0; p < n; ++p) move(d, p, f.sd, One{});
  } else if (f.sd == 1) {
    for (int64_t p0 = 0; p0 < n; p0 += 16)
      for (int64_t d0 = 0; d0 < f.D; d0 += 16)
        for (int64_t p = p0; p < std::min(p0 + 16, n); ++p)
          for (int64_t d = d0; d < std::min(d0 + 16, f.D); ++d) move(d, p, One{}, f.sx);
  } else {
    for (int64_t d = 0; d < f.D; ++d)
      for (int64_t p = 0; p < n; ++p) move(d, p, f.sd, f.sx);
  }
}

// Packs pixels [x, x + n) of row y into out[d][0..n), zero where the pixel is outside the map, and zero in the columns
// up to `padded`.
template <class T, class S>
PSSL_NOINLINE void pack_row_of(const FeatureView& f, int64_t b, int64_t y, int64_t x, int64_t n,
                               int64_t padded, T* out, int64_t ld) {
  const int64_t begin = y >= 0 && y < f.h ? std::clamp<int64_t>(-x, 0, n) : n;
  const int64_t end = y >= 0 && y < f.h ? std::clamp<int64_t>(f.w - x, begin, n) : n;
  for (int64_t d = 0; d < f.D; ++d) {
    std::fill(out + d * ld, out + d * ld + begin, T(0));
    std::fill(out + d * ld + end, out + d * ld + padded, T(0));
  }
  if (begin == end) return;
  const S* row = static_cast<const S*>(f.data) + b * f.sb + y * f.sy + (x + begin) * f.sx;
  out += begin;
  for_plane(f, end - begin, [&](int64_t d, int64_t p, auto sd, auto sx) {
    out[d * ld + p] = static_cast<T>(row[d * sd + p * sx]);
  });
}

template <class T>
void pack_row(const FeatureView& f, int64_t b, int64_t y, int64_t x, int64_t n, int64_t padded, T* out,
              int64_t ld) {
  with_floating(f.type, [&](auto zero) { pack_row_of<T, decltype(zero)>(f, b, y, x, n, padded, out, ld); });
}

// Asks for the same pixels ahead of pack_row, where they lie side by side.
inline void prefetch_row(const FeatureView& f, int64_t b, int64_t y, int64_t x, int64_t n) {
  if (f.sx != 1) return;
  with_floating(f.type, [&](auto zero) {
    const auto* row = static_cast<const decltype(zero)*>(f.data) + b * f.sb + y * f.sy + x;
    for (int64_t d = 0; d < f.D; ++d)
      for (int64_t p = 0; p < n; p += 64 / int64_t(sizeof zero)) __builtin_prefetch(row + d * f.sd + p);
  });
}

// Writes in[d][0..n) to pixels [x, x + n) of row y.
template <class T, class S>
PSSL_NOINLINE void unpack_row_of(const T* in, int64_t ld, const FeatureView& f, int64_t b, int64_t y,
                                 int64_t x, int64_t n) {
  S* row = static_cast<S*>(f.data) + b * f.sb + y * f.sy + x * f.sx;
  for_plane(f, n, [&](int64_t d, int64_t p, auto sd, auto sx) {
    row[d * sd + p * sx] = static_cast<S>(in[d * ld + p]);
  });
}

template <class T>
void unpack_row(const T* in, int64_t ld, const FeatureView& f, int64_t b, int64_t y, int64_t x, int64_t n) {
  with_floating(f.type, [&](auto zero) { unpack_row_of<T, decltype(zero)>(in, ld, f, b, y, x, n); });
}

// Has write(o, ldo) write pixels [x, x + n) of row y as o[d][0..n), rows ldo apart: where they belong if they lie there
// side by side in this type, else into `room`, [D][ld], and from there to their places.
template <class T, class Write>
void write_row(const FeatureView& f, int64_t b, int64_t y, int64_t x, int64_t n, T* room, int64_t ld,
               const Write& write) {
  if (f.type == scalar_type_of<T> && f.sx == 1)
    return write(static_cast<T*>(f.data) + b * f.sb + y * f.sy + x, f.sd);
  write(room, ld);
  unpack_row(room, ld, f, b, y, x, n);
}

// Results from this size on are written past the caches where nothing but the writing is left to do on them: the caches
// would lose them again before anyone reads them.
constexpr int64_t kStreamedBytes = int64_t(16) << 20;

// Whether all of `f` can be streamed by whole vectors, tile by tile of a multiple of them.
template <class T>
bool can_stream(const FeatureView& f) {
  auto whole = [](int64_t elements) { return elements * int64_t(sizeof(T)) % kVecBytes == 0; };
  return f.type == scalar_type_of<T> && f.sx == 1 &&
         f.B * f.D * f.h * f.w * int64_t(sizeof(T)) >= kStreamedBytes &&
         reinterpret_cast<uintptr_t>(f.data) % kVecBytes == 0 && whole(f.sb) && whole(f.sd) && whole(f.sy);
}

// The same as write_row of a few channels for such tiles: `room`, [D][ld], stays in the first-level cache, and goes from
// there a row at a time, since rows that are written side by side hold each other up.
template <class T, class Write>
void stream_row(const FeatureView& f, int64_t b, int64_t y, int64_t x, int64_t n, T* room, int64_t ld,
                const Write& write) {
  write(room, ld);
  T* const out = static_cast<T*>(f.data) + b * f.sb + y * f.sy + x;
  for (int64_t d = 0; d < f.D; ++d)
    for (int64_t p = 0; p < n; p += kLanes<T>) stream<T>(out + d * f.sd + p, load<T>(room + d * ld + p));
}

// Calls body(integral_constant V, first column) for blocks of V vectors that cover `cp` columns.
template <class T, class F>
void for_class_blocks(int64_t cp, const F& body) {
  int64_t vectors = cp / kLanes<T>, v = 0;
  while (v < vectors) {
    const int64_t left = vectors - v, c = v * kLanes<T>;
    if (left >= 3 && left != 4) {
      body(std::integral_constant<int, 3>{}, c), v += 3;
    } else if (left >= 2) {
      body(std::integral_constant<int, 2>{}, c), v += 2;
    } else {
      body(std::integral_constant<int, 1>{}, c), v += 1;
    }
  }
}

// z[p][0..cp) = sum_d f[d][p] q[d][0..cp) for p < pixels (a multiple of kPixelBlock).
template <class T>
PSSL_NOINLINE void tile_dots(const T* f, int64_t ld, int64_t pixels, int64_t D, const T* q, int64_t cp,
                             T* z) {
  for_class_blocks<T>(cp, [&](auto block, int64_t c) {
    constexpr int V = decltype(block)::value;
    constexpr int P = kVecRegisters >= 32 ? kPixelBlock : kPixelBlock / 2;  // P·V accumulators and V operands
    for (int64_t p = 0; p < pixels; p += P) {
      Vec<T> sum[P][V] = {};
      for (int64_t d = 0; d < D; ++d) {
        Vec<T> k[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) k[v] = load<T>(q + d * cp + c + v * kLanes<T>);
#pragma GCC unroll 8
        for (int i = 0; i < P; ++i)
#pragma GCC unroll 4
          for (int v = 0; v < V; ++v) sum[i][v] += f[d * ld + p + i] * k[v];
      }
#pragma GCC unroll 8
      for (int i = 0; i < P; ++i)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) store<T>(z + (p + i) * cp + c + v * kLanes<T>, sum[i][v]);
    }
  });
}

// o[d][p] = first(d, p) + sum_{c<C} q[d][c] gt[c][p], p < n; q's rows are cp apart. first(d, p) is a vector of values from p
// on; it and gt, which is [C][ldg], can be read to the end of the last vector.
template <class T, class First>
PSSL_NOINLINE void tile_combine(const T* q, int64_t cp, int64_t C, int64_t D, const T* gt, int64_t ldg,
                                const First& first, T* o, int64_t ldo, int64_t n) {
  constexpr int N = 4;  // rows of D at once
  auto block = [&](auto rows, auto vectors, int64_t d, int64_t p) {
    constexpr int R = decltype(rows)::value;
    constexpr int V = decltype(vectors)::value;
    Vec<T> sum[R][V];
#pragma GCC unroll 4
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sum[i][v] = first(d + i, p + v * kLanes<T>);
    for (int64_t c = 0; c < C; ++c) {
      Vec<T> g[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) g[v] = load<T>(gt + c * ldg + p + v * kLanes<T>);
#pragma GCC unroll 4
      for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) sum[i][v] += q[(d + i) * cp + c] * g[v];
    }
#pragma GCC unroll 4
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v)
        store_part<T>(o + (d + i) * ldo + p + v * kLanes<T>, sum[i][v], n - p - v * kLanes<T>);
  };
  constexpr int kWide = kVecRegisters >= 32 ? 4 : 2;
  auto columns = [&](auto rows, int64_t d) {
    int64_t p = 0;
    for (; p + kWide * kLanes<T> <= n; p += kWide * kLanes<T>)
      block(rows, std::integral_constant<int, kWide>{}, d, p);
    for (; p < n; p += kLanes<T>) block(rows, std::integral_constant<int, 1>{}, d, p);
  };
  int64_t d = 0;
  for (; d + N <= D; d += N) columns(std::integral_constant<int, N>{}, d);
  for (; d < D; ++d) columns(std::integral_constant<int, 1>{}, d);
}

// For tile_combine: the sum over `count` features f, rows `ld` apart, of coefficient[p] f[d][p], without those whose
// coefficient is 0: where no counted pixel touches a cell, its feature may be NaN.
template <class T>
struct Multiple {
  const T* feature;
  const T* coefficient;
};
template <class T>
auto sum_of_multiples(const Multiple<T>* terms, int64_t count, int64_t ld) {
  return [=](int64_t d, int64_t p) {
    Vec<T> sum = {};
    for (const Multiple<T>* k = terms; k != terms + count; ++k) {
      const Vec<T> g = load<T>(k->coefficient + p);
      sum += g * keep<T>(load<T>(k->feature + d * ld + p), g != T(0));
    }
    return sum;
  };
}

}  // namespace pssl::PSSL_SIMD_NAMESPACE
