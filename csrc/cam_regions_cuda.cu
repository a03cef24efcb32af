// cam_regions on CUDA: a pass for each present class's maximum over its image, a pass for the labels. Both resize and add
// up the scales per pixel; no resized map exists, and absent classes are not read. Maxima meet in integer atomics.
// A mask has many more pixels than the CAMs have cells, so that instructions count: pixels of a column that lie between
// the same cells share their loading.
#include "cam_regions.h"
#include "common/cuda_resize.cuh"
#include "common/ordered_bits.h"

namespace {

using namespace pssl;
using namespace pssl::PSSL_SIMD_NAMESPACE;

constexpr const char* kOp = "cam_regions";
constexpr int kRows = 4;  // pixels of a thread

using PixelTile = TallTile<kRows>;
template <class T>
using Taps = TileTaps<T, kRows>;

struct Problem {
  MapList cams;
  AnyView<2> labels;  // [B,K]
  int64_t B, K, H, W;

  PSSL_HD int64_t tiles() const { return PixelTile::count(H, W); }  // of one image
};

// The classes that are present in image b, ascending, found by the first warp.
struct Present {
  int count;
  int32_t list[kMostRegionClasses];
};

__device__ void find_present(const Problem& p, int64_t b, Present& present) {
  if (block_thread() < kWarp) {
    const int lane = block_thread();
    int count = 0;
    for (int first = 0; first < p.K; first += kWarp) {
      const int k = first + lane;
      const bool there = k < p.K && p.labels.truth(b, k);
      const unsigned lanes = __ballot_sync(kAllLanes, there);
      if (there) present.list[count + __popc(lanes & ((1u << lane) - 1))] = k;
      count += __popc(lanes);
    }
    if (lane == 0) present.count = count;
  }
  __syncthreads();
}

// The sum over scales of relu(resized map) at this thread's pixels.
template <class T>
__device__ void sum_of_scales(const Problem& p, const Taps<T>* taps, int64_t b, int64_t k, T (&sum)[kRows]) {
  for (int i = 0; i < p.cams.count; ++i) {
    T value[kRows];
    resize_at_thread(p.cams.map[i], taps[i], b, k, value);
#pragma unroll
    for (int r = 0; r < kRows; ++r) sum[r] = i == 0 ? relu(value[r]) : sum[r] + relu(value[r]);
  }
}

// top[b,k] = the maximum of every present class over its image, as ordered bits; 0 before.
template <class T>
__global__ void __launch_bounds__(Tile::kThreads)
    maxima(const __grid_constant__ Problem p, OrderedBits<T>* top) {
  PSSL_DYNAMIC_SHARED(Taps<T>, taps);
  PSSL_SHARED(present, Present);
  PSSL_SHARED(scratch, OrderedBits<T>[kWarp]);
  const int64_t b = blockIdx.x / p.tiles();
  const PixelTile tile = PixelTile::at(blockIdx.x % p.tiles(), p.H, p.W);
  find_present(p, b, present);
  if (present.count == 0) return;
  find_taps(tile, p.cams.map, p.cams.count, taps);
  for (int i = 0; i < present.count; ++i) {
    const int64_t k = present.list[i];
    T sum[kRows];
    sum_of_scales(p, taps, b, k, sum);
    OrderedBits<T> own = 0;
#pragma unroll
    for (int r = 0; r < kRows; ++r)
      if (tile.inside(r)) own = Largest{}(own, ordered_bits(sum[r]));
    own = block_largest(own, scratch);
    if (block_thread() == 0) atomicMax(top + b * p.K + k, own);
  }
}

template <class T>
__global__ void __launch_bounds__(Tile::kThreads)
    labels(const __grid_constant__ Problem p, const OrderedBits<T>* top, T foreground, T background,
           uint8_t ignore, uint8_t* out) {
  PSSL_DYNAMIC_SHARED(Taps<T>, taps);
  PSSL_SHARED(present, Present);
  const int64_t b = blockIdx.x / p.tiles();
  const PixelTile tile = PixelTile::at(blockIdx.x % p.tiles(), p.H, p.W);
  find_present(p, b, present);
  if (present.count > 0) find_taps(tile, p.cams.map, p.cams.count, taps);
  T best[kRows];
  int32_t index[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) best[r] = T(-1), index[r] = 0;  // no class: below every sensible threshold
  for (int i = 0; i < present.count; ++i) {
    const int32_t k = present.list[i];
    const T divisor = from_ordered_bits<T>(top[b * p.K + k]) + T(kMaximumEps);
    T sum[kRows];
    sum_of_scales(p, taps, b, k, sum);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const T value = sum[r] / divisor;
      if (beats(value, best[r])) best[r] = value, index[r] = k;
    }
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r)
    if (tile.inside(r))
      out[(b * p.H + tile.y(r)) * p.W + tile.x()] =
          region_label(best[r], index[r], foreground, background, ignore);
}

Tensor cam_regions_cuda(const std::vector<Tensor>& cams, const Tensor& image_labels, int64_t height,
                        int64_t width, double foreground, double background, int64_t ignore_index) {
  check_maps(kOp, "cams", cams, image_labels, height, width);
  STD_TORCH_CHECK(image_labels.size(1) <= kMostRegionClasses, kOp, ": cams must be of at most 254 classes");
  const CudaCall call(kOp, image_labels);
  Problem p{{}, AnyView<2>::of(image_labels), image_labels.size(0), image_labels.size(1), height, width};
  p.cams.add(kOp, "cams", cams);
  Tensor result = new_on_device(image_labels, {p.B, height, width}, ScalarType::Byte);
  with_accumulation({accumulation_of(cams)}, [&](auto zero) {
    using T = decltype(zero);
    using Bits = OrderedBits<T>;
    Tensor top = new_on_device(image_labels, {p.B, p.K}, sizeof(T) == 8 ? ScalarType::Long : ScalarType::Int);
    torch::stable::zero_(top);
    Bits* bits = static_cast<Bits*>(top.mutable_data_ptr());
    const dim3 grid = grid_of(p.B * p.tiles());
    const int64_t shared = p.cams.count * int64_t(sizeof(Taps<T>));
    launch(call, maxima<T>, grid, Tile::block(), shared, p, bits);
    launch(call, labels<T>, grid, Tile::block(), shared, p, bits, T(foreground), T(background),
           uint8_t(ignore_index), result.mutable_data_ptr<uint8_t>());
  });
  return result;
}

}  // namespace

PSSL_REGISTER_CUDA(m) { m.impl("cam_regions", TORCH_BOX(&cam_regions_cuda)); }
