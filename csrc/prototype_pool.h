// The arguments of prototype_pool, for every device.
#pragma once

#include "common/label_pixels.h"
#include "common/types.h"

namespace pssl::PSSL_SIMD_NAMESPACE {

struct PoolArguments {
  const Tensor &features, &regions;
  const std::optional<Tensor>& weights;
  int64_t C;
  bool normalize;
  int64_t ignore_index;
  bool align_corners;
  double eps;

  int64_t H() const { return regions.size(regions.dim() - 2); }
  int64_t W() const { return regions.size(regions.dim() - 1); }
  bool soft() const { return regions.dim() == 4; }
  bool same_grid() const { return H() == features.size(2) && W() == features.size(3); }
  void check(const char* op) const {
    const int64_t B = features.size(0);
    STD_TORCH_CHECK(features.dim() == 4, op, ": features must be [B,D,h,w]");
    STD_TORCH_CHECK((regions.dim() == 3 || (regions.dim() == 4 && regions.size(1) == C)) &&
                        regions.size(0) == B && C >= 1,
                    op, ": regions must be [B,H,W] or soft masks [B,num_regions,H,W]");
    STD_TORCH_CHECK(!weights || (weights->dim() == 3 && weights->size(0) == B && weights->size(1) == H() &&
                                 weights->size(2) == W()),
                    op, ": weights must be [B,H,W]");
    STD_TORCH_CHECK(features.size(2) * features.size(3) > 0 || B * H() * W() == 0, op,
                    ": features have no cells");
  }
};

}  // namespace pssl::PSSL_SIMD_NAMESPACE
