// Identity 1 on CUDA: from maps on the feature grid to label pixels, and back by gathering.
//
// A label pixel lies in the square of four cells whose upper left one its taps name. What its gradient gives to these
// cells is added up square by square, a thread for each square and class; then a cell takes the sums of the four squares
// around it. No two threads write one number, and every sum has an order that the sizes alone fix.
#pragma once

#include "common/cuda_products.cuh"
#include "common/cuda_tile.cuh"

namespace pssl::PSSL_SIMD_NAMESPACE {

constexpr int kThreads = 256;  // of a block, where nothing asks for another number

inline dim3 grid_for(int64_t threads) { return grid_of((threads + kThreads - 1) / kThreads); }
__device__ inline int64_t grid_thread() { return int64_t(blockIdx.x) * kThreads + threadIdx.x; }

// The weights of all outputs along one axis.
template <class T>
struct AxisTable {
  int64_t *index, *begin;  // [out]; [in + 1] the first output with index >= i
  T* fraction;             // [out]
};

// Feature grid, label grid, and how the labels lie between the cells.
template <class T>
struct LabelGrid {
  int64_t B, h, w, H, W;
  bool align_corners;
  AxisTable<T> y, x;

  PSSL_HD int64_t cells() const { return h * w; }
  PSSL_HD int64_t all_cells() const { return B * h * w; }
  PSSL_HD int64_t all_pixels() const { return B * H * W; }
};

template <class T>
__global__ void __launch_bounds__(kThreads) find_axes(const __grid_constant__ LabelGrid<T> grid) {
  const int64_t i = grid_thread();
  auto fill = [&](const AxisTable<T>& axis, int64_t in, int64_t out) {
    if (i < out) {
      const AxisWeight weight = axis_weight(i, in, out, grid.align_corners);
      axis.index[i] = weight.index, axis.fraction[i] = T(weight.fraction);
    }
    if (i <= in) axis.begin[i] = first_output(i, in, out, grid.align_corners);
  };
  fill(grid.y, grid.h, grid.H);
  fill(grid.x, grid.w, grid.W);
}

// The grid with its tables, and the memory that they are in.
template <class T>
struct Axes {
  Tensor integers, fractions;
  LabelGrid<T> grid;

  Axes(const CudaCall& call, const Tensor& features, const Tensor& labels, bool align_corners) {
    const int64_t n = labels.dim();
    grid = {features.size(0),
            features.size(2),
            features.size(3),
            labels.size(n - 2),
            labels.size(n - 1),
            align_corners,
            {},
            {}};
    integers = new_on_device(features, {grid.H + grid.W + grid.h + grid.w + 2}, ScalarType::Long);
    fractions = new_on_device(features, {grid.H + grid.W}, scalar_type_of<T>);
    int64_t* at = integers.mutable_data_ptr<int64_t>();
    T* fraction = fractions.numel() > 0 ? fractions.mutable_data_ptr<T>() : nullptr;
    grid.y = {at, at + grid.H, fraction};
    at += grid.H + grid.h + 1;
    grid.x = {at, at + grid.W, fraction + grid.H};
    launch(call, find_axes<T>, grid_for(std::max({grid.H, grid.W, grid.h + 1, grid.w + 1})), kThreads, 0,
           grid);
  }
};

// A label pixel of a thread. Blocks take tiles, and their warps 4 rows of 8 pixels of these: on finer label grids the
// pixels of a warp lie in few squares.
struct Pixel {
  int64_t b, y, x;
  bool inside;

  __device__ static Pixel of_thread(int64_t H, int64_t W) {
    const Tile tile = Tile::at(int64_t(blockIdx.x) % Tile::count(H, W), H, W);
    const int thread = int(threadIdx.x), warp = thread / kWarp, lane = thread % kWarp;
    const int64_t y = tile.y0 + warp / 4 * 4 + lane / 8, x = tile.x0 + warp % 4 * 8 + lane % 8;
    return {int64_t(blockIdx.x) / Tile::count(H, W), y, x, y < H && x < W};
  }
};
static_assert(Tile::kThreads == kThreads && Tile::kWidth == 32 && Tile::kHeight == 8);

// The four cells around a label pixel, as numbers in the batch, and its place between them.
template <class T>
struct Square {
  int64_t upper_left, upper_right, lower_left, lower_right;
  T ty, tx;

  // with its upper left cell at a row and column of an image
  __device__ static Square at(const LabelGrid<T>& grid, int64_t b, int64_t row, int64_t column) {
    const int64_t cell = b * grid.cells() + row * grid.w + column;
    const int64_t right = column + 1 < grid.w ? 1 : 0, below = row + 1 < grid.h ? grid.w : 0;
    return {cell, cell + right, cell + below, cell + below + right, T(0), T(0)};
  }
  __device__ static Square of(const LabelGrid<T>& grid, const Pixel& pixel) {
    Square square = at(grid, pixel.b, grid.y.index[pixel.y], grid.x.index[pixel.x]);
    square.ty = grid.y.fraction[pixel.y], square.tx = grid.x.fraction[pixel.x];
    return square;
  }
  // |F|^2 from the Gram maps [4][B,h,w]
  __device__ T squared_norm(const LabelGrid<T>& grid, const T* gram) const {
    const int64_t n = grid.all_cells();
    const T *self = gram, *right = gram + n, *below = gram + 2 * n, *diagonals = gram + 3 * n;
    const T left_square = blend_squared(self[upper_left], self[lower_left], below[upper_left], ty);
    const T right_square = blend_squared(self[upper_right], self[lower_right], below[upper_right], ty);
    const T product = blend_product(right[upper_left], right[lower_left], diagonals[upper_left], ty);
    return blend_squared(left_square, right_square, product, tx);
  }
  // <F, q_c> from the products [B,h,w,padded]
  __device__ T product(const T* dots, int64_t padded, int64_t c) const {
    auto of = [&](int64_t cell) { return dots[cell * padded + c]; };
    return between(of(upper_left), of(upper_right), of(lower_left), of(lower_right));
  }
  // with classes c + [0, 4)
  __device__ Four<T> products(const T* dots, int64_t padded, int64_t c) const {
    auto of = [&](int64_t cell) { return four(dots + cell * padded + c); };
    const Four<T> ul = of(upper_left), ur = of(upper_right), ll = of(lower_left), lr = of(lower_right);
    Four<T> z;
#pragma unroll
    for (int k = 0; k < kFour; ++k) z.v[k] = between(ul.v[k], ur.v[k], ll.v[k], lr.v[k]);
    return z;
  }
  __device__ T between(T ul, T ur, T ll, T lr) const {
    return blend(blend(ul, ll, ty), blend(ur, lr, ty), tx);
  }
};

// The label pixels of a square: whole rows and columns of them.
struct SquarePixels {
  int64_t y0, y1, x0, x1;

  template <class T>
  __device__ static SquarePixels of(const LabelGrid<T>& grid, int64_t row, int64_t column) {
    return {grid.y.begin[row], grid.y.begin[row + 1], grid.x.begin[column], grid.x.begin[column + 1]};
  }
};

// corners[k][cell][c] = the sum over the pixels of the cell's square of the gradient of the product with class c there
// times the weight of the square's corner k: upper left, upper right, lower left, lower right. `body` says what the gradient
// is: state = begin(square, b, c), then for each row row(state, ty), and for each pixel of it
// gradient(state, number, b, y, x, tx).
template <class T, class Body>
__global__ void __launch_bounds__(kThreads)
    square_products(const __grid_constant__ LabelGrid<T> grid, const __grid_constant__ Body body, int64_t C,
                    int64_t padded, T* corners) {
  const int64_t thread = grid_thread(), cell = thread / C, c = thread % C;
  if (cell >= grid.all_cells()) return;
  const int64_t b = cell / grid.cells(), row = cell % grid.cells() / grid.w, column = cell % grid.w;
  const SquarePixels pixels = SquarePixels::of(grid, row, column);
  auto state = body.begin(Square<T>::at(grid, b, row, column), b, c);
  T sum[4] = {};
  for (int64_t y = pixels.y0; y < pixels.y1; ++y) {
    const T ty = grid.y.fraction[y];
    body.row(state, ty);
    T left = 0, right = 0;
#pragma unroll 4  // so many loads are under way
    for (int64_t x = pixels.x0; x < pixels.x1; ++x) {
      const T tx = grid.x.fraction[x];
      const T gradient = body.gradient(state, (b * grid.H + y) * grid.W + x, b, y, x, tx);
      left += (T(1) - tx) * gradient;
      right += tx * gradient;
    }
    sum[0] += (T(1) - ty) * left, sum[1] += (T(1) - ty) * right;
    sum[2] += ty * left, sum[3] += ty * right;
  }
  for (int k = 0; k < 4; ++k) corners[(k * grid.all_cells() + cell) * padded + c] = sum[k];
}

// out = the sum of n partial sums, in an order that n alone fixes: one block.
template <class T>
__global__ void __launch_bounds__(kThreads)
    add_partials(const double* partial, int64_t n, const __grid_constant__ AnyView<1> out) {
  PSSL_SHARED(scratch, double[kWarp]);
  double sum = 0;
#pragma unroll 8  // so many loads are under way
  for (int64_t i = threadIdx.x; i < n; i += kThreads) sum += partial[i];
  sum = block_sum(sum, scratch);
  if (threadIdx.x == 0) out.store(sum, 0);
}

// What a square's pixels give to the products of its cells that |F|^2 is made of.
enum SquareTerm {
  kSelf,
  kRight = 4,
  kBelow = 6,
  kDiagonals = 8,
  kSquareTerms
};  // 4 corners, 2 edges each, one pair

// terms[k][cell] from norm_gradient[pixel] = d loss / d|F|^2, a warp for each square: the adjoint of blend_squared and
// blend_product along both axes.
template <class T>
__global__ void __launch_bounds__(kThreads)
    square_norms(const __grid_constant__ LabelGrid<T> grid, const T* norm_gradient, T* terms) {
  const int64_t cell = grid_thread() / kWarp;
  const int lane = int(threadIdx.x) % kWarp;
  if (cell >= grid.all_cells()) return;
  const int64_t b = cell / grid.cells(), row = cell % grid.cells() / grid.w, column = cell % grid.w;
  const SquarePixels pixels = SquarePixels::of(grid, row, column);
  const int64_t wide = pixels.x1 - pixels.x0, count = wide * (pixels.y1 - pixels.y0);
  T sum[kSquareTerms] = {};
  for (int64_t i = lane; i < count; i += kWarp) {
    const int64_t y = pixels.y0 + i / wide, x = pixels.x0 + i % wide;
    const T k = norm_gradient[(b * grid.H + y) * grid.W + x];
    const SquareWeights<T> along_y(grid.y.fraction[y]), along_x(grid.x.fraction[x]);
    sum[kSelf + 0] += along_y.first * along_x.first * k;
    sum[kSelf + 1] += along_y.first * along_x.second * k;
    sum[kSelf + 2] += along_y.second * along_x.first * k;
    sum[kSelf + 3] += along_y.second * along_x.second * k;
    sum[kRight + 0] += along_y.first * along_x.product * k;
    sum[kRight + 1] += along_y.second * along_x.product * k;
    sum[kBelow + 0] += along_y.product * along_x.first * k;
    sum[kBelow + 1] += along_y.product * along_x.second * k;
    sum[kDiagonals] += along_y.product * along_x.product * T(0.5) * k;
  }
  for (int k = 0; k < kSquareTerms; ++k) {
    const T all = warp_reduce(sum[k], Plus{});
    if (lane == 0) terms[k * grid.all_cells() + cell] = all;
  }
}

// gradients[b][c][cell] = d loss / d product of the cell with class c, from its four squares; 0 for the classes behind the
// C-th. pairs[4][cell] the same of |f|^2, twice, and of the products that add_pairs makes; null: none.
template <class T>
__global__ void __launch_bounds__(kThreads)
    cell_gradients(const __grid_constant__ LabelGrid<T> grid, const T* corners, const T* terms, int64_t C,
                   int64_t padded, T* gradients, T* pairs) {
  const int64_t thread = grid_thread(), c = thread % padded, plane = coefficient_plane(grid.cells());
  const int64_t place = thread / padded % plane, b = thread / padded / plane, n = grid.all_cells();
  if (b >= grid.B) return;
  T& gradient = gradients[(b * padded + c) * plane + place];
  if (place >= grid.cells()) {
    gradient = T(0);
    return;
  }
  const int64_t cell = b * grid.cells() + place, row = place / grid.w, column = place % grid.w;
  const bool left = column > 0, above = row > 0;
  // a square's sum k, of this cell's own square, the one to the left, above, or both
  auto gather = [&](const T* sums, int own, int of_left, int of_above, int of_both, int64_t width,
                    int64_t at) {
    auto of = [&](int k, int64_t square) { return sums[(k * n + square) * width + at]; };
    T sum = of(own, cell);
    if (left && of_left >= 0) sum += of(of_left, cell - 1);
    if (above && of_above >= 0) sum += of(of_above, cell - grid.w);
    if (left && above && of_both >= 0) sum += of(of_both, cell - grid.w - 1);
    return sum;
  };
  gradient = c < C ? gather(corners, 0, 1, 2, 3, padded, c) : T(0);
  if (!pairs || c > 0) return;
  pairs[cell] = T(2) * gather(terms, kSelf, kSelf + 1, kSelf + 2, kSelf + 3, 1, 0);
  pairs[n + cell] = gather(terms, kRight, -1, kRight + 1, -1, 1, 0);
  pairs[2 * n + cell] = gather(terms, kBelow, kBelow + 1, -1, -1, 1, 0);
  pairs[3 * n + cell] = gather(terms, kDiagonals, -1, -1, -1, 1, 0);
}

// The gradients of all products of cells.
template <class T>
struct CellGradients {
  Tensor of_products, of_pairs;  // [B,padded,plane]; [4,B,h,w], empty where norms do not count

  // norm_gradient [B,H,W], or null
  template <class Body>
  CellGradients(const CudaCall& call, const Tensor& like, const LabelGrid<T>& grid, const Body& body,
                int64_t C, int64_t padded, const T* norm_gradient) {
    const int64_t n = grid.all_cells();
    auto memory = [&](int64_t count) { return new_on_device(like, {count}, scalar_type_of<T>); };
    Tensor corners = memory(4 * n * padded), terms = memory(norm_gradient ? kSquareTerms * n : 0);
    const int64_t coefficients = grid.B * padded * coefficient_plane(grid.cells());
    of_products = memory(coefficients), of_pairs = memory(norm_gradient ? 4 * n : 0);
    if (n == 0) return;
    launch(call, square_products<T, Body>, grid_for(n * C), kThreads, 0, grid, body, C, padded,
           corners.mutable_data_ptr<T>());
    if (norm_gradient)
      launch(call, square_norms<T>, grid_for(n * kWarp), kThreads, 0, grid, norm_gradient,
             terms.mutable_data_ptr<T>());
    launch(call, cell_gradients<T>, grid_for(coefficients), kThreads, 0, grid, corners.mutable_data_ptr<T>(),
           norm_gradient ? terms.mutable_data_ptr<T>() : nullptr, C, padded,
           of_products.mutable_data_ptr<T>(), norm_gradient ? of_pairs.mutable_data_ptr<T>() : nullptr);
  }
};

}  // namespace pssl::PSSL_SIMD_NAMESPACE
