// The gradient of cam_compare on CUDA. A present class's area is cut into parts, a block each: the gradients of all resized
// maps at the pixels that touch a part's cells, once, then for each cell the sum over its pixels. Other blocks write the
// zeros of absent classes meanwhile, which are most of what there is to write.
#pragma once

#include "cam_compare_cuda.cuh"

namespace pssl::PSSL_SIMD_NAMESPACE::compare {

// Pixels of a part of the gradient: those that touch the cells of a map of at least half the size are one tile.
constexpr int64_t kPartHeight = Tile::kHeight - 2, kPartWidth = Tile::kWidth - 4;
constexpr int64_t kPartBytes = 16 << 10;   // of the sums for its cells
constexpr int kWorkers = 2, kFillers = 1;  // blocks a processor, side by side: for present classes, for zeros
constexpr int64_t kPiece = 2048;           // zeros that a warp writes at a time

// What a part of the gradient has of a map.
struct Part {
  int64_t y, y_end, x, x_end;

  PSSL_HD int rows() const { return int(y_end - y); }
  PSSL_HD int columns() const { return int(x_end - x); }
};

// The gradients that are wanted. The area of a map is cut into parts along y and x, and the cells of all maps with it.
struct Gradients {
  int count = 0;
  int map[kMostMaps];  // its number in Problem::maps
  AnyView<4> grad[kMostMaps];
  int64_t pieces[kMostMaps];                 // of zeros, a plane
  int64_t first_piece[kMostMaps + 1] = {0};  // of all planes
  int64_t parts_y, parts_x, cells;           // cells: the most of a part
  int64_t workers;                           // blocks for present classes; the others write zeros
  AnyView<2> of_sums;                        // [B,K]; null where the loss has none

  PSSL_HD int64_t parts() const { return parts_y * parts_x; }
  PSSL_HD Part part(int i, int64_t index) const {
    const int64_t y = index / parts_x, x = index % parts_x, h = grad[i].size[2], w = grad[i].size[3];
    return {y * h / parts_y, (y + 1) * h / parts_y, x * w / parts_x, (x + 1) * w / parts_x};
  }
  void add(int number, const AnyView<4>& view, int64_t pairs) {
    map[count] = number, grad[count] = view;
    pieces[count] = (view.size[2] * view.size[3] + kPiece - 1) / kPiece;
    first_piece[count + 1] = first_piece[count] + pairs * pieces[count];
    ++count;
  }
  // Parts of about a tile of pixels, more where maps have so many cells that their sums would not fit.
  void cut(int64_t H, int64_t W, int64_t bytes) {
    int64_t h = 1, w = 1;
    for (int i = 0; i < count; ++i) h = std::max(h, grad[i].size[2]), w = std::max(w, grad[i].size[3]);
    parts_y = std::min(h, (H + kPartHeight - 1) / kPartHeight);
    parts_x = std::min(w, (W + kPartWidth - 1) / kPartWidth);
    for (;;) {
      int64_t height = 1, width = 1;
      cells = 0;
      for (int i = 0; i < count; ++i) {
        const int64_t rows = (grad[i].size[2] + parts_y - 1) / parts_y;
        const int64_t columns = (grad[i].size[3] + parts_x - 1) / parts_x;
        cells += rows * columns, height = std::max(height, rows), width = std::max(width, columns);
      }
      if (cells * bytes <= kPartBytes || height * width == 1) return;
      (height > 1 ? parts_y : parts_x) *= 2;
    }
  }
};

// What a block knows of its part.
struct Region {
  int64_t begin[2], end[2];    // of the pixels that touch its cells, along y and x
  Part part[kMostMaps];        // of each map that is wanted
  double ratio[2][kMostMaps];  // pixels a cell
};

// By a warp for each axis, a lane for each map.
__device__ inline void find_region(const Problem& p, const Gradients& g, int64_t index, Region& region) {
  const int axis = block_thread() / kWarp, i = block_thread() % kWarp;
  if (axis < 2) {
    const int64_t size = axis ? p.W : p.H;
    int64_t from_end = 0, end = 0;  // maxima, both
    if (i < g.count) {
      const Part part = g.part(i, index);
      const int64_t first = axis ? part.x : part.y, last = axis ? part.x_end : part.y_end;
      const int64_t in_size = g.grad[i].size[2 + axis];
      if (first < last) {
        from_end = size - first_output(first - 1, in_size, size, false);
        end = first_output(last, in_size, size, false);
      }
      region.ratio[axis][i] = double(size) / double(in_size);
      if (axis == 0) region.part[i] = part;
    }
    from_end = warp_reduce(from_end, Largest{}), end = warp_reduce(end, Largest{});
    if (i == 0) {  // where no pixel touches them, any: there are zeros to write
      const int64_t begin = std::min(size - from_end, size - 1);
      region.begin[axis] = begin, region.end[axis] = std::max(end, begin + 1);
    }
  }
  __syncthreads();
}

// d loss / d resized map at this thread's pixel, in the place of its values
template <class T>
__device__ void pixel_gradients(const Problem& p, const Scratch<T>& scratch, const T* share, T grad) {
  unsigned cut = 0;  // main maps that relu cut off here
  for (int s = 0; s < p.mains; ++s) {
    const T value = magnitude_gradient(scratch.difference(p, share, s), grad);
    if (relu_gradient(scratch.own(s), T(1)) == T(0)) cut |= 1u << s;
    scratch.own(s) = value;
  }
  for (int t = 0; t < p.supports(); ++t) {
    T sum = 0;
    for (int s = 0; s < p.mains; ++s) sum -= share[s * p.supports() + t] * scratch.own(s);
    scratch.own(p.mains + t) = relu_gradient(scratch.own(p.mains + t), sum);
  }
  for (int s = 0; s < p.mains; ++s)
    if (cut >> s & 1) scratch.own(s) = 0;
}

// Where in a tile the pixels that touch a cell can begin, at the earliest.
__device__ inline int first_touch(int64_t cell, double ratio, int64_t tile) {
  const int64_t first = int64_t((double(cell) - 0.5) * ratio + 0.499) - tile;  // up to 0.001 for rounding
  return first > 0 ? int(first) : 0;
}

// The weight of a cell in a pixel.
template <class T>
__device__ T weight_of(const Tap<T>& tap, int64_t cell) {
  return tap.index == cell ? T(1) - tap.fraction : tap.index == cell - 1 ? tap.fraction : T(0);
}

// The sum of pixel · weight over the pixels of a tile that touch a cell, the first of them no earlier than given.
template <class T>
__device__ T gather(const TileTaps<T>& taps, const T* pixels, int64_t cy, int64_t cx, int first_y,
                    int first_x, int rows, int columns) {
  T sum = 0;
  for (int y = first_y; y < rows && taps.y[y].index <= cy; ++y) {
    const T wy = weight_of(taps.y[y], cy);
    if (wy == T(0)) continue;
    for (int x = first_x; x < columns && taps.x[x].index <= cx; ++x) {
      const T weight = wy * weight_of(taps.x[x], cx);
      if (weight != T(0)) sum += weight * pixels[y * Tile::kWidth + x];  // 0 times NaN is not 0
    }
  }
  return sum;
}

// The gradients of a part of a pair, from one tile after another of the pixels that touch it.
template <class T>
__device__ void part_gradients(const Problem& p, const Gradients& g, const Scratch<T>& scratch,
                               const T* share, T* sums, int64_t pair, int64_t index) {
  PSSL_SHARED(region, Region);
  find_region(p, g, index, region);
  const int64_t b = pair / p.K, k = pair % p.K;
  const T grad = g.of_sums.floating<T>(b, k);
  for (int64_t y0 = region.begin[0]; y0 < region.end[0]; y0 += Tile::kHeight)
    for (int64_t x0 = region.begin[1]; x0 < region.end[1]; x0 += Tile::kWidth) {
      const bool first = y0 == region.begin[0] && x0 == region.begin[1];
      const bool last = y0 + Tile::kHeight >= region.end[0] && x0 + Tile::kWidth >= region.end[1];
      const int rows = std::min<int64_t>(Tile::kHeight, p.H - y0);
      const int columns = std::min<int64_t>(Tile::kWidth, p.W - x0);
      scratch.read(p, pair, Tile{y0, x0, p.H, p.W});
      pixel_gradients(p, scratch, share, grad);
      __syncthreads();  // the next tile's taps begin with another
      T* sum = sums;    // of the map's cells, each a thread's own
      for (int i = 0; i < g.count; ++i) {
        const Part part = region.part[i];
        const int across = part.columns(), cells = part.rows() * across;
        const T* pixels = scratch.values + g.map[i] * Tile::kThreads;
        for (int c = block_thread(); c < cells; c += Tile::kThreads) {
          const int64_t cy = part.y + c / across, cx = part.x + c % across;
          T value = gather(scratch.taps[g.map[i]], pixels, cy, cx, first_touch(cy, region.ratio[0][i], y0),
                           first_touch(cx, region.ratio[1][i], x0), rows, columns);
          if (!first) value += sum[c];
          if (last) {
            g.grad[i].store(value, b, k, cy, cx);
          } else {
            sum[c] = value;
          }
        }
        sum += cells;
      }
    }
}

// Zeros for the elements [first, end) of a plane of a gradient, by a warp.
__device__ inline void write_zeros(const AnyView<4>& out, int64_t b, int64_t k, int64_t first, int64_t end) {
  const int lane = block_thread() % kWarp;
  const int64_t w = out.size[3];
  if (out.stride[3] != 1 || out.stride[2] != w) {
    for (int64_t i = first + lane; i < end; i += kWarp) out.store(0.0f, b, k, i / w, i % w);
    return;
  }
  const int64_t bytes = with_elements(out.data, out.type, [](const auto* at) { return int64_t(sizeof *at); });
  unsigned char* at = static_cast<unsigned char*>(out.data) + (out.offset(b, k, 0, 0) + first) * bytes;
  int64_t left = (end - first) * bytes;
  const int head = std::min<int64_t>(-reinterpret_cast<intptr_t>(at) & 15, left);
  if (lane < head) at[lane] = 0;
  at += head, left -= head;
  for (int64_t i = lane; i < left / 16; i += kWarp) reinterpret_cast<uint4*>(at)[i] = make_uint4(0, 0, 0, 0);
  if (lane < left % 16) at[left / 16 * 16 + lane] = 0;
}

// Zeros for the classes without a gradient, shared among `warps` warps of which this is number `warp`.
__device__ inline void write_absent(const Problem& p, const Gradients& g, int64_t warp, int64_t warps) {
  for (int64_t piece = warp; piece < g.first_piece[g.count]; piece += warps) {
    int i = 0;
    while (g.first_piece[i + 1] <= piece) ++i;
    const int64_t task = piece - g.first_piece[i], pair = task / g.pieces[i];
    const int64_t first = task % g.pieces[i] * kPiece, cells = g.grad[i].size[2] * g.grad[i].size[3];
    if (!g.of_sums.data || !p.present(pair))
      write_zeros(g.grad[i], pair / p.K, pair % p.K, first, std::min(first + kPiece, cells));
  }
}

template <class T>
__global__ void __launch_bounds__(Tile::kThreads, sizeof(T) == 4 ? kWorkers + kFillers : 2)
    gradient(const __grid_constant__ Problem p, const __grid_constant__ Gradients g, const double* partial) {
  if (blockIdx.x >= g.workers) {
    constexpr int kWarps = Tile::kThreads / kWarp;
    return write_absent(p, g, (blockIdx.x - g.workers) * kWarps + block_thread() / kWarp,
                        (gridDim.x - g.workers) * kWarps);
  }
  PSSL_DYNAMIC_SHARED(unsigned char, memory);
  const Scratch<T> scratch(memory, p);
  T *share = scratch.more, *sums = share + p.mains * p.supports();
  each_present(p, g.parts(), blockIdx.x, g.workers, [&](int64_t pair, int64_t part) {
    find_share(p, scratch, partial, pair, share);
    part_gradients(p, g, scratch, share, sums, pair, part);
  });
}

}  // namespace pssl::PSSL_SIMD_NAMESPACE::compare
