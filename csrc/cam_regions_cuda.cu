// cam_regions on CUDA: a pass for each present class's maximum over its image, a pass for the labels. Both resize and add
// up the scales per pixel; no resized map exists, and absent classes are not read. Maxima meet in integer atomics.
#include "cam_regions.h"
#include "common/cuda_resize.cuh"
#include "common/ordered_bits.h"

namespace {

using namespace pssl;
using namespace pssl::PSSL_SIMD_NAMESPACE;

constexpr const char* kOp = "cam_regions";

struct Problem {
  MapList cams;
  AnyView<2> labels;  // [B,K]
  int64_t B, K, H, W;

  PSSL_HD int64_t tiles() const { return Tile::count(H, W); }  // of one image
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

// The sum over scales of relu(resized map) at this thread's pixel.
template <class T>
__device__ T sum_of_scales(const Problem& p, const TileTaps<T>* taps, int64_t b, int64_t k) {
  T sum = relu(resized_at_thread(p.cams.map[0], taps[0], b, k));
  for (int i = 1; i < p.cams.count; ++i) sum += relu(resized_at_thread(p.cams.map[i], taps[i], b, k));
  return sum;
}

// top[b,k] = the maximum of every present class over its image, as ordered bits; 0 before.
template <class T>
__global__ void __launch_bounds__(Tile::kThreads)
    maxima(const __grid_constant__ Problem p, OrderedBits<T>* top) {
  PSSL_DYNAMIC_SHARED(TileTaps<T>, taps);
  PSSL_SHARED(present, Present);
  PSSL_SHARED(scratch, OrderedBits<T>[kWarp]);
  const int64_t b = blockIdx.x / p.tiles();
  const Tile tile = Tile::at(blockIdx.x % p.tiles(), p.H, p.W);
  find_present(p, b, present);
  find_taps(tile, p.cams.map, p.cams.count, taps);
  for (int i = 0; i < present.count; ++i) {
    const int64_t k = present.list[i];
    OrderedBits<T> own = 0;
    if (tile.inside()) own = ordered_bits(sum_of_scales(p, taps, b, k));
    own = block_largest(own, scratch);
    if (block_thread() == 0) atomicMax(top + b * p.K + k, own);
  }
}

template <class T>
__global__ void __launch_bounds__(Tile::kThreads)
    labels(const __grid_constant__ Problem p, const OrderedBits<T>* top, T foreground, T background,
           uint8_t ignore, uint8_t* out) {
  PSSL_DYNAMIC_SHARED(TileTaps<T>, taps);
  PSSL_SHARED(present, Present);
  const int64_t b = blockIdx.x / p.tiles();
  const Tile tile = Tile::at(blockIdx.x % p.tiles(), p.H, p.W);
  find_present(p, b, present);
  find_taps(tile, p.cams.map, p.cams.count, taps);
  if (!tile.inside()) return;
  T best = T(-1);  // no class: below every sensible threshold
  int32_t index = 0;
  for (int i = 0; i < present.count; ++i) {
    const int32_t k = present.list[i];
    const T divisor = from_ordered_bits<T>(top[b * p.K + k]) + T(kMaximumEps);
    const T value = sum_of_scales(p, taps, b, k) / divisor;
    if (beats(value, best)) best = value, index = k;
  }
  out[(b * p.H + tile.y()) * p.W + tile.x()] = region_label(best, index, foreground, background, ignore);
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
    const int64_t shared = p.cams.count * int64_t(sizeof(TileTaps<T>));
    launch(call, maxima<T>, grid, Tile::block(), shared, p, bits);
    launch(call, labels<T>, grid, Tile::block(), shared, p, bits, T(foreground), T(background),
           uint8_t(ignore_index), result.mutable_data_ptr<uint8_t>());
  });
  return result;
}

}  // namespace

PSSL_REGISTER_CUDA(m) { m.impl("cam_regions", TORCH_BOX(&cam_regions_cuda)); }
