// cam_sweep on the CPU: a histogram [ground truth, best class, thresholds below the maximum] (identity 2).
//
// Threads take runs of rows by turns, each with a histogram of its own of the image it is at. Counts are integers, so that
// the order in which they are added up does not matter.
#include <cmath>
#include <deque>
#include <limits>
#include <mutex>
#include <numeric>

#include "cam_sweep.h"
#include "common/resize_cpu.h"
#include "common/tasks_cpu.h"

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

constexpr int64_t kRun = 1 << 11;  // pixels: eight kilobytes of each CAM at a time
constexpr int64_t kMostCounted = std::numeric_limits<int32_t>::max();  // pixels of a histogram

template <class T>
struct Image {
  ResizedMaps<T> cams;
  Rows truth;
  int64_t pixels;
  bool flat;    // whether CAMs and ground truth can be read as one row of pixels, side by side
  int64_t run;  // pixels that are worked on at a time: a row, or some of the one row
  RowTasks tasks;
  int64_t first_task;                                // among those of all images
  std::vector<std::pair<int64_t, int64_t>> classes;  // (region number, map), ascending: ties go to the lowest
  std::vector<T> divisor;                            // for each of `classes`; empty where nothing is divided
  Buffer<int32_t> waiting;                           // the histograms of threads that are through with it
  int64_t counted = 0;                               // the tasks in there, or added up already
  LabelCheck check;

  Image(const Tensor& cam, const Tensor& ids, const Tensor& ground_truth, int64_t index, int64_t regions,
        int64_t first_task)
      : cams(cam, ground_truth.size(0), ground_truth.size(1)),
        truth{&ground_truth},
        pixels(cams.H * cams.W),
        flat(cams.in_place() && is_flat_map(cam) && is_flat_map(ground_truth)),
        run(flat ? std::min(kRun, pixels) : cams.W),
        tasks(flat && run ? (pixels + run - 1) / run : cams.H, run),
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
  int64_t slots() const { return std::max<int64_t>(1, classes.size()); }    // of the histogram
  bool has(int64_t task) const { return task - first_task < tasks.count; }  // of those from first_task on
  // Whether a histogram counts all of its pixels, or else those of a task.
  bool fits() const { return pixels <= kMostCounted; }
  int64_t pixels_of(int64_t y) const { return flat ? std::min(run, pixels - y * run) : run; }
  // Run y of `plane`, one of cams.maps.plane(0, k): where it lies if it can be read there, else in `out`.
  const T* values(const FeatureView& plane, int64_t y, T* memory, T* out) const {
    return flat ? static_cast<const T*>(plane.data) + y * run : cams.row_in_place(plane, y, memory, out);
  }
};

// One thread's run.
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
      most = std::max(most, image.cams.scratch()), width = std::max(width, image.run);
      if (!image.flat) elements = std::max(elements, image.slots() * image.run);
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
      const int64_t pixels = images_.back().tasks.rows * images_.back().run;
      STD_TORCH_CHECK(pixels <= kMostCounted, kOp, ": ground_truth[", i,
                      "] must have rows of less than 2^31 pixels, got ", images_.back().cams.W);
    }
    if (normalize) find_divisors();
  }

  Tensor counts() {
    Tensor result = new_tensor({bins_ - 1, C_, C_}, ScalarType::Long);
    counts_ = result.numel() > 0 ? result.mutable_data_ptr<int64_t>() : nullptr;
    std::fill_n(counts_, result.numel(), int64_t(0));
    lowest_.assign(C_ * C_, 0);
    int64_t most = 0;
    for (const auto& image : images_) most = std::max(most, histogram_size(image));
    STD_TORCH_CHECK(most < std::numeric_limits<int32_t>::max(), kOp,
                    ": num_regions × classes × thresholds = ", most, " is too large");
    share_tasks(tasks_, [&] { return Counter(*this, most); });
    for (size_t i = 0; i < images_.size(); ++i)
      images_[i].check.raise_if_found(kOp, C_, ignore_, "ground_truth[" + std::to_string(i) + "]");
    sum_up();
    return result;
  }

 private:
  // One thread's part: the pixels of its tasks, image after image.
  struct Counter {
    Sweep& sweep;
    Scratch<T> scratch;
    Buffer<int32_t> histogram;
    size_t at = 0;                  // the image that the histogram is of
    int64_t tasks = 0, pixels = 0;  // that are in it

    Counter(Sweep& sweep, int64_t most) : sweep(sweep), scratch(sweep.images_), histogram(most) {}

    void operator()(int64_t task) {
      if (!sweep.images_[at].has(task)) finish();
      Image<T>& image = sweep.image_of(task, at);
      const int64_t more = image.tasks.rows * image.run;
      if (pixels > kMostCounted - more) finish();
      if (tasks == 0) std::fill_n(histogram.get(), sweep.histogram_size(image), int32_t(0));
      sweep.count_task(image, task, scratch, histogram.get());
      ++tasks, pixels += more;
    }
    void finish() {
      if (tasks > 0) sweep.add(sweep.images_[at], histogram.get(), tasks);
      tasks = pixels = 0;
    }
  };

  // The image of a task, looked for from number `at` on, which becomes its.
  Image<T>& image_of(int64_t task, size_t& at) {
    while (!images_[at].has(task)) ++at;
    return images_[at];
  }
  // The last thread to be through with an image adds all their histograms up.
  void add(Image<T>& image, int32_t* histogram, int64_t tasks) {
    const int64_t size = histogram_size(image);
    const std::lock_guard<std::mutex> lock(adding_);
    const bool last = (image.counted += tasks) == image.tasks.count;
    if (!last && image.fits()) {
      if (!image.waiting.get()) image.waiting.reset(size, true);
      return add_row(histogram, size, image.waiting.get());
    }
    if (image.waiting.get()) add_row(image.waiting.get(), size, histogram);
    image.waiting = {};
    add_counts(image, histogram);
  }
  // Each class's maximum over its image, of the resized map, and the eps above it.
  void find_divisors() {
    const T lowest = -std::numeric_limits<T>::infinity();
    int64_t most = 0;
    for (const auto& image : images_) most = std::max<int64_t>(most, image.classes.size());
    Buffer<T> top(tasks_ * most);
    std::fill_n(top.get(), tasks_ * most, lowest);
    share_tasks(tasks_, [&] {
      return [&, s = Scratch<T>(images_), at = size_t(0)](int64_t task) mutable {
        const Image<T>& image = image_of(task, at);
        for (size_t j = 0; j < image.classes.size(); ++j) {
          T& largest = top[task * most + j];
          const FeatureView plane = image.cams.maps.plane(0, image.classes[j].second);
          image.tasks.each_row(task - image.first_task, [&](int64_t y) {
            const T* values = image.values(plane, y, s.memory.get(), s.values.get());
            largest = largest_of(values, image.pixels_of(y), largest);
          });
        }
      };
    });
    for (auto& image : images_)
      for (size_t j = 0; j < image.classes.size(); ++j) {
        T largest = lowest;
        for (int64_t task = image.first_task; task < image.first_task + image.tasks.count; ++task)
          largest = largest_of(&top[task * most + j], 1, largest);
        image.divisor.push_back(largest + T(kMaximumEps));
      }
  }

  // [C + 1, bins, slots]; labels that do not count come last
  int64_t histogram_size(const Image<T>& image) const { return (C_ + 1) * image.slots() * bins_; }

  void count_task(Image<T>& image, int64_t task, Scratch<T>& s, int32_t* histogram) const {
    const int64_t k = int64_t(image.classes.size());
    const T* divisors = image.divisor.empty() ? nullptr : image.divisor.data();
    std::vector<const T*> values(k);
    image.tasks.each_row(task - image.first_task, [&](int64_t y) {
      const int64_t n = image.pixels_of(y);
      for (int64_t j = 0; j < k; ++j) {
        const FeatureView plane = image.cams.maps.plane(0, image.classes[j].second);
        values[j] = image.values(plane, y, s.memory.get(), &s.values[image.flat ? 0 : j * n]);
      }
      best_of_rows(values.data(), divisors, k, n, s.best.get(), s.slot.get());
      find_bins(image, y, n, s);
      count_bins(s.bin.get(), n, histogram);
    });
  }
  // s.bin of the n pixels of run y
  void find_bins(Image<T>& image, int64_t y, int64_t n, Scratch<T>& s) const {
    thresholds_.below_row(s.best.get(), n, s.bin.get());
    if (image.truth.tensor->scalar_type() == ScalarType::Long) {
      add_labels(image, y, n, s.slot.get(), s.wide_truth.get(), s.bin.get());
    } else {
      add_labels(image, y, n, s.slot.get(), s.truth.get(), s.bin.get());
    }
  }
  // Neighbours mostly fall into one bin, and adding to a number that was just stored waits for the store: pixels a quarter
  // of the row apart are taken by turns.
  static void count_bins(const int32_t* bin, int64_t n, int32_t* histogram) {
    const int64_t quarter = n / 4;
    for (int64_t x = 0; x < quarter; ++x)
      for (int64_t k = 0; k < 4; ++k) ++histogram[bin[x + k * quarter]];
    for (int64_t x = 4 * quarter; x < n; ++x) ++histogram[bin[x]];
  }
  // From thresholds below each pixel to where it is counted, by its label and slot.
  template <class Label>
  PSSL_NOINLINE void add_labels(Image<T>& image, int64_t y, int64_t n, const int32_t* __restrict slot,
                                Label* __restrict truth, int32_t* __restrict bin) const {
    image.truth.read_plane(image.flat ? 0 : y, image.flat ? y * image.run : 0, n, truth);
    const bool any_ignored = int64_t(Label(ignore_)) == ignore_;
    const Label C = Label(C_), ignored = Label(ignore_);
    const int32_t slots = int32_t(image.slots()), bins = int32_t(bins_);
    int32_t bad = 0;
    for (int64_t x = 0; x < n; ++x) {
      const bool inside = (truth[x] >= 0) & (truth[x] < C), ignore = any_ignored & (truth[x] == ignored);
      bad |= !(inside | ignore);
      bin[x] = (int32_t(inside & !ignore ? truth[x] : C) * bins + bin[x]) * slots + slot[x];
    }
    for (int64_t x = 0; x < n && bad; ++x)
      if (truth[x] != ignore_ && (truth[x] < 0 || truth[x] >= C_)) image.check.found(truth[x]);
  }

  // [C][C], by label and best class: the pixels with `bin` thresholds below them, gathered where the counts of the last of
  // these thresholds will be; those with none below them count as background at every threshold.
  int64_t* counts_of(int64_t bin) {
    return bin ? counts_ + thresholds_.order[bin - 1] * C_ * C_ : lowest_.data();
  }
  // Consecutive regions lie side by side in the histogram and in the counts.
  void add_counts(const Image<T>& image, const int32_t* histogram) {
    const int64_t slots = image.slots(), k = int64_t(image.classes.size());
    auto region = [&](int64_t slot) { return k ? image.classes[slot].first : int64_t(0); };
    for (int64_t slot = 0, end = 0; slot < slots; slot = end) {
      for (end = slot + 1; end < slots && region(end) == region(end - 1) + 1;) ++end;
      for (int64_t bin = 0; bin < bins_; ++bin)
        for (int64_t label = 0; label < C_; ++label) {
          const int32_t* from = histogram + (label * bins_ + bin) * slots + slot;
          int64_t* to = counts_of(bin) + label * C_ + region(slot);
          for (int64_t i = 0; i < end - slot; ++i) to[i] += from[i];
        }
    }
  }
  // At threshold j pixels are of their best class if more than j thresholds are below them, and else background.
  void sum_up() {
    const int64_t plane = C_ * C_;
    std::vector<int64_t> above(plane, 0), pixels(C_);
    for (int64_t bin = bins_ - 1; bin > 0; --bin) {
      add_row(counts_of(bin), plane, above.data());
      std::copy(above.begin(), above.end(), counts_of(bin));
    }
    add_row(lowest_.data(), plane, above.data());
    auto sum = [&](const int64_t* row, int64_t first) {
      return std::accumulate(row + first, row + C_, int64_t(0));
    };
    for (int64_t label = 0; label < C_; ++label) pixels[label] = sum(&above[label * C_], 0);
    for (int64_t j = 0; j < bins_ - 1; ++j)
      for (int64_t label = 0; label < C_; ++label) {
        int64_t* const row = counts_ + j * plane + label * C_;
        row[0] = pixels[label] - sum(row, 1);
      }
  }

  Thresholds<T> thresholds_;
  std::deque<Image<T>> images_;
  int64_t C_, bins_, ignore_, tasks_ = 0;
  int64_t* counts_ = nullptr;    // [T][C][C], the result
  std::vector<int64_t> lowest_;  // [C][C], see counts_of
  std::mutex adding_;
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
