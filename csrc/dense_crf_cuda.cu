// dense_crf on CUDA: mean field of a fully-connected CRF, the pairwise sums by filtering on two lattices, image by image.
//
// As on the CPU, with the weights of splat and slice scaled by D^-1/2 filtering is the normalised kernel. Everything of
// an iteration lies on the device: a launch takes the messages and the softmax, the others filter its result.
#include "dense_crf_lattice_cuda.cuh"

namespace {

using namespace pssl;
using namespace pssl::PSSL_SIMD_NAMESPACE;

constexpr const char* kOp = "dense_crf";
constexpr int kSumLanes = 8;
constexpr int64_t kMostPixels = ((int64_t(1) << 31) - 1) / LatticeView<float, 5>::kCorners;

// logits [pixels][C] of image b: -unary
template <class T>
__global__ void __launch_bounds__(kLatticeThreads)
    take_logits(const __grid_constant__ AnyView<4> probabilities, int64_t b, T* logits) {
  const int64_t C = probabilities.size[1], W = probabilities.size[3], pixel = first_row();
  if (pixel >= probabilities.size[2] * W) return;
  for (int64_t c = threadIdx.x; c < C; c += blockDim.x) {
    const T p = probabilities.floating<T>(b, c, pixel / W, pixel % W);
    logits[pixel * C + c] = std::log(std::clamp(p, T(kLowestProbability), T(1)));
  }
}

template <class T>
struct Messages {
  LatticeView<T, 2> gaussian;
  LatticeView<T, 5> bilateral;
  T gaussian_compat, bilateral_compat;  // 0: there is no such lattice
};

// The sum of n numbers in kSumLanes sums, which rounds less than one and waits less.
template <class T>
__device__ T sum_in_lanes(const T* numbers, int64_t n) {
  T sum[kSumLanes] = {};
  for (int64_t i = 0; i < n; i += kSumLanes)
#pragma unroll
    for (int lane = 0; lane < kSumLanes; ++lane)
      if (i + lane < n) sum[lane] += numbers[i + lane];
  for (int lanes = kSumLanes / 2; lanes > 0; lanes /= 2)
#pragma unroll
    for (int lane = 0; lane < lanes; ++lane) sum[lane] += sum[lane + lanes];
  return sum[0];
}

// q [pixels][C] = softmax(logits + messages); in the last iteration `out` [C][pixels] instead.
template <class T>
__global__ void __launch_bounds__(kLatticeThreads)
    update(const __grid_constant__ Messages<T> messages, bool first, const T* logits, int64_t pixels,
           int64_t C, T* q, T* out) {
  const int64_t pixel = first_row();
  const bool there = pixel < pixels;
  T* own = q + pixel * C;
  auto each_class = [&](auto f) {
    if (there)
      for (int64_t c = threadIdx.x; c < C; c += blockDim.x) f(c);
  };
  each_class([&](int64_t c) {
    T logit = logits[pixel * C + c];
    if (!first && messages.gaussian_compat != 0)
      logit += messages.gaussian_compat * messages.gaussian.slice(pixel, C, c);
    if (!first && messages.bilateral_compat != 0)
      logit += messages.bilateral_compat * messages.bilateral.slice(pixel, C, c);
    own[c] = logit;
  });
  __syncthreads();
  T largest = there ? own[0] : T(0);
  for (int64_t c = 1; there && c < C; ++c) largest = own[c] > largest ? own[c] : largest;
  __syncthreads();
  each_class([&](int64_t c) { own[c] = std::exp(own[c] - largest); });
  __syncthreads();
  const T sum = sum_in_lanes(own, there ? C : 0);
  __syncthreads();
  const T inverse = T(1) / sum;
  each_class([&](int64_t c) { (out ? out[c * pixels + pixel] : own[c]) = own[c] * inverse; });
}

template <class T>
Tensor mean_field(const CudaCall& call, const Tensor& images, const Tensor& probabilities,
                  const CrfSettings& s) {
  const int64_t B = probabilities.size(0), C = probabilities.size(1), H = probabilities.size(2),
                W = probabilities.size(3), pixels = H * W;
  Tensor result = new_on_device(probabilities, {B, C, H, W}, scalar_type_of<T>);
  if (B * C * pixels == 0) return result;
  STD_TORCH_CHECK(pixels <= kMostPixels, kOp, ": images must be of at most ", kMostPixels,
                  " pixels for the CUDA kernel, which numbers their lattice corners in 32 bits, got ", H,
                  " by ", W);
  using Gaussian = DeviceLattice<T, 2>;
  using Bilateral = DeviceLattice<T, 5>;
  auto numbers = [&](int64_t count) { return new_on_device(probabilities, {count}, scalar_type_of<T>); };
  Tensor logits = numbers(pixels * C), q = numbers(pixels * C);
  Tensor scratch = numbers(s.has_bilateral()  ? Bilateral::room(pixels, C)
                           : s.has_gaussian() ? Gaussian::room(pixels, C)
                                              : 0);
  T* shared = scratch.mutable_data_ptr<T>();
  Messages<T> messages{};
  std::optional<Gaussian> gaussian;
  if (s.has_gaussian()) {
    const PixelFeatures<2> features{s.gaussian_sxy};
    gaussian.emplace(call, lattice_of(kOp, "gaussian", features, H, W), features, images, 0, C, shared);
    messages.gaussian = gaussian->view();
    messages.gaussian_compat = T(s.gaussian_compat);
  }
  const dim3 block = row_block(C), grid = grid_of((pixels + block.y - 1) / block.y);
  for (int64_t b = 0; b < B; ++b) {
    std::optional<Bilateral> bilateral;
    if (s.has_bilateral()) {
      const PixelFeatures<5> features{s.bilateral_sxy, s.bilateral_srgb};
      bilateral.emplace(call, lattice_of(kOp, "bilateral", features, H, W), features, images, b, C, shared);
      messages.bilateral = bilateral->view();
      messages.bilateral_compat = T(s.bilateral_compat);
    }
    launch(call, take_logits<T>, grid, block, 0, AnyView<4>::of(probabilities), b,
           logits.mutable_data_ptr<T>());
    T* const out = result.mutable_data_ptr<T>() + b * C * pixels;
    for (int64_t i = 0; i <= s.iterations; ++i) {
      if (i > 0 && gaussian) gaussian->filter(q.mutable_data_ptr<T>(), C);
      if (i > 0 && bilateral) bilateral->filter(q.mutable_data_ptr<T>(), C);
      launch(call, update<T>, grid, block, 0, messages, i == 0, logits.mutable_data_ptr<T>(), pixels, C,
             q.mutable_data_ptr<T>(), i == s.iterations ? out : nullptr);
    }
  }
  return result;
}

Tensor dense_crf_cuda(const Tensor& images, const Tensor& probabilities, int64_t iterations,
                      double gaussian_sxy, double gaussian_compat, double bilateral_sxy,
                      double bilateral_srgb, double bilateral_compat) {
  check_crf(kOp, images, probabilities);
  const CudaCall call(kOp, probabilities);
  const CrfSettings settings{iterations,    gaussian_sxy,   gaussian_compat,
                             bilateral_sxy, bilateral_srgb, bilateral_compat};
  Tensor result;
  with_accumulation({probabilities.scalar_type()}, [&](auto zero) {
    result = mean_field<decltype(zero)>(call, images, probabilities, settings);
  });
  return result;
}

}  // namespace

PSSL_REGISTER_CUDA(m) { m.impl("dense_crf", TORCH_BOX(&dense_crf_cuda)); }
