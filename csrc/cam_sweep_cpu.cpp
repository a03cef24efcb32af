// cam_sweep on the CPU: a histogram [ground truth, best class, thresholds below the maximum] (identity 2).
//
// Threads take runs of rows, each with a histogram of its own over the classes of one image at a time: small enough for
// the first-level cache. Counts are integers, so that the order in which they are added up does not matter.
#include <cmath>
#include <deque>
#include <limits>
#include <mutex>
#include <numeric>

#include "cam_sweep.h"
#include "common/resize_cpu.h"

namespace {

using namespace pssl;
using namespace pssl::PSSL_SIMD_NAMESPACE;

constexpr const char* kOp = "cam_sweep";

template <class T>
struct Thresholds {
  std::vector<T> ordered;      // and infinity
  std::vector<int64_t> order;  // where each of `ordered` stood
  ThresholdCells<T> grid;
  std::vector<int32_t> first;

  explicit Thresholds(const Tensor& t) : order(t.numel()) {
    const int64_t n = t.numel();
    const T infinity = std::numeric_limits<T>::infinity();
    std::vector<T> given(n);
    read_elements(t, 0, t.stride(0), n, given.data());
    for (T& value : given)
      if (value != value) value = infinity;  // nothing is above NaN
    std::iota(order.begin(), order.end(), int64_t(0));
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return given[a] < given[b]; });
    for (int64_t i : order) ordered.push_back(given[i]);
    T low = 0, high = 0;
    bool any = false;
    for (T value : ordered)
      if (std::isfinite(value)) low = any ? low : value, high = value, any = true;
    const int32_t cells = int32_t(std::clamp<int64_t>(4 * n, 64, 1 << 14));
    const T scale = high > low ? T(cells) / (high - low) : T(1);
    grid = {low, std::isfinite(scale) ? scale : T(1), cells, true};
    first.assign(cells + 1, 0);
    for (T value : ordered) grid.single &= ++first[threshold_cell(grid, value) + 1] == 1;
    std::partial_sum(first.begin(), first.end(), first.begin());
    ordered.push_back(infinity);
  }
  // below[x] = the number of thresholds below values[x]
  void below_row(const T* values, int64_t n, int32_t* below) const {
    cell_row(grid, values, n, below);
    if (grid.single) {
      look_up<true>(first.data(), ordered.data(), values, n, below);
    } else {
      look_up<false>(first.data(), ordered.data(), values, n, below);
    }
  }

 private:
  // A loop of its own: the compiler has vectors for this one.
  PSSL_NOINLINE static void cell_row(const ThresholdCells<T> grid, const T* __restrict values, int64_t n,
                                     int32_t* __restrict cells) {
    for (int64_t x = 0; x < n; ++x) cells[x] = threshold_cell(grid, values[x]);
  }
  template <bool kSingle>
  PSSL_NOINLINE static void look_up(const int32_t* __restrict first, const T* __restrict ordered,
                                    const T* __restrict values, int64_t n, int32_t* __restrict cells) {
    for (int64_t x = 0; x < n; ++x) cells[x] = thresholds_below<kSingle>(cells[x], first, ordered, values[x]);
  }
};

template <class T>
struct Image {
  ResizedMaps<T> cams;
  Rows truth;
  RowTasks tasks;
  int64_t first_task;                                // among those of all images
  std::vector<std::pair<int64_t, int64_t>> classes;  // (region number, map), ascending: ties go to the lowest
  std::vector<T> divisor;                            // for each of `classes`; empty where nothing is divided
  LabelCheck check;

  Image(const Tensor& cam, const Tensor& ids, const Tensor& ground_truth, int64_t index, int64_t regions,
        int64_t first_task)
      : cams(cam, ground_truth.size(0), ground_truth.size(1)),
        truth{&ground_truth},
        tasks(cams.H, cams.W),
        first_task(first_task) {
    const int64_t k = cam.size(0);
    std::vector<int64_t> numbers(k);
    read_elements(ids, 0, ids.stride(0), k, numbers.data());
    for (int64_t i = 0; i < k; ++i) {
      if (numbers[i] < 1 || numbers[i] >= regions) {
        std::ostringstream text;
        text << kOp << ": class_ids[" << index << "] must hold region numbers 1.." << regions - 1 << ", got ["
             << numbers[i] << "]";
        throw std::invalid_argument(text.str());
      }
      classes.emplace_back(numbers[i], i);
    }
    std::stable_sort(classes.begin(), classes.end(), [](auto a, auto b) { return a.first < b.first; });
  }
  int64_t slots() const { return std::max<int64_t>(1, classes.size()); }  // of the histogram
};

// One thread's row.
template <class T>
struct Scratch {
  Buffer<T> memory, values;  // `values`: of all classes, where they cannot be read in place
  Buffer<T> best;            // of each pixel, the largest value
  Buffer<int32_t> slot;      // and its class
  Buffer<int64_t> wide_truth;
  Buffer<int32_t> truth, bin;

  explicit Scratch(const std::deque<Image<T>>& images) {
    int64_t most = 0, width = 0, elements = 0;
    for (const auto& image : images) {
      most = std::max(most, image.cams.scratch()), width = std::max(width, image.cams.W);
      elements = std::max(elements, image.slots() * image.cams.W);
    }
    memory.reset(most), values.reset(elements), best.reset(width), slot.reset(width);
    wide_truth.reset(width), truth.reset(width), bin.reset(width);
  }
};

template <class T>
class Sweep {
 public:
  Sweep(const std::vector<Tensor>& cams, const std::vector<Tensor>& class_ids,
        const std::vector<Tensor>& ground_truth, const Tensor& thresholds, int64_t regions, bool normalize,
        int64_t ignore_index)
      : thresholds_(thresholds), C_(regions), bins_(thresholds.numel() + 1), ignore_(ignore_index) {
    for (size_t i = 0; i < cams.size(); ++i) {
      images_.emplace_back(cams[i], class_ids[i], ground_truth[i], int64_t(i), C_, tasks_);
      tasks_ += images_.back().tasks.count;
      const int64_t pixels = images_.back().tasks.rows * images_.back().cams.W;
      STD_TORCH_CHECK(pixels <= std::numeric_limits<int32_t>::max() - kMostCounted, kOp, ": ground_truth[", i,
                      "] must have rows of less than 2^31 - 2^22 pixels, got ", images_.back().cams.W);
    }
    if (normalize) find_divisors();
  }

  Tensor counts() {
    Tensor result = new_tensor({bins_ - 1, C_, C_}, ScalarType::Long);
    int64_t* out = result.mutable_data_ptr<int64_t>();
    std::fill_n(out, (bins_ - 1) * C_ * C_, int64_t(0));
    int64_t most = 0;
    for (const auto& image : images_) most = std::max(most, histogram_size(image));
    STD_TORCH_CHECK(most < std::numeric_limits<int32_t>::max(), kOp,
                    ": num_regions × classes × thresholds = ", most, " is too large");
    std::mutex adding;
    torch::stable::parallel_for(0, tasks_, 1, [&](int64_t begin, int64_t end) {
      Buffer<int32_t> histogram(std::max(most, kWideHistogram));
      int64_t counted = 0;
      auto start = [&](const Image<T>& image) {
        std::fill_n(histogram.get(), ways(image) * histogram_size(image), int32_t(0));
        counted = 0;
      };
      auto finish = [&](const Image<T>& image) {
        const int64_t size = histogram_size(image);
        for (int64_t i = 0; i < size && ways(image) == kWays; ++i) {
          int32_t sum = 0;
          for (int64_t way = 0; way < kWays; ++way) sum += histogram[i * kWays + way];
          histogram[i] = sum;
        }
        const std::lock_guard<std::mutex> lock(adding);
        add_counts(image, histogram.get(), out);
      };
      auto task = [&](Image<T>& image, int64_t number, Scratch<T>& s) {
        const int64_t pixels = image.tasks.rows * image.cams.W;
        if (counted + pixels > kMostCounted) finish(image), start(image);
        counted += pixels;
        count_task(image, number, s, histogram.get());
      };
      each_task(begin, end, task, start, finish);
    });
    for (size_t i = 0; i < images_.size(); ++i)
      images_[i].check.raise_if_found(kOp, C_, ignore_, "ground_truth[" + std::to_string(i) + "]");
    return result;
  }

 private:
  // task(image, number, scratch) for tasks [begin, end), between start(image) and finish(image)
  template <class Task, class Start, class Finish>
  void each_task(int64_t begin, int64_t end, const Task& task, const Start& start, const Finish& finish) {
    Scratch<T> scratch(images_);
    for (Image<T>& image : images_) {
      const int64_t first = std::max(begin, image.first_task);
      const int64_t last = std::min(end, image.first_task + image.tasks.count);
      if (first >= last) continue;
      start(image);
      for (int64_t number = first; number < last; ++number) task(image, number, scratch);
      finish(image);
    }
  }
  // Each class's maximum over its image, of the resized map, and the eps above it.
  void find_divisors() {
    const T lowest = -std::numeric_limits<T>::infinity();
    int64_t most = 0;
    for (const auto& image : images_) most = std::max<int64_t>(most, image.classes.size());
    Buffer<T> top(tasks_ * most);
    std::fill_n(top.get(), tasks_ * most, lowest);
    torch::stable::parallel_for(0, tasks_, 1, [&](int64_t begin, int64_t end) {
      auto task = [&](Image<T>& image, int64_t number, Scratch<T>& s) {
        for (size_t j = 0; j < image.classes.size(); ++j) {
          T& largest = top[number * most + j];
          const FeatureView plane = image.cams.maps.plane(0, image.classes[j].second);
          image.tasks.each_row(number - image.first_task, [&](int64_t y) {
            const T* values = image.cams.row_in_place(plane, y, s.memory.get(), s.values.get());
            largest = largest_of(values, image.cams.W, largest);
          });
        }
      };
      auto nothing = [](const Image<T>&) {};
      each_task(begin, end, task, nothing, nothing);
    });
    for (auto& image : images_)
      for (size_t j = 0; j < image.classes.size(); ++j) {
        T largest = lowest;
        for (int64_t task = image.first_task; task < image.first_task + image.tasks.count; ++task)
          largest = largest_of(&top[task * most + j], 1, largest);
        image.divisor.push_back(largest + T(kMaximumEps));
      }
  }

  // Neighbours mostly fall into one bin, and adding to a number that was just stored waits for the store: so they are
  // counted in histograms of their own, side by side, as long as these stay well within the second-level cache.
  static constexpr int64_t kWays = 4;
  static constexpr int64_t kWideHistogram = 1 << 15;  // numbers in all ways together, at most
  // Pixels that a histogram of 32 bits counts before it is added up, beside those of a task, which fit too (the
  // constructor looks): half the memory to clear and to read than with 64 bits.
  static constexpr int64_t kMostCounted = 1 << 22;

  // [C + 1, slots, bins]; labels that do not count come last
  int64_t histogram_size(const Image<T>& image) const { return (C_ + 1) * image.slots() * bins_; }

  int64_t ways(const Image<T>& image) const {
    return kWays * histogram_size(image) <= kWideHistogram ? kWays : 1;
  }

  void count_task(Image<T>& image, int64_t task, Scratch<T>& s, int32_t* histogram) const {
    const int64_t W = image.cams.W, k = int64_t(image.classes.size());
    const T* divisors = image.divisor.empty() ? nullptr : image.divisor.data();
    std::vector<const T*> values(k);
    image.tasks.each_row(task - image.first_task, [&](int64_t y) {
      for (int64_t j = 0; j < k; ++j) {
        const FeatureView plane = image.cams.maps.plane(0, image.classes[j].second);
        values[j] = image.cams.row_in_place(plane, y, s.memory.get(), &s.values[j * W]);
      }
      best_of_rows(values.data(), divisors, k, W, s.best.get(), s.slot.get());
      count_row(image, y, s, histogram);
    });
  }
  void count_row(Image<T>& image, int64_t y, Scratch<T>& s, int32_t* histogram) const {
    const int64_t W = image.cams.W;
    thresholds_.below_row(s.best.get(), W, s.bin.get());
    if (image.truth.tensor->scalar_type() == ScalarType::Long) {
      add_label_rows(image, y, s.slot.get(), s, s.wide_truth.get());
    } else {
      add_label_rows(image, y, s.slot.get(), s, s.truth.get());
    }
    if (ways(image) == kWays) {
      count_bins<kWays>(s.bin.get(), W, histogram);
    } else {
      count_bins<1>(s.bin.get(), W, histogram);
    }
  }
  template <int64_t N>
  static void count_bins(const int32_t* bin, int64_t n, int32_t* histogram) {
    int64_t x = 0;
    for (; x + N <= n; x += N)
      for (int64_t way = 0; way < N; ++way) ++histogram[bin[x + way] * N + way];
    for (; x < n; ++x) ++histogram[bin[x] * N];
  }
  // s.bin += where the bins of each pixel's label and slot begin
  template <class Label>
  PSSL_NOINLINE void add_label_rows(Image<T>& image, int64_t y, const int32_t* __restrict slot, Scratch<T>& s,
                                    Label* __restrict truth) const {
    const int64_t W = image.cams.W;
    image.truth.read_plane(y, 0, W, truth);
    const bool any_ignored = int64_t(Label(ignore_)) == ignore_;
    const Label C = Label(C_), ignored = Label(ignore_);
    const int32_t slots = int32_t(image.slots()), bins = int32_t(bins_);
    int32_t* __restrict bin = s.bin.get(), bad = 0;
    for (int64_t x = 0; x < W; ++x) {
      const bool inside = (truth[x] >= 0) & (truth[x] < C), ignore = any_ignored & (truth[x] == ignored);
      bad |= !(inside | ignore);
      bin[x] += (int32_t(inside & !ignore ? truth[x] : C) * slots + slot[x]) * bins;
    }
    for (int64_t x = 0; x < W && bad; ++x)
      if (truth[x] != ignore_ && (truth[x] < 0 || truth[x] >= C_)) image.check.found(truth[x]);
  }

  // Pixels with at most j thresholds below them are background at threshold j. `out` is walked as it lies in memory: it
  // is larger than a label's bins.
  void add_counts(const Image<T>& image, const int32_t* histogram, int64_t* out) const {
    const int64_t slots = image.slots();
    std::vector<int64_t> regions(slots, 0), above(slots);
    for (size_t slot = 0; slot < image.classes.size(); ++slot) regions[slot] = image.classes[slot].first;
    for (int64_t label = 0; label < C_; ++label) {
      const int32_t* bins = histogram + label * slots * bins_;
      for (int64_t slot = 0; slot < slots; ++slot)
        above[slot] = std::accumulate(bins + slot * bins_, bins + (slot + 1) * bins_, int64_t(0));
      if (std::count(above.begin(), above.end(), 0) == slots) continue;
      int64_t background = 0;
      for (int64_t j = 0; j + 1 < bins_; ++j) {
        int64_t* row = out + (thresholds_.order[j] * C_ + label) * C_;
        for (int64_t slot = 0; slot < slots; ++slot) {
          const int64_t below = bins[slot * bins_ + j];
          background += below;
          row[regions[slot]] += above[slot] -= below;
        }
        row[0] += background;
      }
    }
  }

  Thresholds<T> thresholds_;
  std::deque<Image<T>> images_;
  int64_t C_, bins_, ignore_, tasks_ = 0;
};

Tensor cam_sweep_cpu(const std::vector<Tensor>& cams, const std::vector<Tensor>& class_ids,
                     const std::vector<Tensor>& ground_truth, const Tensor& thresholds, int64_t num_regions,
                     bool normalize, int64_t ignore_index) {
  check_images(kOp, cams, class_ids, ground_truth, thresholds, num_regions);
  return with_accumulation({thresholds.scalar_type()}, [&](auto zero) {
    return Sweep<decltype(zero)>(cams, class_ids, ground_truth, thresholds, num_regions, normalize,
                                 ignore_index)
        .counts();
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pssl, CPU, m) {
  if (!simd_chosen()) return;
  m.impl("cam_sweep", TORCH_BOX(&cam_sweep_cpu));
}
