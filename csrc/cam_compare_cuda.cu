// cam_compare on CUDA. The pixels of a present class of an image are cut into chunks, a block each; the maps are resized
// where they are needed, so that no resized map exists. Absent classes are not read.
//
//   products  <M_s,S_t>, |M_s|^2 and |S_t|^2 of each chunk: what the attention is made of
//   loss      sums of |M_s - target_s| of each chunk; the chunk that comes last adds them up, in their order
//   gradient  a block for a part of the class's area, gathering for the cells of all maps there over the pixels that
//             touch them. Other blocks meanwhile write the zeros of absent classes: most of what there is to write
//
// Forward and backward are two launches each. Nothing is added in an order that is not fixed.
#include <algorithm>
#include <tuple>

#include "cam_compare.h"
#include "common/cuda_resize.cuh"

namespace {

using namespace pssl;
using namespace pssl::PSSL_SIMD_NAMESPACE;

constexpr const char* kOp = "cam_compare";
constexpr int64_t kMostChunks = kWarp;  // a lane each where they are added up
constexpr int kMapsAtOnce = 4;          // whose loading is on its way together
constexpr int kBlocks = 4;              // a processor, for what blocks share among them

// Pixels of a part of the gradient: those that touch the cells of a map of at least half the size are one tile.
constexpr int64_t kPartHeight = Tile::kHeight - 2, kPartWidth = Tile::kWidth - 4;
constexpr int64_t kPartBytes = 16 << 10;  // of the sums for its cells
constexpr int64_t kPiece = 2048;          // zeros that a warp writes at a time

using PixelTile = TallTile<1>;

struct Problem {
  MapList maps;  // the main maps, then the support maps
  int mains;
  AnyView<2> labels;  // [B,K]
  int64_t B, K, H, W;
  bool cosine;

  PSSL_HD int supports() const { return maps.count - mains; }
  PSSL_HD int quantities() const { return maps.count + mains * supports(); }
  PSSL_HD int64_t pairs() const { return B * K; }
  PSSL_HD int64_t tiles() const { return PixelTile::count(H, W); }
  // of a pair; by its size alone, so that sums do not depend on the device
  PSSL_HD int64_t chunks() const { return tiles() < kMostChunks ? tiles() : kMostChunks; }
  PSSL_HD bool present(int64_t pair) const { return labels.truth(pair / K, pair % K); }
};

// A block's shared memory.
template <class T>
struct Scratch {
  double* totals;     // [quantities] of a pair
  TileTaps<T>* taps;  // [maps]
  T* values;          // [maps][threads] the cut maps at the tile's pixels
  T* more;            // what the kernel wants beside

  static int64_t bytes(const Problem& p, int64_t more) {
    return p.quantities() * int64_t(sizeof(double)) +
           p.maps.count * int64_t(sizeof(TileTaps<T>) + Tile::kThreads * sizeof(T)) +
           more * int64_t(sizeof(T));
  }
  __device__ Scratch(void* memory, const Problem& p)
      : totals(static_cast<double*>(memory)),
        taps(reinterpret_cast<TileTaps<T>*>(totals + p.quantities())),
        values(reinterpret_cast<T*>(taps + p.maps.count)),
        more(values + p.maps.count * Tile::kThreads) {}
  // map i at this thread's pixel
  __device__ T& own(int i) const { return values[i * Tile::kThreads + block_thread()]; }

  // The maps of a pair at the tile's pixels, 0 outside. Others' values are there after a barrier.
  __device__ void read(const Problem& p, int64_t pair, const PixelTile& tile) const {
    find_taps(tile, p.maps.map, p.maps.count, taps);
    const int64_t b = pair / p.K, k = pair % p.K;
    for (int first = 0; first < p.maps.count; first += kMapsAtOnce) {
      Cells<T> cells[kMapsAtOnce];
#pragma unroll
      for (int j = 0; j < kMapsAtOnce; ++j) {
        const int i = first + j;
        if (i >= p.maps.count) break;
        const TileTaps<T>& at = taps[i];
        cells[j].load(p.maps.map[i], p.maps.map[i].offset(b, k, 0, 0), at.y[threadIdx.y].index,
                      at.x[threadIdx.x].index, at.same);
      }
#pragma unroll
      for (int j = 0; j < kMapsAtOnce; ++j) {
        const int i = first + j;
        if (i >= p.maps.count) break;
        const TileTaps<T>& at = taps[i];
        const T value = cells[j].blend(at.y[threadIdx.y].fraction, at.x[threadIdx.x].fraction, at.same);
        own(i) = tile.inside(0) ? relu(value) : T(0);
      }
    }
  }
  // M_s - target_s at this thread's pixel
  __device__ T difference(const Problem& p, const T* share, int s) const {
    T target = 0;
    for (int t = 0; t < p.supports(); ++t) target += share[s * p.supports() + t] * own(p.mains + t);
    return own(s) - target;
  }
};

// f(pair, part) for the parts of all present pairs, `parts` each, shared among `blocks` blocks of which this is number
// `block`; by all threads.
template <class F>
__device__ void each_present(const Problem& p, int64_t parts, int64_t block, int64_t blocks, const F& f) {
  PSSL_SHARED(scratch, int64_t[kWarp]);
  PSSL_SHARED(found, int64_t);
  const int64_t each = (p.pairs() + Tile::kThreads - 1) / Tile::kThreads;
  const int64_t first = block_thread() * each, end = std::min(first + each, p.pairs());
  int64_t own = 0, all;
  for (int64_t pair = first; pair < end; ++pair) own += p.present(pair);
  const int64_t before = block_sum_before(own, scratch, all);
  for (int64_t task = block; task < all * parts; task += blocks) {
    int64_t n = task / parts - before;  // of this thread's present pairs
    if (n >= 0 && n < own) {
      int64_t pair = first;
      while (!p.present(pair) || n-- > 0) ++pair;
      found = pair;
    }
    __syncthreads();
    f(found, task % parts);
    __syncthreads();
  }
}

// partial[pair, q, chunk] of the chunk's pixels: the squares of the maps, then the products [mains, supports].
template <class T>
__global__ void __launch_bounds__(Tile::kThreads)
    products(const __grid_constant__ Problem p, double* partial, int32_t* arrived) {
  PSSL_DYNAMIC_SHARED(unsigned char, memory);
  const Scratch<T> scratch(memory, p);
  T* sums = scratch.more;  // [quantities][lanes], each written by one thread
  for (int64_t i = blockIdx.x * int64_t(Tile::kThreads) + block_thread(); i < p.pairs();
       i += gridDim.x * int64_t(Tile::kThreads))
    arrived[i] = 0;
  if (!p.cosine) return;
  const int lane = block_thread() % kWarp, warp = block_thread() / kWarp;
  constexpr int kWarps = Tile::kThreads / kWarp;
  each_present(p, p.chunks(), blockIdx.x, gridDim.x, [&](int64_t pair, int64_t chunk) {
    for (int q = warp; q < p.quantities(); q += kWarps) sums[q * kWarp + lane] = 0;
    for (int64_t t = chunk; t < p.tiles(); t += p.chunks()) {
      scratch.read(p, pair, PixelTile::at(t, p.H, p.W));
      __syncthreads();
      for (int q = warp; q < p.quantities(); q += kWarps) {
        const int of = q - p.maps.count;
        const int a = of < 0 ? q : of / p.supports(), b = of < 0 ? q : p.mains + of % p.supports();
        T sum = sums[q * kWarp + lane];
        for (int i = lane; i < Tile::kThreads; i += kWarp)
          sum += scratch.values[a * Tile::kThreads + i] * scratch.values[b * Tile::kThreads + i];
        sums[q * kWarp + lane] = sum;
      }
    }
    double* out = partial + pair * p.quantities() * p.chunks() + chunk;
    for (int q = warp; q < p.quantities(); q += kWarps) {
      const T sum = warp_reduce(sums[q * kWarp + lane], Plus{});
      if (lane == 0) out[q * p.chunks()] = sum;
    }
  });
}

// share[s, t] = w_st / T of a pair, for all threads of the block.
template <class T>
__device__ void find_share(const Problem& p, const Scratch<T>& scratch, const double* partial, int64_t pair,
                           T* share) {
  constexpr int kLanes = 8;  // for a sum
  const int64_t quantities = p.cosine ? p.quantities() : 0;
  for (int first = 0; first < quantities; first += Tile::kThreads / kLanes) {
    const int q = first + block_thread() / kLanes;
    double sum = 0;
    if (q < quantities)
      for (int64_t chunk = block_thread() % kLanes; chunk < p.chunks(); chunk += kLanes)
        sum += partial[(pair * quantities + q) * p.chunks() + chunk];
    for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(kAllLanes, sum, lanes);
    if (q < quantities && block_thread() % kLanes == 0) scratch.totals[q] = sum;
  }
  __syncthreads();
  for (int i = block_thread(); i < p.mains * p.supports(); i += Tile::kThreads) {
    const double *squares = scratch.totals, *products = squares + p.maps.count;
    const int s = i / p.supports(), t = i % p.supports();
    share[i] = p.cosine ? T(cam_share(products[i], squares[s], squares[p.mains + t], p.supports()))
                        : T(1) / T(p.supports());
  }
  __syncthreads();
}

// out[b,k] = the sum over pixels and main maps of |M_s - target_s|; sums[pair, chunk] on the way.
template <class T>
__global__ void __launch_bounds__(Tile::kThreads)
    loss(const __grid_constant__ Problem p, const double* partial, double* sums, int32_t* arrived, T* out) {
  PSSL_DYNAMIC_SHARED(unsigned char, memory);
  PSSL_SHARED(warps, T[kWarp]);
  const Scratch<T> scratch(memory, p);
  for (int64_t i = blockIdx.x * int64_t(Tile::kThreads) + block_thread(); i < p.pairs();
       i += gridDim.x * int64_t(Tile::kThreads))
    if (!p.present(i)) out[i] = 0;
  T* share = scratch.more;
  each_present(p, p.chunks(), blockIdx.x, gridDim.x, [&](int64_t pair, int64_t chunk) {
    find_share(p, scratch, partial, pair, share);
    T sum = 0;
    for (int64_t t = chunk; t < p.tiles(); t += p.chunks()) {
      scratch.read(p, pair, PixelTile::at(t, p.H, p.W));
      for (int s = 0; s < p.mains; ++s) sum += magnitude(scratch.difference(p, share, s));
    }
    sum = block_sum(sum, warps);
    if (block_thread() >= kWarp) return;
    volatile double* of_pair = sums + pair * p.chunks();
    int before = 0;
    if (block_thread() == 0) {
      of_pair[chunk] = sum;
      __threadfence();  // the sum is there before the count says so
      before = atomicAdd(arrived + pair, 1);
    }
    if (__shfl_sync(kAllLanes, before, 0) != p.chunks() - 1) return;
    __threadfence();
    const double own = block_thread() < p.chunks() ? of_pair[block_thread()] : 0.0;
    const double total = warp_reduce(own, Plus{});
    if (block_thread() == 0) out[pair] = T(total);
  });
}

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
__device__ void find_region(const Problem& p, const Gradients& g, int64_t index, Region& region) {
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
    if (i == 0) region.begin[axis] = size - from_end, region.end[axis] = end;
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
__device__ int first_touch(int64_t cell, double ratio, int64_t tile) {
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
      scratch.read(p, pair, PixelTile{y0, x0, p.H, p.W});
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
__device__ void write_zeros(const AnyView<4>& out, int64_t b, int64_t k, int64_t first, int64_t end) {
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
__device__ void write_absent(const Problem& p, const Gradients& g, int64_t warp, int64_t warps) {
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
__global__ void __launch_bounds__(Tile::kThreads, sizeof(T) == 4 ? 3 : 2)
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

// What the attention is made of, and the counters of `loss`, cleared.
struct Partials {
  Tensor products, arrived;

  Partials(const Tensor& on, const Problem& p)
      : products(
            new_on_device(on, {p.cosine ? p.pairs() * p.chunks() * p.quantities() : 0}, ScalarType::Double)),
        arrived(new_on_device(on, {p.pairs()}, ScalarType::Int)) {}
};

template <class T>
Partials find_products(const CudaCall& call, const Problem& p, const Tensor& on) {
  Partials found(on, p);
  const int64_t shared = Scratch<T>::bytes(p, p.quantities() * int64_t(kWarp));
  launch(call, products<T>, grid_of(call.blocks_for(p.pairs() * p.chunks(), kBlocks)), Tile::block(), shared,
         p, found.products.mutable_data_ptr<double>(), found.arrived.mutable_data_ptr<int32_t>());
  return found;
}

Problem problem_of(const std::vector<Tensor>& main, const std::vector<Tensor>& support,
                   const Tensor& image_labels, int64_t height, int64_t width, bool cosine) {
  check_maps(kOp, "main", main, image_labels, height, width);
  check_maps(kOp, "support", support, image_labels, height, width);
  Problem p{{},
            int(main.size()),
            AnyView<2>::of(image_labels),
            image_labels.size(0),
            image_labels.size(1),
            height,
            width,
            cosine};
  p.maps.add(kOp, "main", main);
  p.maps.add(kOp, "support", support);
  return p;
}

template <class F>
void with_accumulation_of(const std::vector<Tensor>& main, const std::vector<Tensor>& support, const F& f) {
  with_accumulation({accumulation_of(main), accumulation_of(support)}, f);
}

Tensor cam_compare_cuda(const std::vector<Tensor>& main, const std::vector<Tensor>& support,
                        const Tensor& image_labels, int64_t height, int64_t width, bool cosine) {
  const Problem p = problem_of(main, support, image_labels, height, width, cosine);
  const CudaCall call(kOp, image_labels);
  Tensor out;
  with_accumulation_of(main, support, [&](auto zero) {
    using T = decltype(zero);
    out = new_on_device(image_labels, {p.B, p.K}, scalar_type_of<T>);
    Tensor sums = new_on_device(image_labels, {p.pairs() * p.chunks()}, ScalarType::Double);
    Partials found = find_products<T>(call, p, image_labels);
    launch(call, loss<T>, grid_of(call.blocks_for(p.pairs() * p.chunks(), kBlocks)), Tile::block(),
           Scratch<T>::bytes(p, p.mains * p.supports()), p, found.products.mutable_data_ptr<double>(),
           sums.mutable_data_ptr<double>(), found.arrived.mutable_data_ptr<int32_t>(),
           out.mutable_data_ptr<T>());
  });
  return out;
}

std::tuple<std::vector<Tensor>, std::vector<Tensor>> cam_compare_backward_cuda(
    const std::optional<Tensor>& grad_sums, const std::vector<Tensor>& main,
    const std::vector<Tensor>& support, const Tensor& image_labels, int64_t height, int64_t width,
    bool cosine, const std::vector<bool>& needs) {
  const Problem p = problem_of(main, support, image_labels, height, width, cosine);
  const CudaCall call(kOp, image_labels);
  std::vector<Tensor> grad_main, grad_support;
  Gradients g;
  g.of_sums = AnyView<2>::of(grad_sums);
  auto allocate = [&](const std::vector<Tensor>& side, bool needed, int first, std::vector<Tensor>& grads) {
    for (size_t i = 0; i < side.size() && needed; ++i) {
      grads.push_back(torch::stable::empty_like(side[i]));
      g.add(first + int(i), AnyView<4>::of(grads.back()), p.pairs());
    }
  };
  allocate(main, needs[0], 0, grad_main);
  allocate(support, needs[1], p.mains, grad_support);
  const int64_t pieces = g.first_piece[g.count];
  if (pieces == 0) return {grad_main, grad_support};
  with_accumulation_of(main, support, [&](auto zero) {
    using T = decltype(zero);
    Partials found = find_products<T>(call, p, image_labels);
    g.cut(height, width, sizeof(T));
    g.workers = g.of_sums.data ? call.blocks_for(p.pairs() * g.parts(), kBlocks / 2) : 0;
    launch(call, gradient<T>, grid_of(g.workers + call.blocks_for(pieces, kBlocks / 2)), Tile::block(),
           Scratch<T>::bytes(p, p.mains * p.supports() + g.cells), p, g,
           found.products.mutable_data_ptr<double>());
  });
  return {grad_main, grad_support};
}

}  // namespace

PSSL_REGISTER_CUDA(m) {
  m.impl("cam_compare", TORCH_BOX(&cam_compare_cuda));
  m.impl("cam_compare_backward", TORCH_BOX(&cam_compare_backward_cuda));
}
