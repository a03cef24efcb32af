// Identity 1 with label pixels in the lanes of a vector, for quantities of all classes at a pixel.
//
// Label rows are cut into blocks: runs of at most kLanes pixels whose left cells lie within one vector of cells, so that
// the values at both neighbours are lanes picked from two loads. A block is worked off for all label rows that lie between
// two rows of cells. Its gradients are summed over these rows first, which leaves one way back from pixels to cells
// for all of them.
//
// Maps have rows of `map_row` values, zeros behind the last cell: a block's loads stay inside, and the neighbour
// behind the last cell (of weight 0) is not another row's NaN.
#pragma once

#include "common/channel_blocks_cpu.h"
#include "common/label_grid_cpu.h"

namespace pssl::PSSL_SIMD_NAMESPACE {

template <class T>
int64_t map_row(int64_t w) {
  return w + 1 + kLanes<T>;
}

template <class T>
struct LabelBlock {
  int64_t x, n, cell;         // label pixels [x, x + n); the left cell of the first
  Lanes<T> left;              // left cells, relative to `cell`; at most kLanes - 2
  Vec<T> fraction;            // 0 behind the n-th
  Vec<T> scatter[kLanes<T>];  // [pixel][cell]: the weights of a pixel's two cells
};

template <class T>
std::vector<LabelBlock<T>> label_blocks(const Axis<T>& axis) {
  std::vector<LabelBlock<T>> blocks;
  const int64_t size = int64_t(axis.index.size());
  for (int64_t x = 0; x < size;) {
    LabelBlock<T> block{x, 0, axis.index[x], {}, {}, {}};
    for (; x < size && block.n < kLanes<T> && axis.index[x] - block.cell <= kLanes<T> - 2; ++x, ++block.n) {
      const int64_t left = axis.index[x] - block.cell;
      const T t = axis.fraction[x];
      block.left[block.n] = BitsOf<T>(left);
      block.fraction[block.n] = t;
      block.scatter[block.n][left] = T(1) - t;
      block.scatter[block.n][left + 1] = t;
    }
    blocks.push_back(block);
  }
  return blocks;
}

// The products of all cells with their image's class vectors, a plane a class, and with their neighbours.
template <class T>
struct PlaneMaps {
  int64_t C, h, row;
  Buffer<T> dots;    // [B,C,h,row]
  GramMaps<T> gram;  // [B,h,row]

  // vectors(b): of image b, [D][cp]
  template <class Vectors>
  PlaneMaps(const FeatureView& f, int64_t C, const Vectors& vectors)
      : C(C), h(f.h), row(map_row<T>(f.w)), dots(f.B * C * f.h * row, true) {
    gram.reset(f.B * h * row, true);
    cell_pass<T>(f, &gram, row, [&](int64_t b, int64_t y, int64_t x, int64_t n, const T* packed, int64_t ld) {
      const int64_t padded = round_up(n, kLanes<T>);
      Buffer<T> z(C * padded);
      packed_products(packed, ld, padded, f.D, vectors(b), round_up(C, kLanes<T>), C, z.get(), padded);
      for (int64_t c = 0; c < C; ++c) std::copy_n(&z[c * padded], n, &dots[((b * C + c) * h + y) * row + x]);
    });
  }
};

// One block between two rows of cells.
template <class T>
class BlockView {
 public:
  BlockView(const PlaneMaps<T>& maps, const LabelBlock<T>& block, int64_t b, int64_t y)
      : maps_(maps),
        block_(block),
        upper_((b * maps.h + y) * maps.row + block.cell),
        lower_((b * maps.h + std::min(y + 1, maps.h - 1)) * maps.row + block.cell),  // at the last row t = 0
        dots_((b * maps.C * maps.h + y) * maps.row + block.cell) {}

  // 1/|F| at the pixels of the label row at fraction t below the upper row of cells.
  Vec<T> inverse_norms(T t, T eps) const {
    const GramMaps<T>& g = maps_.gram;
    T self[kLanes<T>], right[kLanes<T>], result[kLanes<T>];
    for (int i = 0; i < kLanes<T>; ++i) {
      self[i] = blend_squared(g.self[upper_ + i], g.self[lower_ + i], g.lower[upper_ + i], t);
      right[i] = blend_product(g.right[upper_ + i], g.right[lower_ + i], g.diagonals[upper_ + i], t);
    }
    T a0[kLanes<T>], a1[kLanes<T>], r[kLanes<T>], fraction[kLanes<T>];
    store<T>(a0, pick<T>(load<T>(self), block_.left));
    store<T>(a1, pick<T>(load<T>(self), block_.left + 1));
    store<T>(r, pick<T>(load<T>(right), block_.left));
    store<T>(fraction, block_.fraction);
    for (int i = 0; i < kLanes<T>; ++i)
      result[i] = inverse_norm(blend_squared(a0[i], a1[i], r[i], fraction[i]), eps);
    return load<T>(result);
  }

  // Gives f(c) = <F, q_c> times `scale` at the same pixels.
  auto products(T t, Vec<T> scale) const {
    const int64_t plane = maps_.h * maps_.row;
    const T *upper = &maps_.dots[dots_], *lower = upper + (lower_ - upper_);
    const Vec<T> left = (T(1) - block_.fraction) * scale, right = block_.fraction * scale;
    return [=, s = T(1) - t, index = block_.left](int64_t c) {
      const Vec<T> v = s * load<T>(upper + c * plane) + t * load<T>(lower + c * plane);
      return left * pick<T>(v, index) + right * pick<T>(v, index + 1);
    };
  }

 private:
  const PlaneMaps<T>& maps_;
  const LabelBlock<T>& block_;
  int64_t upper_, lower_, dots_;
};

// The gradients of one block, summed over label rows.
template <class T>
class BlockAdjoint {
 public:
  explicit BlockAdjoint(int64_t C) : C_(C), upper_(C * kLanes<T>, true), lower_(C * kLanes<T>, true) {}

  // g[c], kLanes apart: the gradients of the products in the label row at fraction t; k: those of |F|^2.
  void add(T t, const T* g, Vec<T> k) {
    const T s = T(1) - t;
    for (int64_t i = 0; i < C_ * kLanes<T>; i += kLanes<T>) {
      const Vec<T> v = load<T>(g + i);
      store<T>(&upper_[i], load<T>(&upper_[i]) + s * v);
      store<T>(&lower_[i], load<T>(&lower_[i]) + t * v);
    }
    squared_upper_ += s * s * k;
    squared_lower_ += t * t * k;
    squared_between_ += T(2) * s * t * k;
  }

  // Hands the sums to the cells, by the adjoint of the blend along x, and starts anew.
  void flush(const LabelBlock<T>& block, CellAdjoint<T>& out, int64_t b, int64_t y) {
    for (int64_t c = 0; c < C_; ++c) {
      const int64_t cell = out.product(b, y, block.cell, c);
      scatter(block, &upper_[c * kLanes<T>], &out.upper[cell]);
      scatter(block, &lower_[c * kLanes<T>], &out.lower[cell]);
    }
    for (int64_t i = 0; i < block.n; ++i) {
      const int64_t cell = out.cell(b, y, block.cell + block.left[i]);
      const T t = block.fraction[i], s = T(1) - t, between = T(2) * s * t;
      out.self_upper[cell] += s * s * squared_upper_[i];
      out.self_lower[cell] += s * s * squared_lower_[i];
      out.below[cell] += s * s * squared_between_[i];
      out.right_upper[cell] += between * squared_upper_[i];
      out.right_lower[cell] += between * squared_lower_[i];
      out.diagonals[cell] += s * t * squared_between_[i];
      if (t == T(0)) continue;  // no cell to the right, or no part in it
      out.self_upper[cell + 1] += t * t * squared_upper_[i];
      out.self_lower[cell + 1] += t * t * squared_lower_[i];
      out.below[cell + 1] += t * t * squared_between_[i];
    }
    std::fill_n(upper_.get(), C_ * kLanes<T>, T(0));
    std::fill_n(lower_.get(), C_ * kLanes<T>, T(0));
    squared_upper_ = squared_lower_ = squared_between_ = Vec<T>{};
  }

 private:
  static void scatter(const LabelBlock<T>& block, const T* pixels, T* cells) {
    Vec<T> sum = load<T>(cells);
    for (int64_t i = 0; i < block.n; ++i) sum += pixels[i] * block.scatter[i];
    store<T>(cells, sum);
  }

  int64_t C_;
  Buffer<T> upper_, lower_;  // [C][kLanes]
  Vec<T> squared_upper_ = {}, squared_lower_ = {}, squared_between_ = {};
};

}  // namespace pssl::PSSL_SIMD_NAMESPACE
