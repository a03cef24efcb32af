// dense_crf on the CPU: mean field of a fully-connected CRF, the pairwise sums by filtering on two lattices.
//
// Splat, blur and slice are linear, S^T B S, and D = their answer to ones; with the weights in S scaled by D^-1/2 the
// same three steps are the normalised kernel. An iteration is one pass over the tiles of the image: each pixel slices
// its messages from the vertices, takes the softmax, and splats the result again, so that Q itself is never stored.
#include "common/tasks_cpu.h"
#include "dense_crf_lattice_cpu.h"

namespace {

using namespace pssl;
using namespace pssl::PSSL_SIMD_NAMESPACE;

constexpr const char* kOp = "dense_crf";

// A lattice with its values: the kernel D^-1/2 S^T B S D^-1/2.
template <class T, int d>
class Kernel {
 public:
  // `colour(y, x, k)` is channel k of a pixel, where d is 5.
  template <class Colour>
  Kernel(const char* argument, const Tiles& tiles, const PixelFeatures<d>& features, T compat,
         int64_t columns, const Colour& colour)
      : compat_(compat),
        lattice_(tiles, lattice_of(kOp, argument, features, tiles.H, tiles.W),
                 [&](int64_t y, int64_t x, double* out) {
                   features.at(y, x, [&](int k) { return colour(y, x, k); }, out);
                 }) {
    partial_.reset(lattice_.copies * columns);
    values_.reset(lattice_.vertices * columns);
    normalise(tiles);
  }

  T* cleared_copies(int64_t tile, int64_t columns) {
    return lattice_.cleared_copies(tile, columns, partial_.get());
  }
  template <class Columns>
  void splat(int64_t p, Columns columns, const T* q, T* own) const {
    lattice_.splat(p, columns, q, own);
  }
  template <class Width>
  void filter(int64_t columns, int64_t first, Width width) {
    lattice_.gather_and_blur(columns, first, width, partial_.get(), values_.get());
  }
  template <class Columns>
  void add_message(int64_t p, int64_t tile, Columns columns, T* out) const {
    lattice_.slice(p, tile, columns, compat_, values_.get(), out);
  }

 private:
  // The same filter on ones, in all lanes of a vector.
  void normalise(const Tiles& tiles) {
    constexpr std::integral_constant<int64_t, kLanes<T>> columns;
    T ones[kLanes<T>];
    std::fill_n(ones, int64_t(columns), T(1));
    torch::stable::parallel_for(0, tiles.count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        const auto tile = tiles[t];
        T* own = cleared_copies(t, columns);
        for (int64_t p = tile.begin; p < tile.begin + tile.pixels(); ++p) splat(p, columns, ones, own);
      }
    });
    filter(columns, 0, columns);
    torch::stable::parallel_for(0, tiles.count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        const auto tile = tiles[t];
        for (int64_t p = tile.begin; p < tile.begin + tile.pixels(); ++p) {
          T sum[kLanes<T>] = {};
          lattice_.slice(p, t, columns, T(1), values_.get(), sum);
          lattice_.scale(p, T(1) / std::sqrt(sum[0]));
        }
      }
    });
  }

  T compat_;
  Lattice<T, d> lattice_;
  Buffer<T> partial_, values_;  // [copies][columns], [vertices][columns]
};

// -unary of one image, [pixels in the order of the tiles][cp]; in the padding what is below all others.
template <class T>
void read_logits(const Tensor& probabilities, int64_t b, const Tiles& tiles, int64_t cp, T* logits) {
  const Rows rows{&probabilities};
  const int64_t C = probabilities.size(1);
  torch::stable::parallel_for(0, tiles.count, 1, [&](int64_t begin, int64_t end) {
    Buffer<T> row(round_up(Tiles::kSide, kLanes<T>));
    std::fill_n(row.get(), round_up(Tiles::kSide, kLanes<T>), T(1));
    for (int64_t t = begin; t < end; ++t) {
      const auto tile = tiles[t];
      for (int64_t y = 0; y < tile.height; ++y) {
        T* out = logits + (tile.begin + y * tile.width) * cp;
        for (int64_t c = 0; c < cp; ++c) {
          if (c < C) {
            rows.read(b, c, tile.y + y, tile.x, tile.width, row.get());
            for (int64_t x = 0; x < tile.width; x += kLanes<T>) {
              Vec<T> v = load<T>(&row[x]);
              v = v < T(kLowestProbability) ? splat<T>(T(kLowestProbability)) : v > T(1) ? splat<T>(T(1)) : v;
              store<T>(&row[x], log_positive<T>(v));
            }
          }
          for (int64_t x = 0; x < tile.width; ++x) out[x * cp + c] = c < C ? row[x] : T(-1e30);
        }
      }
    }
  });
}

// q = softmax(q) where `counts` is 1, 0 in the padding where it is 0.
template <class T, class Columns>
inline void softmax(Columns columns, const T* counts, T* q) {
  Vec<T> top = load<T>(q);
  for (int64_t c = kLanes<T>; c < columns; c += kLanes<T>) top = larger<T>(top, load<T>(q + c));
  const T largest = lane_max<T>(top);
  Vec<T> sum = {};
  for (int64_t c = 0; c < columns; c += kLanes<T>) {
    const Vec<T> e = exp_nonpositive<T>(load<T>(q + c) - largest) * load<T>(counts + c);
    sum += e;
    store<T>(q + c, e);
  }
  const T inverse = T(1) / lane_sum<T>(sum);
  for (int64_t c = 0; c < columns; c += kLanes<T>) store<T>(q + c, load<T>(q + c) * inverse);
}

// Few threads take a vector of classes of one kernel each, so that they need not wait for each other after every
// direction of the blur, the bilateral one's first, which take longer; more share the vertices.
template <class T, class Columns>
void filter(std::optional<Kernel<T, 2>>& gaussian, std::optional<Kernel<T, 5>>& bilateral, Columns columns) {
  constexpr std::integral_constant<int64_t, kLanes<T>> vector;
  const int64_t threads = torch::stable::get_num_threads(), vectors = columns / vector;
  if (threads == 1 || threads > 2 * vectors) {
    if (gaussian) gaussian->filter(columns, 0, columns);
    if (bilateral) bilateral->filter(columns, 0, columns);
    return;
  }
  share_tasks(2 * vectors, [&] {
    return [&](int64_t task) {
      const int64_t first = task % vectors * vector;
      if (task < vectors && bilateral) bilateral->filter(columns, first, vector);
      if (task >= vectors && gaussian) gaussian->filter(columns, first, vector);
    };
  });
}

template <class T>
Tensor mean_field(const Tensor& images, const Tensor& probabilities, const CrfSettings& s) {
  const int64_t B = probabilities.size(0), C = probabilities.size(1), H = probabilities.size(2),
                W = probabilities.size(3), cp = round_up(C, kLanes<T>);
  Tensor result = new_tensor({B, C, H, W}, scalar_type_of<T>);
  if (B * C * H * W == 0) return result;
  T* out = result.mutable_data_ptr<T>();
  const Tiles tiles(H, W);
  Buffer<T> logits(H * W * cp), counts(cp, true);
  std::fill_n(counts.get(), C, T(1));
  Buffer<uint8_t> colours(3 * H * W);
  const Rows rows{&images};

  std::optional<Kernel<T, 2>> gaussian;
  if (s.has_gaussian())
    gaussian.emplace("gaussian", tiles, PixelFeatures<2>{s.gaussian_sxy}, T(s.gaussian_compat), cp,
                     [](int64_t, int64_t, int) { return 0.0; });
  for (int64_t b = 0; b < B; ++b) {
    read_logits<T>(probabilities, b, tiles, cp, logits.get());
    std::optional<Kernel<T, 5>> bilateral;
    if (s.has_bilateral()) {
      for (int64_t k = 0; k < 3; ++k)
        for (int64_t y = 0; y < H; ++y) rows.read(b, k, y, 0, W, &colours[(k * H + y) * W]);
      bilateral.emplace("bilateral", tiles, PixelFeatures<5>{s.bilateral_sxy, s.bilateral_srgb},
                        T(s.bilateral_compat), cp,
                        [&](int64_t y, int64_t x, int k) { return colours[(k * H + y) * W + x]; });
    }
    with_columns<T>(cp, [&](auto columns) {
      for (int64_t i = 0; i <= s.iterations; ++i) {
        const bool first = i == 0, last = i == s.iterations;
        if (!first) filter(gaussian, bilateral, columns);
        torch::stable::parallel_for(0, tiles.count, 1, [&](int64_t begin, int64_t end) {
          PixelScratch<T, decltype(columns)> q(columns);
          Buffer<T> row(last ? C * Tiles::kSide : 0);
          for (int64_t t = begin; t < end; ++t) {
            const auto tile = tiles[t];
            T* near = gaussian && !last ? gaussian->cleared_copies(t, columns) : nullptr;
            T* alike = bilateral && !last ? bilateral->cleared_copies(t, columns) : nullptr;
            for (int64_t p = tile.begin, x = 0, y = 0; p < tile.begin + tile.pixels(); ++p) {
              std::copy_n(&logits[p * cp], int64_t(columns), q.get());
              if (gaussian && !first) gaussian->add_message(p, t, columns, q.get());
              if (bilateral && !first) bilateral->add_message(p, t, columns, q.get());
              softmax<T>(columns, counts.get(), q.get());
              if (near) gaussian->splat(p, columns, q.get(), near);
              if (alike) bilateral->splat(p, columns, q.get(), alike);
              if (!last) continue;
              for (int64_t c = 0; c < C; ++c) row[c * tile.width + x] = q.get()[c];
              if (++x < tile.width) continue;
              for (int64_t c = 0; c < C; ++c)
                std::copy_n(&row[c * tile.width], tile.width,
                            out + ((b * C + c) * H + tile.y + y) * W + tile.x);
              x = 0, ++y;
            }
          }
        });
      }
    });
  }
  return result;
}

Tensor dense_crf_cpu(const Tensor& images, const Tensor& probabilities, int64_t iterations,
                     double gaussian_sxy, double gaussian_compat, double bilateral_sxy, double bilateral_srgb,
                     double bilateral_compat) {
  check_crf(kOp, images, probabilities);
  const CrfSettings settings{iterations,    gaussian_sxy,   gaussian_compat,
                             bilateral_sxy, bilateral_srgb, bilateral_compat};
  return with_accumulation({probabilities.scalar_type()}, [&](auto zero) {
    return mean_field<decltype(zero)>(images, probabilities, settings);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pssl, CPU, m) {
  if (!simd_chosen()) return;
  m.impl("dense_crf", TORCH_BOX(&dense_crf_cpu));
}
