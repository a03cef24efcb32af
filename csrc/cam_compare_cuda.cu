// cam_compare on CUDA. The pixels of a present class of an image are cut into chunks, a block each; the maps are resized
// where they are needed, so that no resized map exists. Absent classes are not read.
//
//   products  <M_s,S_t>, |M_s|^2 and |S_t|^2 of each chunk: what the attention is made of
//   loss      sums of |M_s - target_s| of each chunk; the chunk that comes last adds them up, in their order
//   gradient  a block for a part of the class's area, gathering for the cells of all maps there over the pixels that
//             touch them. Other blocks meanwhile write the zeros of absent classes: most of what there is to write
//
// Forward and backward are two launches each. Nothing is added in an order that is not fixed.
#include <tuple>

#include "cam_compare_gradient_cuda.cuh"

namespace {

using namespace pssl;
using namespace pssl::PSSL_SIMD_NAMESPACE;
using namespace pssl::PSSL_SIMD_NAMESPACE::compare;

constexpr const char* kOp = "cam_compare";

// partial[pair, q, chunk] of the chunk's pixels: the squares of the maps, then the products [mains, supports].
template <class T>
__global__ void __launch_bounds__(Tile::kThreads)
    products(const __grid_constant__ Problem p, double* partial, int32_t* arrived) {
  PSSL_DYNAMIC_SHARED(unsigned char, memory);
  const Scratch<T> scratch(memory, p);
  T* sums = scratch.more;  // [quantities][lanes], each written by one thread
  for (int64_t i = blockIdx.x * int64_t(Tile::kThreads) + block_thread(); i < p.pairs();
       i += gridDim.x * int64_t(Tile::kThreads))
    arrived[i] = 0;
  if (!p.cosine) return;
  const int lane = block_thread() % kWarp, warp = block_thread() / kWarp;
  constexpr int kWarps = Tile::kThreads / kWarp;
  each_present(p, p.chunks(), blockIdx.x, gridDim.x, [&](int64_t pair, int64_t chunk) {
    for (int q = warp; q < p.quantities(); q += kWarps) sums[q * kWarp + lane] = 0;
    for (int64_t t = chunk; t < p.tiles(); t += p.chunks()) {
      scratch.read(p, pair, Tile::at(t, p.H, p.W));
      __syncthreads();
      for (int q = warp; q < p.quantities(); q += kWarps) {
        const int of = q - p.maps.count;
        const int a = of < 0 ? q : of / p.supports(), b = of < 0 ? q : p.mains + of % p.supports();
        T sum = sums[q * kWarp + lane];
        for (int i = lane; i < Tile::kThreads; i += kWarp)
          sum += scratch.values[a * Tile::kThreads + i] * scratch.values[b * Tile::kThreads + i];
        sums[q * kWarp + lane] = sum;
      }
    }
    double* out = partial + pair * p.quantities() * p.chunks() + chunk;
    for (int q = warp; q < p.quantities(); q += kWarps) {
      const T sum = warp_reduce(sums[q * kWarp + lane], Plus{});
      if (lane == 0) out[q * p.chunks()] = sum;
    }
  });
}

// out[b,k] = the sum over pixels and main maps of |M_s - target_s|; sums[pair, chunk] on the way.
template <class T>
__global__ void __launch_bounds__(Tile::kThreads)
    loss(const __grid_constant__ Problem p, const double* partial, double* sums, int32_t* arrived, T* out) {
  PSSL_DYNAMIC_SHARED(unsigned char, memory);
  PSSL_SHARED(warps, T[kWarp]);
  const Scratch<T> scratch(memory, p);
  for (int64_t i = blockIdx.x * int64_t(Tile::kThreads) + block_thread(); i < p.pairs();
       i += gridDim.x * int64_t(Tile::kThreads))
    if (!p.present(i)) out[i] = 0;
  T* share = scratch.more;
  each_present(p, p.chunks(), blockIdx.x, gridDim.x, [&](int64_t pair, int64_t chunk) {
    find_share(p, scratch, partial, pair, share);
    T sum = 0;
    for (int64_t t = chunk; t < p.tiles(); t += p.chunks()) {
      scratch.read(p, pair, Tile::at(t, p.H, p.W));
      for (int s = 0; s < p.mains; ++s) sum += magnitude(scratch.difference(p, share, s));
    }
    sum = block_sum(sum, warps);
    if (block_thread() >= kWarp) return;
    volatile double* of_pair = sums + pair * p.chunks();
    int before = 0;
    if (block_thread() == 0) {
      of_pair[chunk] = sum;
      __threadfence();  // the sum is there before the count says so
      before = atomicAdd(arrived + pair, 1);
    }
    if (__shfl_sync(kAllLanes, before, 0) != p.chunks() - 1) return;
    __threadfence();
    const double own = block_thread() < p.chunks() ? of_pair[block_thread()] : 0.0;
    const double total = warp_reduce(own, Plus{});
    if (block_thread() == 0) out[pair] = T(total);
  });
}

// What the attention is made of, and the counters of `loss`, cleared.
struct Partials {
  Tensor products, arrived;

  Partials(const Tensor& on, const Problem& p)
      : products(
            new_on_device(on, {p.cosine ? p.pairs() * p.chunks() * p.quantities() : 0}, ScalarType::Double)),
        arrived(new_on_device(on, {p.pairs()}, ScalarType::Int)) {}
};

template <class T>
Partials find_products(const CudaCall& call, const Problem& p, const Tensor& on) {
  Partials found(on, p);
  const int64_t shared = Scratch<T>::bytes(p, p.quantities() * int64_t(kWarp));
  launch(call, products<T>, grid_of(call.blocks_for(p.pairs() * p.chunks(), kBlocks)), Tile::block(), shared,
         p, found.products.mutable_data_ptr<double>(), found.arrived.mutable_data_ptr<int32_t>());
  return found;
}

Problem problem_of(const std::vector<Tensor>& main, const std::vector<Tensor>& support,
                   const Tensor& image_labels, int64_t height, int64_t width, bool cosine) {
  check_maps(kOp, "main", main, image_labels, height, width);
  check_maps(kOp, "support", support, image_labels, height, width);
  Problem p{{},
            int(main.size()),
            AnyView<2>::of(image_labels),
            image_labels.size(0),
            image_labels.size(1),
            height,
            width,
            cosine};
  p.maps.add(kOp, "main", main);
  p.maps.add(kOp, "support", support);
  return p;
}

template <class F>
void with_accumulation_of(const std::vector<Tensor>& main, const std::vector<Tensor>& support, const F& f) {
  with_accumulation({accumulation_of(main), accumulation_of(support)}, f);
}

Tensor cam_compare_cuda(const std::vector<Tensor>& main, const std::vector<Tensor>& support,
                        const Tensor& image_labels, int64_t height, int64_t width, bool cosine) {
  const Problem p = problem_of(main, support, image_labels, height, width, cosine);
  const CudaCall call(kOp, image_labels);
  Tensor out;
  with_accumulation_of(main, support, [&](auto zero) {
    using T = decltype(zero);
    out = new_on_device(image_labels, {p.B, p.K}, scalar_type_of<T>);
    Tensor sums = new_on_device(image_labels, {p.pairs() * p.chunks()}, ScalarType::Double);
    Partials found = find_products<T>(call, p, image_labels);
    launch(call, loss<T>, grid_of(call.blocks_for(p.pairs() * p.chunks(), kBlocks)), Tile::block(),
           Scratch<T>::bytes(p, p.mains * p.supports()), p, found.products.mutable_data_ptr<double>(),
           sums.mutable_data_ptr<double>(), found.arrived.mutable_data_ptr<int32_t>(),
           out.mutable_data_ptr<T>());
  });
  return out;
}

std::tuple<std::vector<Tensor>, std::vector<Tensor>> cam_compare_backward_cuda(
    const std::optional<Tensor>& grad_sums, const std::vector<Tensor>& main,
    const std::vector<Tensor>& support, const Tensor& image_labels, int64_t height, int64_t width,
    bool cosine, const std::vector<bool>& needs) {
  const Problem p = problem_of(main, support, image_labels, height, width, cosine);
  const CudaCall call(kOp, image_labels);
  std::vector<Tensor> grad_main, grad_support;
  Gradients g;
  g.of_sums = AnyView<2>::of(grad_sums);
  auto allocate = [&](const std::vector<Tensor>& side, bool needed, int first, std::vector<Tensor>& grads) {
    for (size_t i = 0; i < side.size() && needed; ++i) {
      grads.push_back(torch::stable::empty_like(side[i]));
      g.add(first + int(i), AnyView<4>::of(grads.back()), p.pairs());
    }
  };
  allocate(main, needs[0], 0, grad_main);
  allocate(support, needs[1], p.mains, grad_support);
  const int64_t pieces = g.first_piece[g.count];
  if (pieces == 0) return {grad_main, grad_support};
  with_accumulation_of(main, support, [&](auto zero) {
    using T = decltype(zero);
    Partials found = find_products<T>(call, p, image_labels);
    g.cut(height, width, sizeof(T));
    g.workers = g.of_sums.data ? call.blocks_for(p.pairs() * g.parts(), kWorkers) : 0;
    launch(call, gradient<T>, grid_of(g.workers + call.blocks_for(pieces, kFillers)), Tile::block(),
           Scratch<T>::bytes(p, p.mains * p.supports() + g.cells), p, g,
           found.products.mutable_data_ptr<double>());
  });
  return {grad_main, grad_support};
}

}  // namespace

PSSL_REGISTER_CUDA(m) {
  m.impl("cam_compare", TORCH_BOX(&cam_compare_cuda));
  m.impl("cam_compare_backward", TORCH_BOX(&cam_compare_backward_cuda));
}
