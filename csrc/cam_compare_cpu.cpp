// cam_compare on the CPU. A present class of an image is one thread's work: its maps are resized row by row, once for the
// products that the attention is made of and once for the loss or its gradient; no resized map exists. Absent classes
// are not read.
//
//   d loss / d M_s = sign(M_s - target_s),  d loss / d S_t = - sum_s w_st / T sign(M_s - target_s)
//
// where the map is above 0, and from there back through the resize. The attention w is a constant.
#include <deque>
#include <tuple>

#include "cam_compare.h"
#include "common/image_classes.h"
#include "common/resize_cpu.h"
#include "common/tasks_cpu.h"

namespace {

using namespace pssl;
using namespace pssl::PSSL_SIMD_NAMESPACE;

constexpr const char* kOp = "cam_compare";

template <class T>
PSSL_NOINLINE T row_product(const T* a, const T* b, int64_t padded) {
  Vec<T> sum = {};
  for (int64_t x = 0; x < padded; x += kLanes<T>) sum += load<T>(a + x) * load<T>(b + x);
  return lane_sum<T>(sum);
}

// The maps of both sides: 0..S-1 main, S..S+T-1 support.
template <class T>
struct Maps {
  int64_t S, N, H, W, padded;
  std::deque<ResizedMaps<T>> all;
  int64_t scratch = 0, cells = 0;
  std::vector<int64_t> first_cell;  // of each map's gradient

  Maps(const std::vector<Tensor>& main, const std::vector<Tensor>& support, int64_t H, int64_t W)
      : S(main.size()), N(main.size() + support.size()), H(H), W(W), padded(round_up(W, kLanes<T>)) {
    for (const auto* side : {&main, &support})
      for (const Tensor& t : *side) {
        const auto& map = all.emplace_back(t, H, W);
        scratch = std::max(scratch, map.scratch());
        first_cell.push_back(cells);
        cells += map.maps.h * map.maps.w;
      }
  }
};

// One present class at a time: its rows, its attention.
template <class T>
class ClassRows {
 public:
  explicit ClassRows(const Maps<T>& maps)
      : maps_(maps),
        memory_(maps.scratch),
        rows_(maps.N * maps.padded, true),
        difference_(maps.S * maps.padded),
        share_(maps.S * (maps.N - maps.S)),
        planes_(maps.N) {}

  // Chooses class k of image b and finds its share[s][t] = w_st / T.
  void choose(int64_t b, int64_t k, bool cosine) {
    const int64_t S = maps_.S, N = maps_.N, supports = N - S;
    for (int64_t i = 0; i < N; ++i) planes_[i] = maps_.all[i].maps.plane(b, k);
    std::fill_n(share_.get(), S * supports, T(1) / T(supports));
    if (!cosine) return;
    std::vector<double> squares(N, 0.0), products(S * supports, 0.0);
    for (int64_t y = 0; y < maps_.H; ++y) {
      read(y);
      for (int64_t i = 0; i < N; ++i) squares[i] += row_product(row(i), row(i), maps_.padded);
      for (int64_t s = 0; s < S; ++s)
        for (int64_t t = 0; t < supports; ++t)
          products[s * supports + t] += row_product(row(s), row(S + t), maps_.padded);
    }
    for (int64_t s = 0; s < S; ++s)
      for (int64_t t = 0; t < supports; ++t) {
        const double product = products[s * supports + t];
        share_[s * supports + t] = T(cam_share(product, squares[s], squares[S + t], supports));
      }
  }

  // The sum over space and main scales of |M_s - target_s|.
  double loss() {
    double sum = 0;
    for (int64_t y = 0; y < maps_.H; ++y) {
      read(y);
      for (int64_t s = 0; s < maps_.S; ++s) {
        Vec<T> line = {};
        each_difference(s, [&](int64_t, Vec<T> d) { line += magnitude(d); });
        sum += lane_sum<T>(line);
      }
    }
    return sum;
  }

  // cells[i] = the gradients of the maps of the wanted sides, each [h][w].
  void gradients(T grad, const std::vector<bool>& needs, T* cells) {
    const int64_t S = maps_.S, supports = maps_.N - S;
    std::fill_n(cells, maps_.cells, T(0));
    for (int64_t y = 0; y < maps_.H; ++y) {
      read(y);
      for (int64_t s = 0; s < S; ++s)
        each_difference(s, [&](int64_t x, Vec<T> d) {
          store<T>(&difference_[s * maps_.padded + x], magnitude_gradient(d, splat<T>(grad)));
        });
      for (int64_t t = 0; t < supports && needs[1]; ++t) {
        T* support = row(S + t);
        for (int64_t x = 0; x < maps_.padded; x += kLanes<T>) {
          Vec<T> sum = {};
          for (int64_t s = 0; s < S; ++s)
            sum -= share_[s * supports + t] * load<T>(&difference_[s * maps_.padded + x]);
          store<T>(support + x, relu_gradient(load<T>(support + x), sum));
        }
        add_adjoint(S + t, y, support, cells);
      }
      for (int64_t s = 0; s < S && needs[0]; ++s) {
        T* main = row(s);
        for (int64_t x = 0; x < maps_.padded; x += kLanes<T>) {
          const Vec<T> gradient = load<T>(&difference_[s * maps_.padded + x]);
          store<T>(main + x, relu_gradient(load<T>(main + x), gradient));
        }
        add_adjoint(s, y, main, cells);
      }
    }
  }

 private:
  T* row(int64_t i) { return &rows_[i * maps_.padded]; }

  // Row y of every map, cut at 0; zero in the padding.
  void read(int64_t y) {
    for (int64_t i = 0; i < maps_.N; ++i) {
      maps_.all[i].row(planes_[i], y, memory_.get(), row(i));
      std::fill(row(i) + maps_.W, row(i) + maps_.padded, T(0));
      relu_row(row(i), maps_.W);
    }
  }
  // f(x, M_s - target_s) along the row that was read
  template <class F>
  void each_difference(int64_t s, const F& f) {
    const int64_t S = maps_.S, supports = maps_.N - S;
    for (int64_t x = 0; x < maps_.padded; x += kLanes<T>) {
      Vec<T> target = {};
      for (int64_t t = 0; t < supports; ++t) target += share_[s * supports + t] * load<T>(row(S + t) + x);
      f(x, load<T>(row(s) + x) - target);
    }
  }
  void add_adjoint(int64_t i, int64_t y, const T* gradient, T* cells) {
    maps_.all[i].add_adjoint(gradient, y, memory_.get(), cells + maps_.first_cell[i]);
  }

  const Maps<T>& maps_;
  Buffer<T> memory_, rows_, difference_, share_;
  std::vector<FeatureView> planes_;
};

std::vector<std::pair<int64_t, int64_t>> present_pairs(const Tensor& image_labels) {
  std::vector<std::pair<int64_t, int64_t>> pairs;
  const auto present = present_classes(image_labels);
  for (size_t b = 0; b < present.size(); ++b)
    for (int64_t k : present[b]) pairs.emplace_back(int64_t(b), k);
  return pairs;
}

void check(const std::vector<Tensor>& main, const std::vector<Tensor>& support, const Tensor& image_labels,
           int64_t height, int64_t width) {
  check_maps(kOp, "main", main, image_labels, height, width);
  check_maps(kOp, "support", support, image_labels, height, width);
}

template <class F>
auto with_accumulation_of(const std::vector<Tensor>& main, const std::vector<Tensor>& support, const F& f) {
  return with_accumulation({accumulation_of(main), accumulation_of(support)}, f);
}

Tensor cam_compare_cpu(const std::vector<Tensor>& main, const std::vector<Tensor>& support,
                       const Tensor& image_labels, int64_t height, int64_t width, bool cosine) {
  check(main, support, image_labels, height, width);
  return with_accumulation_of(main, support, [&](auto zero) {
    using T = decltype(zero);
    const Maps<T> maps(main, support, height, width);
    const int64_t K = image_labels.size(1);
    Tensor sums = new_tensor({image_labels.size(0), K}, scalar_type_of<T>);
    T* out = sums.mutable_data_ptr<T>();
    std::fill_n(out, sums.numel(), T(0));
    const auto pairs = present_pairs(image_labels);
    share_tasks(int64_t(pairs.size()), [&] {
      return [&, rows = ClassRows<T>(maps)](int64_t i) mutable {
        rows.choose(pairs[i].first, pairs[i].second, cosine);
        out[pairs[i].first * K + pairs[i].second] = T(rows.loss());
      };
    });
    return sums;
  });
}

std::tuple<std::vector<Tensor>, std::vector<Tensor>> cam_compare_backward_cpu(
    const std::optional<Tensor>& grad_sums, const std::vector<Tensor>& main,
    const std::vector<Tensor>& support, const Tensor& image_labels, int64_t height, int64_t width,
    bool cosine, const std::vector<bool>& needs) {
  check(main, support, image_labels, height, width);
  std::vector<Tensor> grad_main, grad_support;
  std::vector<FeatureView> views;  // of each map's gradient, in the order of Maps::all
  auto allocate = [&](const std::vector<Tensor>& side, bool needed, std::vector<Tensor>& grads) {
    for (const Tensor& t : side) {
      views.push_back(FeatureView::of(t));  // a placeholder where it is not wanted
      if (!needed) continue;
      Tensor grad = new_like(t);
      grads.push_back(torch::stable::zero_(grad));
      views.back() = FeatureView::of(grad);
    }
  };
  allocate(main, needs[0], grad_main);
  allocate(support, needs[1], grad_support);
  if (!grad_sums) return {grad_main, grad_support};
  with_accumulation_of(main, support, [&](auto zero) {
    using T = decltype(zero);
    const Maps<T> maps(main, support, height, width);
    const auto pairs = present_pairs(image_labels);
    share_tasks(int64_t(pairs.size()), [&] {
      return [&, rows = ClassRows<T>(maps), cells = Buffer<T>(maps.cells)](int64_t i) mutable {
        const auto [b, k] = pairs[i];
        T grad;
        read_elements(*grad_sums, b * grad_sums->stride(0) + k * grad_sums->stride(1), 1, 1, &grad);
        rows.choose(b, k, cosine);
        rows.gradients(grad, needs, cells.get());
        for (int64_t j = 0; j < maps.N; ++j) {
          if (!needs[j < maps.S ? 0 : 1]) continue;
          const FeatureView plane = views[j].plane(b, k);
          for (int64_t y = 0; y < plane.h; ++y)
            unpack_row(&cells[maps.first_cell[j] + y * plane.w], plane.w, plane, 0, y, 0, plane.w);
        }
      };
    });
  });
  return {grad_main, grad_support};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pssl, CPU, m) {
  if (!simd_chosen()) return;
  m.impl("cam_compare", TORCH_BOX(&cam_compare_cpu));
  m.impl("cam_compare_backward", TORCH_BOX(&cam_compare_backward_cpu));
}
