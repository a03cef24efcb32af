// cam_regions on the CPU: a pass for each class's maximum over its image, a pass for the labels. Both resize and add up
// the scales row by row. Absent classes are not read.
#include <deque>

#include "cam_regions.h"
#include "common/image_classes.h"
#include "common/resize_cpu.h"
#include "common/tasks_cpu.h"

namespace {

using namespace pssl;
using namespace pssl::PSSL_SIMD_NAMESPACE;

constexpr const char* kOp = "cam_regions";

template <class T>
class Regions {
 public:
  Regions(const std::vector<Tensor>& cams, const Tensor& image_labels, int64_t H, int64_t W)
      : present_(present_classes(image_labels)), K_(image_labels.size(1)), H_(H), W_(W), tasks_(H, W) {
    for (const Tensor& t : cams) {
      cams_.emplace_back(t, H, W);
      scratch_ = std::max(scratch_, cams_.back().scratch());
    }
  }

  Tensor mask(T foreground, T background, uint8_t ignore) {
    Tensor result = new_tensor({int64_t(present_.size()), H_, W_}, ScalarType::Byte);
    uint8_t* out = result.mutable_data_ptr<uint8_t>();
    const std::vector<T> divisor = divisors();
    each_row([&](int64_t b, int64_t, int64_t y, Scratch& s) {
      // no class: -1, and the first; below every sensible threshold
      std::fill_n(s.best.get(), W_, T(-1));
      std::fill_n(s.index.get(), W_, 0);
      for (int64_t k : present_[b]) {
        sum_of_scales(b, k, y, s);
        divide_row(s.sum.get(), W_, divisor[b * K_ + k]);
        keep_best(s.sum.get(), W_, int32_t(k), s.best.get(), s.index.get());
      }
      uint8_t* labels = out + (b * H_ + y) * W_;
      for (int64_t x = 0; x < W_; ++x)
        labels[x] = region_label(s.best[x], s.index[x], foreground, background, ignore);
    });
    return result;
  }

 private:
  struct Scratch {
    Buffer<T> memory, values, sum, best;
    Buffer<int32_t> index;
    Scratch(int64_t scratch, int64_t W) : memory(scratch), values(W), sum(W), best(W), index(W) {}
  };

  // f(image, task, y, scratch) for every row of every image
  template <class F>
  void each_row(const F& f) {
    const int64_t tasks = int64_t(present_.size()) * tasks_.count;
    share_tasks(tasks, [&] {
      return [&, scratch = Scratch(scratch_, W_)](int64_t task) mutable {
        tasks_.each_row(task % tasks_.count, [&](int64_t y) { f(task / tasks_.count, task, y, scratch); });
      };
    });
  }
  void sum_of_scales(int64_t b, int64_t k, int64_t y, Scratch& s) const {
    for (size_t t = 0; t < cams_.size(); ++t) {
      T* row = t ? s.values.get() : s.sum.get();
      cams_[t].row(cams_[t].maps.plane(b, k), y, s.memory.get(), row);
      relu_row(row, W_);
      if (t) add_row(row, W_, s.sum.get());
    }
  }
  // [B,K]: each present class's maximum over its image, and the eps above it
  std::vector<T> divisors() {
    Buffer<T> top(int64_t(present_.size()) * tasks_.count * K_, true);  // no sum is below 0
    each_row([&](int64_t b, int64_t task, int64_t y, Scratch& s) {
      for (int64_t k : present_[b]) {
        sum_of_scales(b, k, y, s);
        top[task * K_ + k] = largest_of(s.sum.get(), W_, top[task * K_ + k]);
      }
    });
    std::vector<T> divisor(present_.size() * K_);
    for (size_t b = 0; b < present_.size(); ++b)
      for (int64_t k : present_[b]) {
        T largest = T(0);
        for (int64_t i = 0; i < tasks_.count; ++i)
          largest = largest_of(&top[(b * tasks_.count + i) * K_ + k], 1, largest);
        divisor[b * K_ + k] = largest + T(kMaximumEps);
      }
    return divisor;
  }

  std::deque<ResizedMaps<T>> cams_;
  std::vector<std::vector<int64_t>> present_;
  int64_t K_, H_, W_, scratch_ = 0;
  RowTasks tasks_;  // of one image
};

Tensor cam_regions_cpu(const std::vector<Tensor>& cams, const Tensor& image_labels, int64_t height,
                       int64_t width, double foreground, double background, int64_t ignore_index) {
  check_maps(kOp, "cams", cams, image_labels, height, width);
  STD_TORCH_CHECK(image_labels.size(1) <= kMostRegionClasses, kOp, ": cams must be of at most 254 classes");
  return with_accumulation({accumulation_of(cams)}, [&](auto zero) {
    using T = decltype(zero);
    return Regions<T>(cams, image_labels, height, width)
        .mask(T(foreground), T(background), uint8_t(ignore_index));
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pssl, CPU, m) {
  if (!simd_chosen()) return;
  m.impl("cam_regions", TORCH_BOX(&cam_regions_cpu));
}
