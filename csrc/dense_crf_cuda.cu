// dense_crf on CUDA: mean field of a fully-connected CRF, the pairwise sums by filtering on two lattices, image by image.
//
// As on the CPU, with the weights of splat and slice scaled by D^-1/2 filtering is the normalised kernel. Everything of
// an iteration lies on the device: a launch takes the messages and the softmax, the others filter its result.
#include <limits>

#include "dense_crf_lattice_cuda.cuh"

namespace {

using namespace pssl;
using namespace pssl::PSSL_SIMD_NAMESPACE;

constexpr const char* kOp = "dense_crf";
constexpr int64_t kMostPixels = ((int64_t(1) << 31) - 1) / LatticeView<float, 5>::kCorners;

// logits [pixels][packs] of image b: -unary; that of what fills up the last pack is a probability of 0
template <class T>
__global__ void __launch_bounds__(kLatticeThreads)
    take_logits(const __grid_constant__ AnyView<4> probabilities, int64_t b, Four<T>* logits) {
  const int64_t C = probabilities.size[1], W = probabilities.size[3], pixel = first_row();
  if (pixel >= probabilities.size[2] * W) return;
  const int64_t first = probabilities.offset(b, 0, pixel / W, pixel % W);
  for (int64_t c = threadIdx.x; c < packs_of(C); c += blockDim.x) {
    const Four<T> logit = Four<T>::of([&](int i) {
      if (c * kFour + i >= C) return -std::numeric_limits<T>::infinity();
      const T p = load_floating<T>(probabilities.data, probabilities.type,
                                   first + (c * kFour + i) * probabilities.stride[1]);
      return std::log(std::clamp(p, T(kLowestProbability), T(1)));
    });
    store_pack(logits + pixel * packs_of(C) + c, logit);
  }
}

template <class T>
struct Messages {
  LatticeView<T, 2> gaussian;
  LatticeView<T, 5> bilateral;
  T gaussian_compat, bilateral_compat;  // 0: there is no such lattice
};

// What `combine` makes of the values of a row's threads, in their order. All threads of the block have to come here.
template <class T, class F>
__device__ T row_reduce(T value, F combine, T* scratch) {
  T* const row = scratch + threadIdx.y * blockDim.x;
  row[threadIdx.x] = value;
  __syncthreads();
  T result = row[0];
  for (unsigned i = 1; i < blockDim.x; ++i) result = combine(result, row[i]);
  __syncthreads();
  return result;
}

// q [pixels][packs] = softmax(logits + messages); in the last iteration `out` [C][pixels] instead.
template <class T>
__global__ void __launch_bounds__(kLatticeThreads)
    update(const __grid_constant__ Messages<T> messages, bool first, const Four<T>* logits, int64_t pixels,
           int64_t C, Four<T>* q, T* out) {
  PSSL_SHARED(scratch, T[kLatticeThreads]);
  const int64_t pixel = first_row(), packs = packs_of(C);
  Four<T> kept;  // the thread's first pack; where it has more, those are in q
  auto each_pack = [&](auto f) {
    if (pixel >= pixels) return;
    f(kept, int64_t(threadIdx.x));
    for (int64_t c = threadIdx.x + blockDim.x; c < packs; c += blockDim.x) f(q[pixel * packs + c], c);
  };
  T largest = -std::numeric_limits<T>::infinity(), sum = 0;
  each_pack([&](Four<T>& value, int64_t c) {
    Four<T> logit = load_pack(logits + pixel * packs + c);
    if (!first && messages.gaussian_compat != 0)
      logit += messages.gaussian_compat * messages.gaussian.slice(pixel, packs, c);
    if (!first && messages.bilateral_compat != 0)
      logit += messages.bilateral_compat * messages.bilateral.slice(pixel, packs, c);
    for (T of_class : logit.v) largest = of_class > largest ? of_class : largest;
    value = logit;
  });
  largest = row_reduce(largest, Largest{}, &scratch[0]);
  each_pack([&](Four<T>& value, int64_t) {
    value = Four<T>::of([&](int i) { return std::exp(value.v[i] - largest); });
    sum += (value.v[0] + value.v[1]) + (value.v[2] + value.v[3]);
  });
  const T inverse = T(1) / row_reduce(sum, Plus{}, &scratch[0]);
  each_pack([&](Four<T>& value, int64_t c) {
    const Four<T> share = inverse * value;
    if (!out) store_pack(q + pixel * packs + c, share);
    for (int i = 0; out && i < kFour; ++i)
      if (c * kFour + i < C) out[(c * kFour + i) * pixels + pixel] = share.v[i];
  });
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
  const int64_t packs = packs_of(C);
  auto numbers = [&](int64_t count) {
    return new_on_device(probabilities, {count * kFour}, scalar_type_of<T>);
  };
  Tensor logit_numbers = numbers(pixels * packs), q_numbers = numbers(pixels * packs);
  Tensor scratch = numbers(s.has_bilateral()  ? Bilateral::room(pixels, packs)
                           : s.has_gaussian() ? Gaussian::room(pixels, packs)
                                              : 0);
  Four<T>*const logits = packs_in<T>(logit_numbers), *const q = packs_in<T>(q_numbers),
                *const shared = packs_in<T>(scratch);
  Messages<T> messages{};
  std::optional<Gaussian> gaussian;
  if (s.has_gaussian()) {
    const PixelFeatures<2> features{s.gaussian_sxy};
    gaussian.emplace(call, lattice_of(kOp, "gaussian", features, H, W), features, images, 0, packs, shared);
    messages.gaussian = gaussian->view();
    messages.gaussian_compat = T(s.gaussian_compat);
  }
  const dim3 block = row_block(packs), grid = grid_of((pixels + block.y - 1) / block.y);
  for (int64_t b = 0; b < B; ++b) {
    std::optional<Bilateral> bilateral;
    if (s.has_bilateral()) {
      const PixelFeatures<5> features{s.bilateral_sxy, s.bilateral_srgb};
      bilateral.emplace(call, lattice_of(kOp, "bilateral", features, H, W), features, images, b, packs,
                        shared);
      messages.bilateral = bilateral->view();
      messages.bilateral_compat = T(s.bilateral_compat);
    }
    launch(call, take_logits<T>, grid, block, 0, AnyView<4>::of(probabilities), b, logits);
    T* const out = result.mutable_data_ptr<T>() + b * C * pixels;
    for (int64_t i = 0; i <= s.iterations; ++i) {
      if (i > 0 && gaussian) gaussian->filter(q, packs);
      if (i > 0 && bilateral) bilateral->filter(q, packs);
      launch(call, update<T>, grid, block, 0, messages, i == 0, logits, pixels, C, q,
             i == s.iterations ? out : nullptr);
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
