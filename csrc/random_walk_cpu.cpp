// random_walk on the CPU: sparse steps (identity 3) as a stencil with a weight map for each offset.
//
// A map lies in memory as one run of cells (WalkRun), so that vectors need not know of rows. Affinities are kept for the
// offsets that point ahead; those behind are the same numbers read from the other end.
// A step is a gather, every cell by itself, so that the result does not depend on the threads.
#include "common/tensors.h"
#include "common/vec.h"
#include "random_walk.h"

namespace {

using namespace pssl;
using namespace pssl::PSSL_SIMD_NAMESPACE;

constexpr const char* kOp = "random_walk";
constexpr double kEdgeSlack = 1e-3;  // as in pssl_ext/ops/random_walk.py
constexpr int64_t kBlockVectors = 8;
constexpr int64_t kChunkCells = 2048;  // a chunk's affinities stay in the second-level cache for all classes
// Multiplications that are worth waking a thread for; at each of hundreds of steps the slowest is waited for.
constexpr int64_t kThreadWork = 1000000;
// The same for all steps of some classes, where threads wait for each other once.
constexpr int64_t kWalkWork = 50000000;
// Affinities that every thread may stream through at each step.
constexpr int64_t kCacheBytes = int64_t(8) << 20;
constexpr int64_t kChannels = 16;  // of the features that are packed at a time
constexpr int64_t kLine = 16;      // elements; a cache line of float

// A run whose cells are taken in blocks of vectors.
struct Run : WalkRun {
  int64_t lead, blocks, size, block;

  Run(int64_t h, int64_t w, int64_t radius, int64_t lanes)
      : WalkRun(h, w, radius), block(kBlockVectors * lanes) {
    lead = round_up(reach, lanes);
    blocks = (h * ld + block - 1) / block;
    // an odd number of lines, so that the maps of the offsets do not fall onto each other in the cache
    size = round_up(lead + blocks * block + reach, kLine) + kLine;
    if (size / kLine % 2 == 0) size += kLine;
  }
  int64_t cell(int64_t y, int64_t x) const { return lead + y * ld + x; }
  // blocks that a thread takes at least
  int64_t grain(int64_t work_per_cell) const {
    return std::max<int64_t>(1, kThreadWork / std::max<int64_t>(1, work_per_cell * block));
  }
};

template <class T>
struct Walk {
  const Run& run;
  Buffer<T> affinities;  // [offsets][size], 0 where an end is outside the map
  Buffer<T> scale;       // [size], 0 outside the map

  explicit Walk(const Run& run)
      : run(run), affinities(int64_t(run.offsets.size()) * run.size, true), scale(run.size, true) {}

  T* affinity(size_t o) const { return &affinities[int64_t(o) * run.size]; }

  // f(p) for every vector of cells, in threads
  template <class F>
  void each_vector(int64_t work, const F& f) const {
    torch::stable::parallel_for(0, run.blocks, run.grain(work), [&](int64_t begin, int64_t end) {
      for (int64_t p = run.lead + begin * run.block; p < run.lead + end * run.block; p += kLanes<T>) f(p);
    });
  }

  // The least openness [size] (0 outside the map) on each pair's path.
  void take_edges(const T* open) const {
    std::vector<std::vector<int64_t>> paths;
    for (const WalkOffset& o : run.offsets) {
      auto& path = paths.emplace_back();
      for (int64_t y = 0; y <= o.dy; ++y)
        for (int64_t x = std::min<int64_t>(o.dx, 0); x <= std::max<int64_t>(o.dx, 0); ++x)
          if (is_on_walk_path(o.dy, o.dx, y, x)) path.push_back(y * run.ld + x);
    }
    each_vector(int64_t(run.offsets.size()) * 8, [&](int64_t p) {
      for (size_t o = 0; o < paths.size(); ++o) {
        Vec<T> least = load(open + p);
        for (int64_t distance : paths[o]) {
          const Vec<T> other = load(open + p + distance);
          least = other < least ? other : least;
        }
        store(affinity(o) + p, least);
      }
    });
  }

  // exp(-beta * mean over channels of |f_i - f_j|): sums a few channels at a time, so that the features are never
  // stored a second time as a whole.
  void take_features(const Tensor& features, double beta) const {
    const int64_t D = features.size(0);
    Buffer<T> packed(kChannels * run.size, true);
    for (int64_t d0 = 0; d0 < D; d0 += kChannels) {
      const int64_t n = std::min(kChannels, D - d0);
      torch::stable::parallel_for(
          0, n * run.h, std::max<int64_t>(1, kThreadWork / run.w), [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i)
              Rows{&features}.template read<T>(d0 + i / run.h, i % run.h, 0, run.w,
                                               &packed[i / run.h * run.size + run.cell(i % run.h, 0)]);
          });
      each_vector(int64_t(run.offsets.size()) * n, [&](int64_t p) {
        for (size_t o = 0; o < run.offsets.size(); ++o) {
          Vec<T> sum = load(affinity(o) + p);
          for (int64_t d = 0; d < n; ++d) {
            const T* f = &packed[d * run.size + p];
            const Vec<T> difference = load(f) - load(f + run.offsets[o].distance);
            sum += difference < T(0) ? -difference : difference;
          }
          store(affinity(o) + p, sum);
        }
      });
    }
    each_vector(int64_t(run.offsets.size()) * 16, [&](int64_t p) {
      for (size_t o = 0; o < run.offsets.size(); ++o)
        store(affinity(o) + p, exp_nonpositive<T>(load(affinity(o) + p) * T(walk_feature_exponent(beta, D))));
    });
    clear_outside();
  }

  // Pairs with an end outside the map, where no value says so by itself.
  void clear_outside() const {
    const int64_t end = run.lead + run.blocks * run.block;
    for (size_t o = 0; o < run.offsets.size(); ++o) {
      const int64_t dx = run.offsets[o].dx;
      const int64_t first = std::max<int64_t>(0, -dx), last = std::min(run.w, run.w - dx);
      int64_t done = run.lead;
      for (int64_t y = 0; y < run.h - run.offsets[o].dy; ++y) {
        std::fill(affinity(o) + done, affinity(o) + run.cell(y, first), T(0));
        done = run.cell(y, last);
      }
      std::fill(affinity(o) + done, affinity(o) + end, T(0));
    }
  }

  void normalise() const {
    torch::stable::parallel_for(
        0, run.h, std::max<int64_t>(1, kThreadWork / (run.w * int64_t(1 + run.offsets.size()))),
        [&](int64_t begin, int64_t end) {
          Buffer<double> sums(run.w);
          for (int64_t y = begin; y < end; ++y) {
            std::fill_n(sums.get(), run.w, 0.0);
            for (size_t o = 0; o < run.offsets.size(); ++o) {
              const T *ahead = affinity(o) + run.cell(y, 0), *behind = ahead - run.offsets[o].distance;
              for (int64_t x = 0; x < run.w; ++x) sums[x] += double(ahead[x]) + double(behind[x]);
            }
            for (int64_t x = 0; x < run.w; ++x) scale[run.cell(y, x)] = T(walk_scale(sums[x]));
          }
        });
  }

  // One step of C maps [size] at a time, V vectors from cell p on.
  template <int C, int V>
  void mix(const T* from, T* to, int64_t p) const {
    constexpr int64_t L = kLanes<T>;
    const int64_t size = run.size;
    Vec<T> here[C][V], change[C][V] = {};
    for (int v = 0; v < V; ++v)
      for (int c = 0; c < C; ++c) here[c][v] = load(from + c * size + p + v * L);
    const T* a = &affinities[p];
    for (const WalkOffset& o : run.offsets) {
      const int64_t distance = o.distance;
      for (int v = 0; v < V; ++v) {
        const Vec<T> ahead = load(a + v * L), behind = load(a - distance + v * L);
        for (int c = 0; c < C; ++c) {
          const T* x = from + c * size + p + v * L;
          change[c][v] += walk_change(ahead, load(x + distance), here[c][v]);
          change[c][v] += walk_change(behind, load(x - distance), here[c][v]);
        }
      }
      a += size;
    }
    for (int v = 0; v < V; ++v)
      for (int c = 0; c < C; ++c)
        store(to + c * size + p + v * L, here[c][v] + load(&scale[p + v * L]) * change[c][v]);
  }
  // One step of k maps [k][size].
  void step(const T* from, T* to, int64_t k) const {
    const int64_t chunk = kChunkCells / run.block * run.block;
    const int64_t grain = run.grain(2 * k * int64_t(run.offsets.size()));
    torch::stable::parallel_for(0, run.blocks, grain, [&](int64_t first, int64_t last) {
      const int64_t end = run.lead + last * run.block;
      for (int64_t begin = run.lead + first * run.block; begin < end; begin += chunk)
        for (int64_t c = 0; c < k; c += kMapGroup)
          with_map_group(std::min(kMapGroup, k - c), [&](auto maps, auto vectors) {
            constexpr int C = maps(), V = vectors();
            for (int64_t p = begin; p < std::min(begin + chunk, end); p += V * kLanes<T>)
              mix<C, V>(from + c * run.size, to + c * run.size, p);
          });
    });
  }

  // `count` steps of k maps; true where the result is in `to`.
  bool steps(T* from, T* to, int64_t k, int64_t count) const {
    for (int64_t i = 0; i < count; ++i) {
      step(from, to, k);
      std::swap(from, to);
    }
    return count % 2;
  }

  // Threads take classes, which need not wait for each other until the end, if there are enough of them; but not where
  // the affinities are so many that all classes had better share one reading of them.
  bool all_steps(T* from, T* to, int64_t k, int64_t count) const {
    const int64_t threads = torch::stable::get_num_threads(), offsets = int64_t(run.offsets.size());
    const int64_t group = std::min(kMapGroup, (k + threads - 1) / threads), groups = (k + group - 1) / group;
    const double work = 2.0 * double(offsets * run.size * group) * double(count);  // of one group
    if (groups < threads || work < double(kWalkWork) || offsets * run.size * int64_t(sizeof(T)) > kCacheBytes)
      return steps(from, to, k, count);
    torch::stable::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
      for (int64_t c = begin * group; c < std::min(end * group, k); c += group)
        steps(from + c * run.size, to + c * run.size, std::min(group, k - c), count);
    });
    return count % 2;
  }
};

// The edge map as cells of the run, within [0,1].
template <class T>
Buffer<T> read_edges(const Tensor& edge, const Run& run) {
  Buffer<T> edges(run.size, true);
  for (int64_t y = 0; y < run.h; ++y) {
    T* row = &edges[run.cell(y, 0)];
    read_elements(edge, y * edge.stride(0), edge.stride(1), run.w, row);
    for (int64_t x = 0; x < run.w; ++x) {
      if (!(row[x] >= T(-kEdgeSlack) && row[x] <= T(1 + kEdgeSlack))) {
        std::ostringstream text;
        text << kOp << ": edge must hold values in 0..1, got [" << double(row[x]) << "]";
        throw std::invalid_argument(text.str());
      }
      row[x] = std::clamp(row[x], T(0), T(1));
    }
  }
  return edges;
}

template <class T>
Tensor walk(const Tensor& cams, const std::optional<Tensor>& edge, const std::optional<Tensor>& features,
            int64_t radius, double beta, int64_t log2_steps) {
  const int64_t k = cams.size(0), h = cams.size(1), w = cams.size(2);
  Tensor out = new_tensor({k, h, w}, scalar_type_of<T>);
  const Run run(h, w, edge ? radius : shrunk_radius(radius, h, w), kLanes<T>);
  Buffer<T> edges;
  if (edge) edges = read_edges<T>(*edge, run);
  if (k * h * w == 0) return out;
  const Walk<T> walk(run);
  Buffer<T> from(k * run.size, true), to(k * run.size, true);
  for (int64_t c = 0; c < k; ++c)
    for (int64_t y = 0; y < h; ++y) {
      T* row = &from[c * run.size + run.cell(y, 0)];
      Rows{&cams}.template read<T>(c, y, 0, w, row);
      for (int64_t x = 0; edge && x < w; ++x) row[x] *= T(1) - edges[run.cell(y, x)];
    }
  if (edge) {
    Buffer<T> open(run.size, true);
    for (int64_t y = 0; y < h; ++y)
      for (int64_t x = 0; x < w; ++x) open[run.cell(y, x)] = T(walk_openness(edges[run.cell(y, x)], beta));
    walk.take_edges(open.get());
  } else {
    walk.take_features(*features, beta);
  }
  walk.normalise();
  if (walk.all_steps(from.get(), to.get(), k, int64_t(1) << log2_steps)) std::swap(from, to);
  T* o = out.mutable_data_ptr<T>();
  for (int64_t c = 0; c < k; ++c)
    for (int64_t y = 0; y < h; ++y) std::copy_n(&from[c * run.size + run.cell(y, 0)], w, o + (c * h + y) * w);
  return out;
}

Tensor random_walk_cpu(const Tensor& cams, const std::optional<Tensor>& edge,
                       const std::optional<Tensor>& features, int64_t radius, double beta,
                       int64_t log2_steps) {
  check_walk(kOp, cams, edge, features, radius, beta, log2_steps);
  const Tensor& source = edge ? *edge : *features;
  return with_accumulation({cams.scalar_type(), source.scalar_type()}, [&](auto zero) {
    return walk<decltype(zero)>(cams, edge, features, radius, beta, log2_steps);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pssl, CPU, m) {
  if (!simd_chosen()) return;
  m.impl("random_walk", TORCH_BOX(&random_walk_cpu));
}
