// cam_sweep on CUDA: a histogram [ground truth, best class, thresholds below the maximum] (identity 2).
//
//   prepare  sorts the thresholds, clears the counts
//   maxima   each class's maximum over its image, where CAMs are normalised
//   count    pixels of all images into the histogram: a block's in shared memory where that is large enough
//   finish   cumulative sums over the thresholds
//
// Images of any sizes share a launch: their views travel in its parameters. Counts are integers, so that the order of the
// atomics does not matter.
#include <algorithm>
#include <limits>

#include "cam_sweep.h"
#include "common/cuda_resize.cuh"
#include "common/ordered_bits.h"

namespace {

using namespace pssl;
using namespace pssl::PSSL_SIMD_NAMESPACE;

constexpr const char* kOp = "cam_sweep";
constexpr int kImages = 64;  // a launch
constexpr int kRows = 4;     // pixels of a thread
constexpr int kBlocks = 4;   // a processor, at most

using PixelTile = TallTile<kRows>;
template <class T>
using Taps = TileTaps<T, kRows>;

using Count = unsigned long long;  // the 64-bit type of CUDA's atomics

struct Image {
  AnyView<4> cams;   // [1,k,h,w]
  AnyView<1> ids;    // [k]
  AnyView<2> truth;  // [H,W]
  int64_t first_top;

  PSSL_HD int64_t classes() const { return cams.size[1]; }
  PSSL_HD int64_t tiles() const { return PixelTile::count(truth.size[0], truth.size[1]); }
  // the region number of a class, 0 where it is none
  __device__ int32_t region(int64_t j, int64_t C) const {
    const int64_t id = ids.integer(j);
    return id >= 1 && id < C ? int32_t(id) : 0;
  }
};

// A task is a block's: tiles of one image, that many before it hands its histogram on.
struct Batch {
  int count = 0;
  int64_t task_tiles, tasks = 0;
  int64_t first_task[kImages];
  Image image[kImages];
};

template <class T>
struct Sweep {
  const T* given;       // [T] thresholds
  T* ordered;           // [T] ascending, NaN as infinity
  int64_t* order;       // [T] where each of `ordered` stood
  OrderedBits<T>* top;  // [classes of all images] maxima; unused where nothing is divided
  int64_t tops;
  Count* histogram;  // [C,C,T+1]
  int64_t* out;      // [T,C,C]
  int64_t thresholds, C, ignore;
  bool normalize;

  PSSL_HD int64_t bins() const { return thresholds + 1; }
};

__device__ inline int64_t grid_thread() { return blockIdx.x * int64_t(blockDim.x) + threadIdx.x; }
__device__ inline int64_t grid_threads() { return gridDim.x * int64_t(blockDim.x); }

template <class T>
__device__ T threshold(const Sweep<T>& s, int64_t i) {
  const T t = s.given[i];
  return t != t ? std::numeric_limits<T>::infinity() : t;  // nothing is above NaN
}

template <class T>
__global__ void prepare(const __grid_constant__ Sweep<T> s) {
  const int64_t counts = s.C * s.C;
  for (int64_t i = grid_thread(); i < counts * s.bins(); i += grid_threads()) s.histogram[i] = 0;
  for (int64_t i = grid_thread(); i < counts * s.thresholds; i += grid_threads()) s.out[i] = 0;
  for (int64_t i = grid_thread(); i < s.tops; i += grid_threads()) s.top[i] = 0;
  for (int64_t i = grid_thread(); i < s.thresholds; i += grid_threads()) {
    const T own = threshold(s, i);
    int64_t rank = 0;
    for (int64_t j = 0; j < s.thresholds; ++j) {
      const T other = threshold(s, j);
      rank += other < own || (other == own && j < i);
    }
    s.ordered[rank] = own;
    s.order[rank] = i;
  }
}

// The image of this block's task.
__device__ inline int image_of(const Batch& batch) {
  int i = 0;
  while (i + 1 < batch.count && batch.first_task[i + 1] <= blockIdx.x) ++i;
  return i;
}

// f(tile) for the tiles of this block's task, by all its threads.
template <class T, class F>
__device__ void each_tile(const Batch& batch, int i, Taps<T>* taps, const F& f) {
  const Image& image = batch.image[i];
  const int64_t H = image.truth.size[0], W = image.truth.size[1];
  const int64_t first = (blockIdx.x - batch.first_task[i]) * batch.task_tiles;
  for (int64_t t = first; t < first + batch.task_tiles && t < image.tiles(); ++t) {
    const PixelTile tile = PixelTile::at(t, H, W);
    find_taps(tile, &image.cams, 1, taps);
    f(tile);
  }
}

template <class T>
__global__ void __launch_bounds__(Tile::kThreads)
    maxima(const __grid_constant__ Batch batch, const __grid_constant__ Sweep<T> s) {
  PSSL_SHARED(taps, Taps<T>);
  PSSL_SHARED(scratch, OrderedBits<T>[kWarp]);
  const int i = image_of(batch);
  const Image& image = batch.image[i];
  each_tile(batch, i, &taps, [&](const PixelTile& tile) {
    for (int64_t j = 0; j < image.classes(); ++j) {
      T value[kRows];
      resize_at_thread(image.cams, taps, 0, j, value);
      OrderedBits<T> own = 0;
#pragma unroll
      for (int r = 0; r < kRows; ++r)
        if (tile.inside(r)) own = Largest{}(own, ordered_bits(value[r]));
      own = block_largest(own, scratch);
      if (block_thread() == 0) atomicMax(s.top + image.first_top + j, own);
    }
  });
}

// f(label, slot, below): what this thread's pixels add to, for those whose label counts. slot: the best class in the
// image's list; below: thresholds below its value.
template <class T, class F>
__device__ void each_pixel(const Sweep<T>& s, const Image& image, const Taps<T>& taps, const PixelTile& tile,
                           const F& f) {
  int64_t label[kRows];
  int32_t region[kRows], slot[kRows], below[kRows];
  T best[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    label[r] = tile.inside(r) ? image.truth.integer(tile.y(r), tile.x()) : -1;
    best[r] = -std::numeric_limits<T>::infinity(), slot[r] = 0, region[r] = 0;
  }
  for (int32_t j = 0; j < image.classes(); ++j) {
    const int32_t number = image.region(j, s.C);
    if (number == 0) continue;
    T value[kRows];
    resize_at_thread(image.cams, taps, 0, j, value);
    const T divisor = s.normalize ? from_ordered_bits<T>(s.top[image.first_top + j]) + T(kMaximumEps) : T(1);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (s.normalize) value[r] /= divisor;
      // ties: the lowest region number
      if (beats(value[r], best[r]) || (value[r] == best[r] && number < region[r]))
        best[r] = value[r], slot[r] = j, region[r] = number;
    }
  }
  thresholds_below(s.ordered, int32_t(s.thresholds), best, below);
#pragma unroll
  for (int r = 0; r < kRows; ++r)
    if (label[r] >= 0 && label[r] < s.C && label[r] != s.ignore) f(label[r], slot[r], below[r]);
}

template <class T>
__device__ void add_to_all(const Sweep<T>& s, const Image& image, int64_t label, int64_t slot, int64_t below,
                           Count n) {
  const int64_t region = image.classes() ? image.region(slot, s.C) : 0;
  atomicAdd(s.histogram + (label * s.C + region) * s.bins() + below, n);
}

// kShared: a block counts for itself first, in [C, slots, bins] of its image.
template <class T, bool kShared>
__global__ void __launch_bounds__(Tile::kThreads, sizeof(T) == 4 ? kBlocks : 2)
    count(const __grid_constant__ Batch batch, const __grid_constant__ Sweep<T> s) {
  PSSL_SHARED(taps, Taps<T>);
  const int number = image_of(batch);
  const Image& image = batch.image[number];
  if constexpr (!kShared) {
    each_tile(batch, number, &taps, [&](const PixelTile& tile) {
      each_pixel(s, image, taps, tile, [&](int64_t label, int32_t slot, int32_t below) {
        add_to_all(s, image, label, slot, below, 1);
      });
    });
  } else {
    PSSL_DYNAMIC_SHARED(unsigned, histogram);
    const int bins = s.bins(), slots = image.classes() ? image.classes() : 1, size = s.C * slots * bins;
    for (int i = block_thread(); i < size; i += Tile::kThreads) histogram[i] = 0;  // find_taps has a barrier
    each_tile(batch, number, &taps, [&](const PixelTile& tile) {
      each_pixel(s, image, taps, tile, [&](int64_t label, int32_t slot, int32_t below) {
        atomicAdd(histogram + (int(label) * slots + slot) * bins + below, 1u);
      });
    });
    __syncthreads();
    for (int i = block_thread(); i < size; i += Tile::kThreads)
      if (histogram[i]) add_to_all(s, image, i / bins / slots, i / bins % slots, i % bins, histogram[i]);
  }
}

// A warp for each (ground truth, class). Pixels with at most j thresholds below them are background at threshold j.
template <class T>
__global__ void finish(const __grid_constant__ Sweep<T> s) {
  const int lane = threadIdx.x % kWarp;
  Count* background = reinterpret_cast<Count*>(s.out);
  for (int64_t pair = grid_thread() / kWarp; pair < s.C * s.C; pair += grid_threads() / kWarp) {
    const Count* bins = s.histogram + pair * s.bins();
    const int64_t label = pair / s.C, region = pair % s.C;
    Count all = 0;
    for (int64_t j = lane; j < s.bins(); j += kWarp) all += bins[j];
    all = warp_reduce(all, Plus{});
    Count before = 0;
    for (int64_t first = 0; first < s.thresholds; first += kWarp) {
      const int64_t j = first + lane;
      Count up_to = j < s.thresholds ? bins[j] : 0;  // this lane's and all below it
      for (int by = 1; by < kWarp; by *= 2) {
        const Count lower = __shfl_up_sync(kAllLanes, up_to, by);
        if (lane >= by) up_to += lower;
      }
      up_to += before;
      before = __shfl_sync(kAllLanes, up_to, kWarp - 1);
      if (j >= s.thresholds || all == 0) continue;
      const int64_t row = (s.order[j] * s.C + label) * s.C;
      atomicAdd(background + row, region == 0 ? all : up_to);
      if (region != 0) s.out[row + region] = int64_t(all - up_to);
    }
  }
}

// The images in as many launches as their number asks for, each of as many blocks as the device has room for.
template <class Launch>
void each_batch(const CudaCall& call, const std::vector<Image>& images, const Launch& launch_batch) {
  for (size_t first = 0; first < images.size(); first += kImages) {
    const size_t end = std::min(images.size(), first + kImages);
    int64_t tiles = 0;
    for (size_t i = first; i < end; ++i) tiles += images[i].tiles();
    Batch batch;
    const int64_t blocks = std::max<int64_t>(1, call.blocks_for(tiles, kBlocks));
    batch.task_tiles = (tiles + blocks - 1) / blocks;
    for (size_t i = first; i < end; ++i) {
      batch.image[batch.count] = images[i];
      batch.first_task[batch.count++] = batch.tasks;
      if (images[i].tiles()) batch.tasks += (images[i].tiles() + batch.task_tiles - 1) / batch.task_tiles;
    }
    launch_batch(batch);
  }
}

template <class T>
Tensor sweep(const CudaCall& call, const std::vector<Image>& images, const Tensor& thresholds, int64_t C,
             bool normalize, int64_t ignore) {
  const int64_t count_of = thresholds.numel(), bins = count_of + 1;
  int64_t slots = 1, tops = 0;
  for (const Image& image : images) slots = std::max(slots, image.classes()), tops += image.classes();
  STD_TORCH_CHECK(count_of < std::numeric_limits<int32_t>::max(), kOp, ": too many thresholds");
  const Tensor given = torch::stable::contiguous(thresholds);
  Tensor out = new_on_device(given, {count_of, C, C}, ScalarType::Long);
  Tensor ordered = new_on_device(given, {count_of}, scalar_type_of<T>);
  Tensor order = new_on_device(given, {count_of}, ScalarType::Long);
  Tensor top = new_on_device(given, {normalize ? tops : 0}, scalar_type_of<T>);
  Tensor histogram = new_on_device(given, {C, C, bins}, ScalarType::Long);
  const Sweep<T> s{given.const_data_ptr<T>(),
                   ordered.mutable_data_ptr<T>(),
                   order.mutable_data_ptr<int64_t>(),
                   static_cast<OrderedBits<T>*>(top.mutable_data_ptr()),
                   normalize ? tops : 0,
                   static_cast<Count*>(histogram.mutable_data_ptr()),
                   out.mutable_data_ptr<int64_t>(),
                   count_of,
                   C,
                   ignore,
                   normalize};
  launch(call, prepare<T>, grid_of(call.blocks_for((C * C * bins + 255) / 256, 8)), dim3(256), 0, s);
  const int64_t histogram_bytes = C * slots * bins * int64_t(sizeof(unsigned));
  const bool shared = histogram_bytes + int64_t(sizeof(Taps<T>)) <= call.limits.shared_bytes;
  each_batch(call, images, [&](const Batch& batch) {
    if (normalize) launch(call, maxima<T>, grid_of(batch.tasks), Tile::block(), 0, batch, s);
    if (shared) {
      launch(call, count<T, true>, grid_of(batch.tasks), Tile::block(), histogram_bytes, batch, s);
    } else {
      launch(call, count<T, false>, grid_of(batch.tasks), Tile::block(), 0, batch, s);
    }
  });
  launch(call, finish<T>, grid_of(call.blocks_for((C * C * kWarp + 255) / 256, 8)), dim3(256), 0, s);
  return out;
}

Tensor cam_sweep_cuda(const std::vector<Tensor>& cams, const std::vector<Tensor>& class_ids,
                      const std::vector<Tensor>& ground_truth, const Tensor& thresholds, int64_t num_regions,
                      bool normalize, int64_t ignore_index) {
  check_images(kOp, cams, class_ids, ground_truth, thresholds, num_regions);
  const CudaCall call(kOp, thresholds);
  std::vector<Image> images;
  int64_t tops = 0;
  for (size_t i = 0; i < cams.size(); ++i) {
    images.push_back(
        {one_image(cams[i]), AnyView<1>::of(class_ids[i]), AnyView<2>::of(ground_truth[i]), tops});
    tops += cams[i].size(0);
  }
  return with_accumulation({thresholds.scalar_type()}, [&](auto zero) {
    return sweep<decltype(zero)>(call, images, thresholds, num_regions, normalize, ignore_index);
  });
}

}  // namespace

PSSL_REGISTER_CUDA(m) { m.impl("cam_sweep", TORCH_BOX(&cam_sweep_cuda)); }
