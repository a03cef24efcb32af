// pixel_refine on the CPU: for each image the affinities of all pixels once, then every iteration reads them once.
//
// Affinities lie row by row as [H][N][W], so that what an output row needs is one piece of memory that stays in the
// second-level cache while all classes pass over it. Maps have their borders replicated to the left and the right of
// each row; above and below, the row's number is clamped instead. Rows are independent: any number of threads gives
// the same bits.
#include "common/axis_cpu.h"
#include "common/tile_cpu.h"
#include "pixel_refine.h"

namespace {

using namespace pssl;
using namespace pssl::PSSL_SIMD_NAMESPACE;

constexpr const char* kOp = "pixel_refine";
constexpr int64_t kThreadWork = 1000000;  // multiplications that are worth waking a thread for

struct Settings {
  std::vector<RefineOffset> offsets;
  std::vector<double> position;  // affinity from the distance, weighted
  int64_t reach = 0;
  double colour_scale;

  Settings(const std::vector<int64_t>& dilations, double colour_scale, double position_weight)
      : position(kRefineDirections * dilations.size()), colour_scale(colour_scale) {
    refine_position_affinities(dilations.data(), int64_t(dilations.size()), colour_scale, position_weight,
                               position.data());
    for (int64_t n = 0; n < int64_t(position.size()); ++n)
      offsets.push_back(refine_offset(n, dilations.data()));
    for (int64_t d : dilations) reach = std::max(reach, d);
  }
  int64_t size() const { return int64_t(offsets.size()); }
};

template <class T>
struct Maps {
  int64_t count, H, W, left, ld;
  Buffer<T> cells;  // [count][H][ld], pixel x at left + x

  Maps(int64_t count, int64_t H, int64_t W, int64_t reach)
      : count(count),
        H(H),
        W(W),
        left(round_up(reach, kLanes<T>)),
        ld(tile_stride<T>(left + round_up(W, kLanes<T>) + reach)),
        cells(count * H * ld) {}

  int64_t map_stride() const { return H * ld; }
  T* row(int64_t c, int64_t y) const {
    return &cells[(c * H + std::clamp<int64_t>(y, 0, H - 1)) * ld + left];
  }
  void replicate_border(int64_t c, int64_t y) const {
    T* p = row(c, y);
    std::fill(p - left, p, p[0]);
    std::fill(p + W, p - left + ld, p[W - 1]);
  }
  // The first pixel of neighbour n of row y in map c, for all n.
  void neighbour_rows(const Settings& s, int64_t c, int64_t y, const T** rows) const {
    for (int64_t n = 0; n < s.size(); ++n) rows[n] = row(c, y + s.offsets[n].dy) + s.offsets[n].dx;
  }
  template <class F>
  void each_row(int64_t work_per_pixel, const F& f) const {
    const int64_t grain = std::max<int64_t>(1, kThreadWork / std::max<int64_t>(1, W * work_per_pixel));
    torch::stable::parallel_for(0, H, grain, f);
  }
};

template <class T>
void read_image(const Tensor& images, int64_t b, const Maps<T>& image) {
  image.each_row(kRefineChannels, [&](int64_t begin, int64_t end) {
    for (int64_t y = begin; y < end; ++y)
      for (int64_t c = 0; c < kRefineChannels; ++c) {
        Rows{&images}.read(b, c, y, 0, image.W, image.row(c, y));
        image.replicate_border(c, y);
      }
  });
}

// The masks of image b, resized. (The functions of resize_cpu.h are for files without fused multiply-add.)
template <class T>
void read_masks(const Tensor& tensor, int64_t b, const Axis<T>& ys, const Axis<T>& xs, const Maps<T>& masks) {
  const int64_t h = tensor.size(2), w = tensor.size(3);
  const bool same = h == masks.H && w == masks.W;
  masks.each_row(4 * masks.count, [&](int64_t begin, int64_t end) {
    Buffer<T> upper(w + 1), lower(w);
    for (int64_t y = begin; y < end; ++y)
      for (int64_t c = 0; c < masks.count; ++c) {
        T* row = masks.row(c, y);
        if (same) {
          Rows{&tensor}.read(b, c, y, 0, w, row);
        } else {
          Rows{&tensor}.read(b, c, ys.index[y], 0, w, upper.get());
          Rows{&tensor}.read(b, c, std::min(ys.index[y] + 1, h - 1), 0, w, lower.get());
          const T t = ys.fraction[y];
          for (int64_t x = 0; x < w; ++x) upper[x] = refine_blend(upper[x], lower[x], t);
          upper[w] = upper[w - 1];
          for (int64_t x = 0; x < masks.W; ++x) {
            const T* at = &upper[xs.index[x]];
            row[x] = refine_blend(at[0], at[1], xs.fraction[x]);
          }
        }
        masks.replicate_border(c, y);
      }
  });
}

template <class T>
class Affinities {
 public:
  Affinities(const Settings& settings, int64_t H, int64_t W)
      : s_(settings), ld_(tile_stride<T>(W)), values_(H * settings.size() * ld_) {}

  void take_colours(const Maps<T>& image) const {
    const int64_t N = s_.size();
    image.each_row(kRefineChannels * N * 4, [&](int64_t begin, int64_t end) {
      std::vector<const T*> rows(kRefineChannels * N);
      Buffer<T> logits(N * kLanes<T>);
      for (int64_t y = begin; y < end; ++y) {
        const T* here[kRefineChannels];
        for (int64_t c = 0; c < kRefineChannels; ++c) {
          image.neighbour_rows(s_, c, y, &rows[c * N]);
          here[c] = image.row(c, y);
        }
        for (int64_t x = 0; x < image.W; x += kLanes<T>)
          softmax(rows.data(), here, x, logits.get(), row(y) + x);
      }
    });
  }

  // One iteration of all the maps.
  void apply(const Maps<T>& from, const Maps<T>& to) const {
    from.each_row(from.count * s_.size(), [&](int64_t begin, int64_t end) {
      std::vector<const T*> rows(s_.size());
      for (int64_t y = begin; y < end; ++y)
        for (int64_t c0 = 0; c0 < from.count; c0 += kMapGroup) {
          from.neighbour_rows(s_, c0, y, rows.data());
          with_map_group(std::min(kMapGroup, from.count - c0), [&](auto maps, auto vectors) {
            constexpr int C = maps(), V = vectors();
            int64_t x = 0;
            for (; x + V * kLanes<T> <= from.W; x += V * kLanes<T>) mix<C, V>(from, to, rows, c0, y, x);
            for (; x < from.W; x += kLanes<T>) mix<C, 1>(from, to, rows, c0, y, x);
            for (int c = 0; c < C; ++c) to.replicate_border(c0 + c, y);
          });
        }
    });
  }

 private:
  T* row(int64_t y) const { return &values_[y * s_.size() * ld_]; }  // [N][ld]

  // A vector of pixels at x: rows [3][N], here [3], out [N][ld].
  void softmax(const T* const* rows, const T* const* here, int64_t x, T* logits, T* out) const {
    constexpr int64_t L = kLanes<T>;
    const int64_t N = s_.size();
    Vec<T> factor[kRefineChannels];
    for (int64_t c = 0; c < kRefineChannels; ++c) factor[c] = colour_factor(rows + c * N, here[c], x);
    Vec<T> largest = {}, total = {};
    for (int64_t n = 0; n < N; ++n) {
      const Vec<T> logit = refine_logit<T, Vec<T>>(
          factor, [&](int64_t c) { return load(rows[c * N + n] + x) - load(here[c] + x); });
      store(logits + n * L, logit);
      largest = n == 0 ? logit : larger<T>(largest, logit);
    }
    for (int64_t n = 0; n < N; ++n) {
      const Vec<T> e = exp_nonpositive<T>(load(logits + n * L) - largest);
      store(logits + n * L, e);
      total += e;
    }
    const Vec<T> inverse = T(1) / total;
    for (int64_t n = 0; n < N; ++n) store(out + n * ld_, load(logits + n * L) * inverse + T(s_.position[n]));
  }

  Vec<T> colour_factor(const T* const* rows, const T* here, int64_t x) const {
    const int64_t N = s_.size();
    const Vec<T> own = load(here + x);
    alignas(64) T squares[kLanes<T>];
    store(squares, refine_squares<T, Vec<T>>(N / kRefineDirections, [&](int64_t j, int i) {
            return load(rows[j * kRefineDirections + i] + x) - own;
          }));
    for (T& value : squares) value = refine_colour_factor(value, N, T(s_.colour_scale));
    return load(squares);
  }

  template <int C, int V>
  void mix(const Maps<T>& from, const Maps<T>& to, const std::vector<const T*>& rows, int64_t c0, int64_t y,
           int64_t x) const {
    constexpr int64_t L = kLanes<T>;
    const int64_t stride = from.map_stride();
    Vec<T> sum[C][V] = {};
    const T* a = row(y) + x;
    for (const T* neighbour : rows) {
      for (int v = 0; v < V; ++v) {
        const Vec<T> affinity = load(a + v * L);
        for (int c = 0; c < C; ++c) sum[c][v] += affinity * load(neighbour + c * stride + x + v * L);
      }
      a += ld_;
    }
    for (int c = 0; c < C; ++c)
      for (int v = 0; v < V; ++v) store(to.row(c0 + c, y) + x + v * L, sum[c][v]);
  }

  const Settings& s_;
  int64_t ld_;
  Buffer<T> values_;  // [H][N][ld]
};

template <class T>
Tensor refine(const Tensor& images, const Tensor& masks, const Settings& settings, int64_t iterations) {
  const int64_t B = images.size(0), k = masks.size(1), H = images.size(2), W = images.size(3);
  Tensor out = new_tensor({B, k, H, W}, scalar_type_of<T>);
  if (B * k * H * W == 0) return out;
  const Axis<T> ys(masks.size(2), H, true), xs(masks.size(3), W, true);
  const Maps<T> image(kRefineChannels, H, W, settings.reach);
  const Affinities<T> affinities(settings, H, W);
  Maps<T> from(k, H, W, settings.reach), to(k, H, W, settings.reach);
  for (int64_t b = 0; b < B; ++b) {
    read_image(images, b, image);
    affinities.take_colours(image);
    read_masks(masks, b, ys, xs, from);
    for (int64_t i = 0; i < iterations; ++i) {
      affinities.apply(from, to);
      std::swap(from, to);
    }
    T* o = out.mutable_data_ptr<T>() + b * k * H * W;
    for (int64_t c = 0; c < k; ++c)
      for (int64_t y = 0; y < H; ++y) std::copy_n(from.row(c, y), W, o + (c * H + y) * W);
  }
  return out;
}

Tensor pixel_refine_cpu(const Tensor& images, const Tensor& masks, const std::vector<int64_t>& dilations,
                        int64_t iterations, double colour_scale, double position_weight) {
  check_refine(kOp, images, masks, dilations, iterations, colour_scale);
  const Settings settings(dilations, colour_scale, position_weight);
  return with_accumulation({images.scalar_type(), masks.scalar_type()}, [&](auto zero) {
    return refine<decltype(zero)>(images, masks, settings, iterations);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pssl, CPU, m) {
  if (!simd_chosen()) return;
  m.impl("pixel_refine", TORCH_BOX(&pixel_refine_cpu));
}
