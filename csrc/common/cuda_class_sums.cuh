// Sums over cells on CUDA: of each class the sum of features times coefficients, sum_i f_i g_c(i). Chunks of the cells first,
// whose sums are then added up in their order.
#pragma once

#include "common/cuda_label_grid.cuh"

namespace pssl::PSSL_SIMD_NAMESPACE {

template <class T>
struct ClassSums {
  AnyView<4> f;
  const T* gradients;  // [B,padded,plane]
  int64_t C, padded;
  T* partial;  // [B,chunks,C,D]
  int64_t chunks;
  CellTiles tiles;
  int log2_channels;

  static constexpr int kClasses = 128 / sizeof(T);  // in one pass over the cells
  static constexpr int kMostParts = 8;

  PSSL_HD int64_t channel_tiles() const {
    return (f.size[1] + (int64_t(1) << log2_channels) - 1) >> log2_channels;
  }
  PSSL_HD int64_t passes() const { return (C + kClasses - 1) / kClasses; }
  // Threads of a block: four channels and four classes each, and as many parts of the cells as there is room for.
  PSSL_HD int across() const { return (1 << log2_channels) / kFour; }
  PSSL_HD int down() const { return int((C < kClasses ? C : kClasses) + kFour - 1) / kFour; }
  PSSL_HD int parts() const {
    const int fit = kThreads / (across() * down());
    return fit < 1 ? 1 : fit < kMostParts ? fit : kMostParts;
  }
  PSSL_HD int threads() const { return (across() * down() * parts() + kWarp - 1) / kWarp * kWarp; }
  PSSL_HD int64_t shared(int log2) const {
    const int64_t staged = (int64_t(kTilePlane) << log2) + down() * kFour * kTilePlane;
    const int64_t sums = ((int64_t(1) << log2) / kFour) * down() * kFour * kFour;
    return staged > sums ? staged : sums;
  }
};

// A block for a tile of channels, a pass of classes and a chunk of the cells of an image.
template <class T>
__global__ void __launch_bounds__(kThreads) class_sums(const __grid_constant__ ClassSums<T> p) {
  PSSL_DYNAMIC_SHARED(T, staged);
  PSSL_SHARED(at, int64_t[kTileCells]);
  T* coefficients = staged + (kTilePlane << p.log2_channels);
  int64_t task = blockIdx.x;
  const int64_t d0 = task % p.channel_tiles() << p.log2_channels;
  task /= p.channel_tiles();
  const int64_t c0 = task % p.passes() * p.kClasses;
  task /= p.passes();
  const int64_t chunk = task % p.chunks, b = task / p.chunks;
  const int64_t plane = coefficient_plane(p.tiles.h * p.tiles.w);
  const int count = int(p.C - c0 < p.kClasses ? p.C - c0 : p.kClasses);
  const int thread = block_thread(), across = p.across(), down = p.down();
  const int d = thread % across, c = thread / across % down, part = thread / (across * down);
  T sum[kFour][kFour] = {};
  for (int64_t tile = p.tiles.count() * chunk / p.chunks; tile < p.tiles.count() * (chunk + 1) / p.chunks;
       ++tile) {
    auto cell = [&](int j) { return p.tiles.cell(tile, j / kTileColumns, j % kTileColumns); };
    __syncthreads();
    stage_coefficients(p.gradients + b * p.padded * plane, plane, c0, count, cell, coefficients);
    find_offsets<Alone>(p.f, p.tiles, b, tile, at);
    __syncthreads();
    // Cells that count for nothing are left out, not multiplied by 0: their features may be NaN.
    for (int j = thread; j < kTileCells; j += block_threads()) {
      bool any = false;
      for (int k = 0; k < count; ++k) any |= coefficients[k * kTilePlane + j] != T(0);
      if (!any) at[j] = -1;
    }
    __syncthreads();
    stage<T, Alone>(p.f, at, d0, p.log2_channels, staged);
    __syncthreads();
    T of_tile[kFour][kFour] = {};  // then added: rounds less than one long sum
#pragma unroll 1
    for (int j = part * kFour; part < p.parts() && j < kTileCells; j += p.parts() * kFour) {
      Four<T> f[kFour], g[kFour];
#pragma unroll
      for (int i = 0; i < kFour; ++i) {
        f[i] = four(staged + (d + across * i) * kTilePlane + j);
        g[i] = c + down * i < (count + kFour - 1) / kFour * kFour
                   ? four(coefficients + (c + down * i) * kTilePlane + j)
                   : Four<T>{};
      }
#pragma unroll
      for (int i = 0; i < kFour; ++i)
#pragma unroll
        for (int k = 0; k < kFour; ++k)
#pragma unroll
          for (int e = 0; e < kFour; ++e) of_tile[i][k] += g[i].v[e] * f[k].v[e];
    }
#pragma unroll
    for (int i = 0; i < kFour * kFour; ++i) sum[i / kFour][i % kFour] += of_tile[i / kFour][i % kFour];
  }
  const int all = across * down;
  for (int other = 1; other < p.parts(); ++other) {
    T* sums = staged + thread % all;
    __syncthreads();
    if (part == other) {
#pragma unroll
      for (int i = 0; i < kFour * kFour; ++i) sums[i * all] = sum[i / kFour][i % kFour];
    }
    __syncthreads();
    if (part == 0) {
#pragma unroll
      for (int i = 0; i < kFour * kFour; ++i) sum[i / kFour][i % kFour] += sums[i * all];
    }
  }
  if (part != 0) return;
  const int64_t D = p.f.size[1];
#pragma unroll
  for (int i = 0; i < kFour; ++i)
#pragma unroll
    for (int k = 0; k < kFour; ++k) {
      const int64_t to_c = c + down * i, to_d = d0 + d + across * k;
      if (to_c < count && to_d < D)
        p.partial[((b * p.chunks + chunk) * p.C + c0 + to_c) * D + to_d] = sum[i][k];
    }
}

// The same in quads: a warp for four channels, a pass of classes and a chunk of the cells of an image, each lane with four
// cells of a tile; at the end the lanes' sums are added up.
constexpr int kQuadSumWarps =
    8;  // of a block: their channels are neighbours, the coefficients in its cache the same

struct QuadSum {
  const ClassSums<float>& p;
  int64_t d0, c0, chunk, b;

  static constexpr int kClasses = QuadTile::kClasses;

  PSSL_HD static int64_t tasks(const ClassSums<float>& p) {
    return p.f.size[0] * p.chunks * passes(p) * channel_groups(p);
  }
  PSSL_HD static int64_t passes(const ClassSums<float>& p) { return (p.C + kClasses - 1) / kClasses; }
  PSSL_HD static int64_t channel_groups(const ClassSums<float>& p) {
    return (p.f.size[1] + kFour - 1) / kFour;
  }

  __device__ QuadSum(const ClassSums<float>& p, int64_t task) : p(p) {
    d0 = task % channel_groups(p) * kFour, task /= channel_groups(p);
    c0 = task % passes(p) * kClasses, task /= passes(p);
    chunk = task % p.chunks, b = task / p.chunks;
  }
  // Four channels of four cells of a tile, `place` the first. Where rows follow one another in memory, as they mostly do,
  // a cell's number is its place: no divisions, which would take longer than the sums.
  template <class S>
  __device__ void load(int64_t place, Stored<S> (&f)[kFour]) const {
    const int64_t cells = p.tiles.h * p.tiles.w, w = p.tiles.w;
    const bool in_order = p.f.stride[2] == w * p.f.stride[3];
    int64_t at[kFour];
#pragma unroll
    for (int i = 0; i < kFour; ++i) {
      const int64_t cell = place + i, y = in_order ? 0 : cell / w;
      at[i] = cell < cells ? p.f.offset(b, 0, y, cell - y * w) : -1;
    }
    const Quad<const S> quad(p.f, at);
#pragma unroll
    for (int k = 0; k < kFour; ++k)
      if (d0 + k < p.f.size[1]) f[k] = quad.load(d0 + k);
  }
  // Cells that count for nothing are left out, not multiplied by 0: their features may be NaN, which is rare.
  __device__ void leave_out(const float* of_place, int64_t plane, Four<float> (&f)[kFour]) const {
    for (int i = 0; i < kFour; ++i) {
      bool any = false;
      for (int64_t c = 0; c < p.C; ++c) any |= of_place[c * plane + i] != 0.0f;
      if (any) continue;
#pragma unroll
      for (int k = 0; k < kFour; ++k) f[k].v[i] = 0.0f;
    }
  }
  template <class S>
  __device__ void run(int lane) const {
    const int64_t plane = coefficient_plane(p.tiles.h * p.tiles.w), tiles = p.tiles.count();
    const int64_t first = tiles * chunk / p.chunks, last = tiles * (chunk + 1) / p.chunks;
    const int groups = int((p.padded - c0) / kClassGroup);
    float sum[kFour][kClasses] = {};  // of channels and classes
    Stored<S> next[kFour] = {};
    if (first < last) load(first * kTileCells + lane * kFour, next);
#pragma unroll 1
    for (int64_t tile = first; tile < last; ++tile) {
      const int64_t place = tile * kTileCells + lane * kFour;
      Four<float> f[kFour];
      float test = 0;
#pragma unroll
      for (int k = 0; k < kFour; ++k) {
        f[k] = floats(next[k]);
#pragma unroll
        for (int i = 0; i < kFour; ++i) test += f[k].v[i] * 0.0f;
      }
      if (tile + 1 < last) load(place + kTileCells, next);
      if (place >= plane) continue;
      const float* of_place = p.gradients + b * p.padded * plane + place;
      if (test != 0.0f) leave_out(of_place, plane, f);
#pragma unroll
      for (int group = 0; group < QuadTile::kGroups; ++group) {
        if (group >= groups) break;
#pragma unroll
        for (int c = group * kClassGroup; c < (group + 1) * kClassGroup; ++c) {
          const Four<float> g = four(of_place + (c0 + c) * plane);
#pragma unroll
          for (int k = 0; k < kFour; ++k)
#pragma unroll
            for (int i = 0; i < kFour; ++i) sum[k][c] += f[k].v[i] * g.v[i];
        }
      }
    }
#pragma unroll
    for (int part = 0; part < kFour * kClasses / kWarp; ++part) {
      float values[kWarp];
#pragma unroll
      for (int i = 0; i < kWarp; ++i) {
        const int number = part * kWarp + i;
        values[i] = sum[number / kClasses][number % kClasses];
      }
      const float all = warp_sums(values);
      const int number = part * kWarp + lane;
      const int64_t d = d0 + number / kClasses, c = c0 + number % kClasses;
      if (c < p.C && d < p.f.size[1]) p.partial[((b * p.chunks + chunk) * p.C + c) * p.f.size[1] + d] = all;
    }
  }
};
static_assert(kFour * QuadSum::kClasses % kWarp == 0);

template <class T>
__global__ void __launch_bounds__(kQuadSumWarps* kWarp)
    quad_class_sums(const __grid_constant__ ClassSums<T> p) {
  const int64_t task = int64_t(blockIdx.x) * kQuadSumWarps + threadIdx.x / kWarp;
  if (task >= QuadSum::tasks(p)) return;
  with_element<float>(
      p.f.type, [&](auto zero) { QuadSum(p, task).template run<decltype(zero)>(int(threadIdx.x) % kWarp); });
}

// out[b][i] = the sum over the chunks of partial[b][chunk][i], i < n
template <class P, class T>
__global__ void __launch_bounds__(kThreads)
    add_chunks(const P* partial, int64_t B, int64_t chunks, int64_t n, T* out) {
  const int64_t thread = grid_thread();
  if (thread >= B * n) return;
  const P* first = partial + thread / n * chunks * n + thread % n;
  P sum = 0;
#pragma unroll 8  // so many loads are under way
  for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += first[chunk * n];
  out[thread] = T(sum);
}

// Sums over cells, in chunks whose number the sizes alone fix.
template <class T>
struct CellSums {
  Tensor partial;  // [B,chunks,C,D]
  int64_t chunks;

  CellSums(const CudaCall& call, const Tensor& features, const T* gradients, int64_t C, int64_t padded) {
    // At most so many bytes of partial sums: chunks enough to fill a device, and few enough that adding them up does not
    // count.
    constexpr int64_t kTiles = 8, kMostBytes = int64_t(4) << 20;
    ClassSums<T> p{AnyView<4>::of(features), gradients, C, padded, nullptr, 0, {}, 0};
    const int64_t B = p.f.size[0], D = p.f.size[1];
    p.tiles = {p.f.size[2], p.f.size[3], true};
    const int64_t fit = kMostBytes / std::max<int64_t>(1, B * C * D * int64_t(sizeof(T)));
    chunks = p.chunks = std::min((p.tiles.count() + kTiles - 1) / kTiles, std::max<int64_t>(1, fit));
    partial = new_on_device(features, {B * chunks * C * D}, scalar_type_of<T>);
    if (partial.numel() == 0) return;
    p.partial = partial.mutable_data_ptr<T>();
    if constexpr (sizeof(T) == sizeof(float)) {
      if (in_quads<T>(p.f)) {
        const int64_t blocks = (QuadSum::tasks(p) + kQuadSumWarps - 1) / kQuadSumWarps;
        launch(call, quad_class_sums<T>, grid_of(blocks), kQuadSumWarps * kWarp, 0, p);
        return;
      }
    }
    auto bytes = [&](int log2) { return p.shared(log2) * int64_t(sizeof(T)); };
    p.log2_channels = fitting_channels(call.limits, sizeof(T) == 8 ? 5 : 6, bytes);
    launch(call, class_sums<T>, grid_of(B * chunks * p.passes() * p.channel_tiles()), dim3(p.threads()),
           bytes(p.log2_channels), p);
  }
};

}  // namespace pssl::PSSL_SIMD_NAMESPACE
