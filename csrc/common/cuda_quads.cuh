// Passes over cells in single precision without staging, where cells of a channel lie side by side in memory: a thread takes
// four of them, a warp a tile, and channels come from memory one after the other, the next ones on their way while the last
// are multiplied. What all threads read, the class vectors, lies in shared memory.
#pragma once

#include "common/cuda_registers.cuh"
#include "common/cuda_stage.cuh"

namespace pssl::PSSL_SIMD_NAMESPACE {

// Whether a map is read so: single precision's sums fit into a thread's registers. Where a cell's channels lie side by side,
// staging reads those together.
template <class T>
inline bool in_quads(const AnyView<4>& map) {
  return sizeof(T) == 4 && !along_channels(map);
}

// Four cells side by side, channel by channel. S: float or shorter, const where it is only read.
template <class S>
struct Quad {
  using Element = std::remove_const_t<S>;

  S* data;
  int64_t stride;     // from a channel to the next
  int64_t at[kFour];  // offsets of the cells; -1: none there
  bool together;

  __device__ Quad(const AnyView<4>& map, const int64_t* offsets)
      : data(static_cast<S*>(map.data)),
        stride(map.stride[1]),
        at{offsets[0], offsets[1], offsets[2], offsets[3]},
        together(stride % kFour == 0 && lie_together(data, at)) {}

  __device__ Stored<Element> load(int64_t d) const {
    Stored<Element> stored{};
    if (together) {
      stored = *reinterpret_cast<const Stored<Element>*>(data + at[0] + d * stride);
    } else {
#pragma unroll
      for (int i = 0; i < kFour; ++i)
        if (at[i] >= 0) stored.v[i] = data[at[i] + d * stride];
    }
    return stored;
  }
  __device__ void store(int64_t d, const Four<float>& values) const {
    store_four(values, data, at, d * stride, together);
  }
};

template <class S>
__device__ inline Four<float> floats(const Stored<S>& stored) {
  return {converted<float>(stored.v[0]), converted<float>(stored.v[1]), converted<float>(stored.v[2]),
          converted<float>(stored.v[3])};
}

// use(d, load(d)) for d in [first, last), kAhead loads ahead of their use.
template <int kAhead, class Load, class Use>
__device__ void each_channel(int first, int last, const Load& load, const Use& use) {
  decltype(load(0)) next[kAhead] = {};
  auto fetch = [&](int d) {
#pragma unroll
    for (int k = 0; k < kAhead; ++k)
      if (d + k < last) next[k] = load(d + k);
  };
  fetch(first);
#pragma unroll 1
  for (int d = first; d < last; d += kAhead) {
    decltype(load(0)) now[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) now[k] = next[k];
    fetch(d + kAhead);
#pragma unroll
    for (int k = 0; k < kAhead; ++k)
      if (d + k < last) use(d + k, now[k]);
  }
}
template <class S>
constexpr int kChannelsAhead = 16 / sizeof(S);  // 64 bytes of four cells

// A block's share of memory and work: warps share the channels of a tile.
struct QuadTile {
  int parts;  // warps

  static constexpr int kMost = 4;
  static constexpr int kGradientChannels = 8;  // of a warp at a time
  static constexpr int kGroups = 3;            // of classes in a pass: as many sums as registers hold
  static constexpr int kClasses = kGroups * kClassGroup;
  static constexpr int kRows = kClasses + 1;  // of sums in a pass: classes, and the norm

  PSSL_HD int threads() const { return parts * kWarp; }
  // floats of shared memory: every warp's sums of a pass; before and after, vectors of some channels
  PSSL_HD int64_t area() const { return int64_t(parts) * kRows * kTilePlane; }
  PSSL_HD int channels(int64_t classes) const { return int(area() / classes); }
  // bytes, with `more` floats beside
  int64_t bytes(int64_t more) const { return (area() + more) * int64_t(sizeof(float)); }
  // As many warps as fit into a block's shared memory; none: use staging.
  static QuadTile fitting(const DeviceLimits& limits, int64_t more) {
    QuadTile shape{kMost};
    while (shape.parts > 0 && shape.bytes(more) > limits.shared_bytes) shape.parts /= 2;
    return shape;
  }
};

// staged[channel][c] = q[channel][first + c], channels [0, count), classes [0, classes); 0 for classes behind the last.
__device__ inline void stage_vectors(const float* q, int64_t padded, int64_t first, int count, int classes,
                                     float* staged) {
#pragma unroll 4
  for (int i = block_thread(); i < count * classes; i += block_threads()) {
    const int64_t c = first + i % classes;
    staged[i] = c < padded ? q[i / classes * padded + c] : 0.0f;
  }
}

// rows[c][cell] = the products of a tile's cells with vectors q [D][padded], and norms[cell] = |f|^2 where that is not null.
// `area`: QuadTile's. Starts with a barrier and ends without one.
template <class S>
__device__ void quad_products(const Quad<const S>& quad, int64_t D, const float* q, int64_t padded,
                              const QuadTile& shape, float* area, float* rows, float* norms) {
  const int lane = block_thread() % kWarp, part = block_thread() / kWarp;
  const int channels = shape.channels(QuadTile::kClasses);
  for (int64_t c0 = 0; c0 < padded || (c0 == 0 && norms); c0 += QuadTile::kClasses) {
    const int64_t left = (padded - c0) / kClassGroup;
    const int groups = int(left < QuadTile::kGroups ? left : QuadTile::kGroups);
    const bool with_norm = norms && c0 == 0;
    float sum[QuadTile::kGroups][kClassGroup][kFour] = {}, norm[kFour] = {};
    for (int64_t d0 = 0; d0 < D; d0 += channels) {
      const int count = int(D - d0 < channels ? D - d0 : channels);
      const int each = (count + shape.parts - 1) / shape.parts, first = part * each;
      __syncthreads();
      if (groups > 0) stage_vectors(q + d0 * padded, padded, c0, count, QuadTile::kClasses, area);
      __syncthreads();
      each_channel<kChannelsAhead<S>>(
          first, first + each < count ? first + each : count, [&](int d) { return quad.load(d0 + d); },
          [&](int d, const Stored<S>& stored) {
            const Four<float> f = floats(stored);
            if (with_norm) add_squares(f, norm);
#pragma unroll
            for (int g = 0; g < QuadTile::kGroups; ++g)
              if (g < groups) add_products(f, area + d * QuadTile::kClasses + g * kClassGroup, sum[g]);
          });
    }
    __syncthreads();
    float* own = area + part * QuadTile::kRows * kTilePlane + lane * kFour;
#pragma unroll
    for (int g = 0; g < QuadTile::kGroups; ++g)
#pragma unroll
      for (int k = 0; k < kClassGroup; ++k) {
        const float (&s)[kFour] = sum[g][k];
        if (g < groups) four(own + (g * kClassGroup + k) * kTilePlane) = {s[0], s[1], s[2], s[3]};
      }
    if (with_norm) four(own + QuadTile::kClasses * kTilePlane) = {norm[0], norm[1], norm[2], norm[3]};
    __syncthreads();
    const int classes = groups * kClassGroup;
    for (int i = block_thread(); i < (classes + with_norm) * kTileCells; i += block_threads()) {
      const int j = i % kTileCells, row = i / kTileCells;
      const float* of_part = area + (row < classes ? row : QuadTile::kClasses) * kTilePlane + j;
      float all = 0;
      for (int k = 0; k < shape.parts; ++k) all += of_part[k * QuadTile::kRows * kTilePlane];
      (row < classes ? rows + (c0 + row) * kTilePlane : norms)[j] = all;
    }
  }
}

// The gradient of a tile's features: sum_c q_c rows[c], and coefficients[cell] times the features where that is not null.
template <class S>
__device__ void quad_gradients(const Quad<const S>& quad, const Quad<S>& out, int64_t D, const float* q,
                               int64_t padded, const QuadTile& shape, float* area, const float* rows,
                               const float* coefficients) {
  constexpr int kChannels = QuadTile::kGradientChannels;
  const int place = block_thread() % kWarp * kFour, part = block_thread() / kWarp;
  const int most = shape.channels(padded) / kChannels * kChannels;
  const Four<float> own = coefficients ? four(coefficients + place) : Four<float>{};
  for (int64_t d0 = 0; d0 < D; d0 += most) {
    const int count = int(D - d0 < most ? D - d0 : most);
    __syncthreads();
    stage_vectors(q + d0 * padded, padded, 0, count, int(padded), area);
    __syncthreads();
    for (int d = part * kChannels; d < count; d += shape.parts * kChannels) {
      const int channels = count - d < kChannels ? count - d : kChannels;
      Stored<S> f[kChannels] = {};
      if (coefficients)
#pragma unroll
        for (int k = 0; k < kChannels; ++k)
          if (k < channels) f[k] = quad.load(d0 + d + k);
      float sum[kChannels][kFour] = {};
      add_classes(area + d * padded, padded, channels, rows + place, int(padded), sum);
#pragma unroll
      for (int k = 0; k < kChannels; ++k) {
        if (k >= channels) break;
        const Four<float> value = floats(f[k]);
        Four<float> gradient;
#pragma unroll
        for (int i = 0; i < kFour; ++i) gradient.v[i] = sum[k][i] + times_if(own.v[i], value.v[i]);
        out.store(d0 + d + k, gradient);
      }
    }
  }
}

}  // namespace pssl::PSSL_SIMD_NAMESPACE
