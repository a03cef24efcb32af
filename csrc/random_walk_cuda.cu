// random_walk on CUDA: sparse steps (identity 3), a launch each, a thread some of a cell's neighbours.
//
// Maps lie in memory as on the CPU (WalkRun), four side by side in packs. Affinities are kept for the offsets that point
// ahead, (neighbours / 2)·h·w numbers; those behind are the same numbers read from the other end. A step is a gather in a
// fixed order, and so short that waiting for memory is most of it: hence many threads, each with several reads under way.
#include <utility>

#include "common/cuda_four.cuh"
#include "common/cuda_table.cuh"
#include "common/cuda_tile.cuh"
#include "common/cuda_views.cuh"
#include "random_walk.h"

namespace {

using namespace pssl;
using namespace pssl::PSSL_SIMD_NAMESPACE;

constexpr const char* kOp = "random_walk";
constexpr int kOffsetGroup = 8;  // offsets whose feature distances a thread adds up at a time
constexpr int kShares = 8;       // of a cell's offsets in a step, one a thread
constexpr int kTogether = 3;     // offsets of a share that are under way at a time

struct Walk {
  int64_t h, w, ld, lead, size;  // `lead` cells of value 0 before the map, as many behind
  int64_t count;
  const WalkOffset* offsets;  // on the device

  explicit Walk(const WalkRun& run)
      : h(run.h),
        w(run.w),
        ld(run.ld),
        lead((run.reach + kWarp - 1) / kWarp * kWarp),
        size(2 * lead + (run.h * run.ld + kWarp - 1) / kWarp * kWarp),
        count(int64_t(run.offsets.size())) {}

  PSSL_HD int64_t cell(int64_t y, int64_t x) const { return lead + y * ld + x; }
  PSSL_HD bool has(int64_t y, int64_t x) const { return y < h && x >= 0 && x < w; }  // y is never negative
  PSSL_HD int64_t tiles() const { return Tile::count(h, w); }
  PSSL_HD unsigned row_blocks() const { return unsigned((w + kWarp - 1) / kWarp); }  // of a step
};

template <class T>
__device__ T clamped_edge(const AnyView<2>& edge, int64_t y, int64_t x) {
  return std::clamp(edge.floating<T>(y, x), T(0), T(1));
}

// The maps at the first step, a pack a row of the grid's blocks: damped by the edges, where there are any. What fills up
// the last pack is the last map again.
template <class T>
__global__ void __launch_bounds__(Tile::kThreads)
    start(const __grid_constant__ Walk walk, const __grid_constant__ AnyView<3> cams,
          const __grid_constant__ AnyView<2> edge, Four<T>* to) {
  const Tile tile = Tile::at(blockIdx.x % walk.tiles(), walk.h, walk.w);
  const int64_t pack = blockIdx.x / walk.tiles(), y = tile.y(), x = tile.x();
  if (!tile.inside()) return;
  const T left = edge.data ? T(1) - clamped_edge<T>(edge, y, x) : T(1);
  const Four<T> value = Four<T>::of(
      [&](int i) { return cams.floating<T>(std::min(pack * kFour + i, cams.size[0] - 1), y, x) * left; });
  store_pack(to + pack * walk.size + walk.cell(y, x), value);
}

template <class T>
__global__ void __launch_bounds__(Tile::kThreads)
    open_cells(const __grid_constant__ Walk walk, const __grid_constant__ AnyView<2> edge, double beta,
               T* open) {
  const Tile tile = Tile::at(blockIdx.x, walk.h, walk.w);
  if (!tile.inside()) return;
  open[walk.cell(tile.y(), tile.x())] = T(walk_openness(clamped_edge<T>(edge, tile.y(), tile.x()), beta));
}

// The least openness on each pair's path, an offset a row of the grid's blocks.
template <class T>
__global__ void __launch_bounds__(Tile::kThreads)
    take_edges(const __grid_constant__ Walk walk, const T* open, T* affinity) {
  const Tile tile = Tile::at(blockIdx.x % walk.tiles(), walk.h, walk.w);
  const int64_t index = blockIdx.x / walk.tiles();
  const WalkOffset o = walk.offsets[index];
  if (!tile.inside() || !walk.has(tile.y() + o.dy, tile.x() + o.dx)) return;
  const int64_t p = walk.cell(tile.y(), tile.x());
  T least = open[p];
  for (int64_t y = 0; y <= o.dy; ++y)
    for (int64_t x = o.dx < 0 ? o.dx : 0; x <= (o.dx > 0 ? o.dx : 0); ++x) {
      if (!is_on_walk_path(o.dy, o.dx, y, x)) continue;
      const T other = open[p + y * walk.ld + x];
      least = other < least ? other : least;
    }
  affinity[index * walk.size + p] = least;
}

// exp(-beta * mean over channels of |f_i - f_j|), kOffsetGroup offsets a row of the grid's blocks.
template <class T>
__global__ void __launch_bounds__(Tile::kThreads)
    take_features(const __grid_constant__ Walk walk, const __grid_constant__ AnyView<3> features, T exponent,
                  T* affinity) {
  const Tile tile = Tile::at(blockIdx.x % walk.tiles(), walk.h, walk.w);
  const int64_t first = blockIdx.x / walk.tiles() * kOffsetGroup, y = tile.y(), x = tile.x();
  if (!tile.inside()) return;
  const int64_t here = features.offset(0, y, x);
  int64_t there[kOffsetGroup];  // -1: no such pair
  T sum[kOffsetGroup];
  for (int i = 0; i < kOffsetGroup; ++i) {
    const bool counts = first + i < walk.count;
    const WalkOffset o = walk.offsets[counts ? first + i : first];
    there[i] = counts && walk.has(y + o.dy, x + o.dx) ? features.offset(0, y + o.dy, x + o.dx) : -1;
    sum[i] = 0;
  }
  for (int64_t d = 0; d < features.size[0]; ++d) {
    const int64_t plane = d * features.stride[0];
    const T own = load_floating<T>(features.data, features.type, plane + here);
#pragma unroll
    for (int i = 0; i < kOffsetGroup; ++i)
      if (there[i] >= 0)
        sum[i] += std::abs(own - load_floating<T>(features.data, features.type, plane + there[i]));
  }
#pragma unroll
  for (int i = 0; i < kOffsetGroup; ++i)
    if (there[i] >= 0) affinity[(first + i) * walk.size + walk.cell(y, x)] = std::exp(sum[i] * exponent);
}

template <class T>
__global__ void __launch_bounds__(Tile::kThreads)
    normalise(const __grid_constant__ Walk walk, const T* affinity, T* scale) {
  const Tile tile = Tile::at(blockIdx.x, walk.h, walk.w);
  if (!tile.inside()) return;
  const int64_t p = walk.cell(tile.y(), tile.x());
  double sum = 0;
  for (int64_t o = 0; o < walk.count; ++o, affinity += walk.size)
    sum += double(affinity[p]) + double(affinity[p - walk.offsets[o].distance]);
  scale[p] = T(walk_scale(sum));
}

// Maps after a step, a block kWarp cells of a row in one pack; after the last one `out` [maps,h,w] instead. Affinities
// are brought while the last step still runs.
template <class T>
__global__ void __launch_bounds__(kWarp* kShares, sizeof(T) == 4 ? 4 : 2)
    step(const __grid_constant__ Walk walk, int64_t maps, const T* affinity, const T* scale,
         const Four<T>* from, Four<T>* to, T* out) {
  PSSL_SHARED(changes, Four<T>[kShares][kWarp]);
  let_next_kernel_begin();
  const int lane = threadIdx.x, share = threadIdx.y;
  const unsigned across = walk.row_blocks(), packs = unsigned(packs_of(maps)), row = blockIdx.x / across;
  const int64_t pack = row % packs, y = row / packs, x = int64_t(blockIdx.x % across) * kWarp + lane;
  const bool inside = x < walk.w;
  const int64_t p = walk.cell(y, inside ? x : 0);
  from += pack * walk.size + p;
  affinity += p;
  T ahead[kTogether], behind[kTogether];
  int64_t distance[kTogether];
  auto take_affinities = [&](int64_t first) {
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      const int64_t o = first + i * kShares < walk.count ? first + i * kShares : first;
      distance[i] = walk.offsets[o].distance;
      ahead[i] = affinity[o * walk.size], behind[i] = affinity[o * walk.size - distance[i]];
    }
  };
  if (share < walk.count) take_affinities(share);
  const T rate = scale[p];
  wait_for_last_kernel();
  const Four<T> here = load_pack(from);
  Four<T> change = {};
  for (int64_t first = share; first < walk.count; first += kShares * kTogether) {
    if (first > share) take_affinities(first);
    Four<T> next[kTogether], last[kTogether];
#pragma unroll
    for (int i = 0; i < kTogether; ++i)
      next[i] = load_pack(from + distance[i]), last[i] = load_pack(from - distance[i]);
#pragma unroll
    for (int i = 0; i < kTogether; ++i)
      if (first + i * kShares < walk.count)
        change += walk_change(ahead[i], next[i], here) + walk_change(behind[i], last[i], here);
  }
  store_pack(&changes[share][lane], change);
  __syncthreads();
  if (share > 0 || !inside) return;
#pragma unroll
  for (int i = 1; i < kShares; ++i) change += load_pack(&changes[i][lane]);
  const Four<T> moved = here + rate * change;
  if (!out) store_pack(to + pack * walk.size + p, moved);
#pragma unroll
  for (int i = 0; i < kFour; ++i)
    if (out && pack * kFour + i < maps) out[((pack * kFour + i) * walk.h + y) * walk.w + x] = moved.v[i];
}

template <class T>
Tensor zeros(const Tensor& like, int64_t count) {
  Tensor made = new_on_device(like, {count}, scalar_type_of<T>);
  return torch::stable::zero_(made);
}

template <class T>
Tensor walk_maps(const CudaCall& call, const Tensor& cams, const std::optional<Tensor>& edge,
                 const std::optional<Tensor>& features, const WalkRun& run, double beta, int64_t steps) {
  const int64_t k = cams.size(0), h = run.h, w = run.w;
  Tensor result = new_on_device(cams, {k, h, w}, scalar_type_of<T>);
  if (k * h * w == 0) return result;
  Walk walk(run);
  DeviceTable<WalkOffset> offsets(call, cams, run.offsets);
  walk.offsets = offsets.get();
  Tensor affinities = zeros<T>(cams, walk.count * walk.size), scales = zeros<T>(cams, walk.size);
  T *affinity = affinities.mutable_data_ptr<T>(), *scale = scales.mutable_data_ptr<T>();
  const AnyView<2> edges = AnyView<2>::of(edge);
  if (edge) {
    // until normalise writes the scales, their memory holds the openness
    launch(call, open_cells<T>, grid_of(walk.tiles()), Tile::block(), 0, walk, edges, beta, scale);
    launch(call, take_edges<T>, grid_of(walk.tiles() * walk.count), Tile::block(), 0, walk, scale, affinity);
  } else {
    const int64_t groups = (walk.count + kOffsetGroup - 1) / kOffsetGroup;
    launch(call, take_features<T>, grid_of(walk.tiles() * groups), Tile::block(), 0, walk,
           AnyView<3>::of(*features), T(walk_feature_exponent(beta, features->size(0))), affinity);
  }
  launch(call, normalise<T>, grid_of(walk.tiles()), Tile::block(), 0, walk, affinity, scale);

  const int64_t packs = packs_of(k);
  Tensor maps = zeros<T>(cams, 2 * packs * walk.size * kFour);
  Four<T>*from = packs_in<T>(maps), *to = from + packs * walk.size;
  launch(call, start<T>, grid_of(walk.tiles() * packs), Tile::block(), 0, walk, AnyView<3>::of(cams), edges,
         from);
  const dim3 grid = grid_of(walk.row_blocks() * h * packs), block(kWarp, kShares);
  const bool early = can_begin_early(step<T>);
  for (int64_t i = 0; i < steps; ++i) {
    launch_early(call, early, step<T>, grid, block, walk, k, affinity, scale, from, to,
                 i + 1 < steps ? nullptr : result.mutable_data_ptr<T>());
    std::swap(from, to);
  }
  return result;
}

Tensor random_walk_cuda(const Tensor& cams, const std::optional<Tensor>& edge,
                        const std::optional<Tensor>& features, int64_t radius, double beta,
                        int64_t log2_steps) {
  check_walk(kOp, cams, edge, features, radius, beta, log2_steps);
  const CudaCall call(kOp, cams);
  const int64_t h = cams.size(1), w = cams.size(2);
  const WalkRun run(h, w, edge ? radius : shrunk_radius(radius, h, w));
  const Tensor& source = edge ? *edge : *features;
  Tensor result;
  with_accumulation({cams.scalar_type(), source.scalar_type()}, [&](auto zero) {
    result = walk_maps<decltype(zero)>(call, cams, edge, features, run, beta, int64_t(1) << log2_steps);
  });
  return result;
}

}  // namespace

PSSL_REGISTER_CUDA(m) { m.impl("random_walk", TORCH_BOX(&random_walk_cuda)); }
