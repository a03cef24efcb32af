// Filtering the pixels of an image on a permutohedral lattice on the device: splat, blur along d+1 directions, slice.
//
// A corner is a vertex of a pixel's simplex, d+1 a pixel. The corners are sorted by the keys of their vertices; equal
// keys are one vertex, and those of a vertex are its corners in the order of the pixels. Splatting is a sum along that
// order, in parts of at most kPart corners, then over the parts of a vertex: a vertex of many pixels keeps no thread
// waiting, and nothing is added in an order that is not fixed. The host never asks for the number of vertices: memory is
// for as many as there are corners. Values lie in rows of packs, a row a pixel, part or vertex; the last pack of a row is
// filled up.
#pragma once

#include "common/cuda_four.cuh"
#include "common/cuda_sort.cuh"
#include "common/cuda_views.cuh"
#include "dense_crf.h"

namespace pssl::PSSL_SIMD_NAMESPACE {

using VertexKey = unsigned long long;  // the lowest bits of a key of LatticeMap

constexpr int64_t kPart = 64;          // corners
constexpr int kLatticeThreads = 128;   // a block
constexpr int64_t kLatticeWaves = 16;  // of blocks
constexpr int64_t kRowsAThread = 8;    // of the bound, at least: vertices are a fraction of the corners
constexpr int kCornersTogether = 8;    // whose loads a thread has under way

// A block takes rows of so many columns, neighbouring columns in neighbouring threads.
inline dim3 row_block(int64_t columns) {
  const unsigned across = unsigned(columns < kWarp ? columns : kWarp);
  return dim3(across, kLatticeThreads / across);
}
// Blocks for rows of which there are at most `bound`.
struct RowLaunch {
  dim3 grid, block;

  RowLaunch(const CudaCall& call, int64_t bound, int64_t columns) : block(row_block(columns)) {
    const int64_t rows = block.y * kRowsAThread;
    grid = grid_of(call.blocks_for((bound + rows - 1) / rows, kLatticeWaves));
  }
};
__device__ inline int64_t first_row() { return blockIdx.x * int64_t(blockDim.y) + threadIdx.y; }
__device__ inline int64_t row_stride() { return gridDim.x * int64_t(blockDim.y); }

template <class T, int d>
struct LatticeView {
  static constexpr int kCorners = d + 1;

  int64_t corners;        // of all pixels
  const int32_t* found;   // vertices, then parts: how many
  const int32_t* entry;   // [corners] the corners in the order of their vertices
  int32_t* part_begin;    // [parts+1]
  int32_t* first_part;    // [vertices+1]
  int32_t* vertex;        // [corners]
  T* weight;              // [corners]
  int32_t* neighbour;     // [2(d+1)][corners], -1 where there is none
  const Four<T>* values;  // [vertices][packs] after filtering

  // pack c of the filtered values at a pixel
  __device__ Four<T> slice(int64_t pixel, int64_t packs, int64_t c) const {
    Four<T> sum = {};
#pragma unroll
    for (int k = 0; k < kCorners; ++k)
      sum += weight[pixel * kCorners + k] * load_pack(values + vertex[pixel * kCorners + k] * packs + c);
    return sum;
  }
};

template <class T, int d>
__global__ void __launch_bounds__(kLatticeThreads)
    find_corners(const __grid_constant__ LatticeMap<d> map, PixelFeatures<d> features, VertexKey mask,
                 const __grid_constant__ View<const uint8_t, 4> images, int64_t b, VertexKey* keys,
                 T* weights) {
  const int64_t H = images.size[2], W = images.size[3];
  const int64_t pixel = blockIdx.x * int64_t(blockDim.x) + threadIdx.x, y = pixel / W, x = pixel % W;
  if (pixel >= H * W) return;
  double feature[d];
  features.at(y, x, [&](int k) { return images(b, k, y, x); }, feature);
  const Simplex<d> simplex = find_simplex<d>(map, feature);
  for (int k = 0; k <= d; ++k) {
    keys[pixel * (d + 1) + k] = VertexKey(simplex.key[k]) & mask;
    weights[pixel * (d + 1) + k] = T(simplex.weight[k]);
  }
}

// f(i, whether it begins a vertex, or a part) for this thread's share of the sorted keys.
template <class Key, class F>
__device__ void each_sorted(const Key* keys, int64_t count, const F& f) {
  const int64_t first = (blockIdx.x * int64_t(kSortThreads) + block_thread()) * kSortRounds;
  for (int64_t i = first; i < first + kSortRounds && i < count; ++i) {
    const bool begins = i == 0 || keys[i] != keys[i - 1];
    f(i, begins, begins || i % kPart == 0);
  }
}

// counts [blocks][2]: the vertices and the parts that begin in each block's keys.
template <class Key>
__global__ void __launch_bounds__(kSortThreads)
    count_vertices(const Key* keys, int64_t count, int32_t* counts) {
  PSSL_SHARED(scratch, int32_t[kWarp]);
  int32_t vertices = 0, parts = 0;
  each_sorted(keys, count, [&](int64_t, bool vertex, bool part) { vertices += vertex, parts += part; });
  vertices = block_sum(vertices, &scratch[0]);
  parts = block_sum(parts, &scratch[0]);
  if (block_thread() == 0) counts[2 * blockIdx.x] = vertices, counts[2 * blockIdx.x + 1] = parts;
}

// `before` [blocks][2]: what begins before each block's keys.
template <class T, int d>
__global__ void __launch_bounds__(kSortThreads)
    number_vertices(const VertexKey* keys, const int32_t* before, LatticeView<T, d> lattice,
                    VertexKey* vertex_keys) {
  PSSL_SHARED(scratch, int32_t[kWarp]);
  int32_t vertices = 0, parts = 0, all;
  each_sorted(keys, lattice.corners,
              [&](int64_t, bool vertex, bool part) { vertices += vertex, parts += part; });
  int32_t next_vertex = before[2 * blockIdx.x] + block_sum_before(vertices, &scratch[0], all);
  int32_t next_part = before[2 * blockIdx.x + 1] + block_sum_before(parts, &scratch[0], all);
  each_sorted(keys, lattice.corners, [&](int64_t i, bool vertex, bool part) {
    if (vertex) {
      vertex_keys[next_vertex] = keys[i];
      lattice.first_part[next_vertex++] = next_part;
    }
    if (part) lattice.part_begin[next_part++] = int32_t(i);
    lattice.vertex[lattice.entry[i]] = next_vertex - 1;
  });
  if (blockIdx.x == 0 && block_thread() == 0) {
    lattice.first_part[lattice.found[0]] = lattice.found[1];
    lattice.part_begin[lattice.found[1]] = int32_t(lattice.corners);
  }
}

// A column for each direction and side of it: 2j ahead, 2j + 1 behind.
template <class T, int d>
__global__ void __launch_bounds__(kLatticeThreads)
    find_neighbours(const __grid_constant__ LatticeMap<d> map, VertexKey mask, const VertexKey* vertex_keys,
                    LatticeView<T, d> lattice) {
  const int32_t vertices = lattice.found[0];
  const int which = threadIdx.x;
  const int64_t step = which % 2 == 0 ? map.step(which / 2) : -map.step(which / 2);
  for (int64_t v = first_row(); v < vertices; v += row_stride()) {
    const VertexKey key = (vertex_keys[v] + VertexKey(step)) & mask;
    int32_t begin = 0, end = vertices;
    while (begin < end) {
      const int32_t middle = begin + (end - begin) / 2;
      if (vertex_keys[middle] < key) {
        begin = middle + 1;
      } else {
        end = middle;
      }
    }
    const bool there = begin < vertices && vertex_keys[begin] == key;
    lattice.neighbour[which * lattice.corners + v] = there ? begin : -1;
  }
}

// out [parts][packs]: each part's weights times the values q [pixels][packs] (null: 1).
template <class T, int d>
__global__ void __launch_bounds__(kLatticeThreads)
    splat_parts(LatticeView<T, d> lattice, const Four<T>* q, int64_t packs, Four<T>* out) {
  const int32_t parts = lattice.found[1];
  for (int64_t part = first_row(); part < parts; part += row_stride()) {
    const int32_t begin = lattice.part_begin[part], end = lattice.part_begin[part + 1];
    for (int64_t c = threadIdx.x; c < packs; c += blockDim.x) {
      Four<T> sum = {};
      for (int32_t first = begin; first < end; first += kCornersTogether) {
        T weight[kCornersTogether];
        Four<T> value[kCornersTogether];
#pragma unroll
        for (int i = 0; i < kCornersTogether; ++i) {
          const int32_t corner = lattice.entry[first + i < end ? first + i : begin];
          weight[i] = lattice.weight[corner];
          value[i] = q ? load_pack(q + corner / (d + 1) * packs + c) : Four<T>{1, 1, 1, 1};
        }
#pragma unroll
        for (int i = 0; i < kCornersTogether; ++i)
          if (first + i < end) sum += weight[i] * value[i];
      }
      store_pack(out + part * packs + c, sum);
    }
  }
}

// out [vertices][packs]: the sums of each vertex's parts.
template <class T>
__global__ void __launch_bounds__(kLatticeThreads)
    sum_parts(const int32_t* found, const int32_t* first_part, const Four<T>* parts, int64_t packs,
              Four<T>* out) {
  const int32_t vertices = found[0];
  for (int64_t v = first_row(); v < vertices; v += row_stride()) {
    const int32_t begin = first_part[v], end = first_part[v + 1];
    for (int64_t c = threadIdx.x; c < packs; c += blockDim.x) {
      Four<T> sum = load_pack(parts + begin * packs + c);
      for (int32_t i = begin + 1; i < end; ++i) sum += load_pack(parts + i * packs + c);
      store_pack(out + v * packs + c, sum);
    }
  }
}

// Neighbours are brought while the last kernel still runs.
template <class T>
__global__ void __launch_bounds__(kLatticeThreads)
    blur(const int32_t* found, const int32_t* ahead, const int32_t* behind, const Four<T>* from,
         int64_t packs, Four<T>* to) {
  let_next_kernel_begin();
  const int32_t vertices = found[0];
  int64_t v = first_row(), a = -1, b = -1;
  auto take_neighbours = [&] {
    if (v < vertices) a = ahead[v], b = behind[v];
  };
  take_neighbours();
  wait_for_last_kernel();
  for (; v < vertices; v += row_stride(), take_neighbours())
    for (int64_t c = threadIdx.x; c < packs; c += blockDim.x) {
      const Four<T> none = {};
      const Four<T> sum =
          (b < 0 ? none : load_pack(from + b * packs + c)) + (a < 0 ? none : load_pack(from + a * packs + c));
      store_pack(to + v * packs + c, lattice_blur<T>(load_pack(from + v * packs + c), sum));
    }
}

// The weights in splat and slice times D^-1/2, D the answer to ones.
template <class T, int d>
__global__ void __launch_bounds__(kLatticeThreads) normalise(LatticeView<T, d> lattice) {
  const int64_t pixel = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
  if (pixel >= lattice.corners / (d + 1)) return;
  const T scale = T(1) / std::sqrt(lattice.slice(pixel, 1, 0).v[0]);
  for (int k = 0; k <= d; ++k) lattice.weight[pixel * (d + 1) + k] *= scale;
}

// The kernel D^-1/2 S^T B S D^-1/2 of image b, and its values on the vertices.
template <class T, int d>
class DeviceLattice {
 public:
  // Packs of `scratch`, which lattices may share.
  static int64_t room(int64_t pixels, int64_t packs) { return pixels * (d + 1) * packs; }

  DeviceLattice(const CudaCall& call, const LatticeMap<d>& map, const PixelFeatures<d>& features,
                const Tensor& images, int64_t b, int64_t packs, Four<T>* scratch)
      : call_(call), sorter_(images, images.size(2) * images.size(3) * (d + 1)), scratch_(scratch) {
    const int64_t n = sorter_.count();
    numbers_ = new_on_device(images, {(3 + 2 * (d + 1)) * n + 2}, ScalarType::Int);
    weights_ = new_on_device(images, {n}, scalar_type_of<T>);
    values_ = new_on_device(images, {n * packs * kFour}, scalar_type_of<T>);
    view_.corners = n;
    view_.weight = weights_.mutable_data_ptr<T>();
    view_.values = packs_in<T>(values_);
    view_.vertex = numbers_.mutable_data_ptr<int32_t>();
    view_.neighbour = view_.vertex + n;
    view_.part_begin = view_.neighbour + 2 * (d + 1) * n;
    view_.first_part = view_.part_begin + n + 1;
    const int bits = map.key_bits();
    const VertexKey mask = (VertexKey(1) << bits) - 1;
    launch(call, find_corners<T, d>, by_pixel(), dim3(kLatticeThreads), 0, map, features, mask,
           View<const uint8_t, 4>::of(images), b, sorter_.now().keys, view_.weight);
    sorter_.sort(call, bits);
    view_.found = sorter_.totals();
    view_.entry = sorter_.now().entries;
    const VertexKey* keys = sorter_.now().keys;
    VertexKey* vertex_keys = sorter_.other().keys;  // free after the sort
    const dim3 by_key = grid_of(sorter_.blocks()), threads(kSortThreads);
    launch(call, count_vertices<VertexKey>, by_key, threads, 0, keys, n, sorter_.counts());
    sorter_.sum(call, 2);
    launch(call, number_vertices<T, d>, by_key, threads, 0, keys, sorter_.counts(), view_, vertex_keys);
    const RowLaunch rows(call, n, 2 * (d + 1));
    launch(call, find_neighbours<T, d>, rows.grid, rows.block, 0, map, mask, vertex_keys, view_);
    filter(nullptr, 1);
    launch(call, normalise<T, d>, by_pixel(), dim3(kLatticeThreads), 0, view_);
  }

  const LatticeView<T, d>& view() const { return view_; }

  // view().values from q [pixels][packs] (null: 1)
  void filter(const Four<T>* q, int64_t packs) {
    Four<T>*from = scratch_, *to = packs_in<T>(values_);
    if ((d + 1) % 2 != 0) std::swap(from, to);  // so that the last blur ends in the values
    const RowLaunch rows(call_, view_.corners, packs);
    launch(call_, splat_parts<T, d>, rows.grid, rows.block, 0, view_, q, packs, from);
    launch(call_, sum_parts<T>, rows.grid, rows.block, 0, view_.found, view_.first_part, from, packs, to);
    for (int j = 0; j <= d; ++j) {
      std::swap(from, to);
      const int32_t* ahead = view_.neighbour + 2 * j * view_.corners;
      launch_early(call_, early_, blur<T>, rows.grid, rows.block, view_.found, ahead, ahead + view_.corners,
                   from, packs, to);
    }
  }

 private:
  dim3 by_pixel() const { return grid_of((view_.corners / (d + 1) + kLatticeThreads - 1) / kLatticeThreads); }

  const CudaCall& call_;
  const bool early_ = can_begin_early(blur<T>);
  Sorter<VertexKey> sorter_;
  Four<T>* scratch_;
  Tensor numbers_, weights_, values_;
  LatticeView<T, d> view_;
};

}  // namespace pssl::PSSL_SIMD_NAMESPACE
