// What operators on CAMs share, on every device.
#pragma once

#include "common/bilinear.h"
#include "common/types.h"

namespace pssl::PSSL_SIMD_NAMESPACE {

constexpr double kMaximumEps = 1e-5;  // added to a CAM's maximum before dividing, as in the references

// Whether `value` takes the place of the best so far: the first of the largest stays, NaN counts as larger than all, as in
// torch.amax. For numbers and vectors of them.
template <class T>
PSSL_HD inline auto beats(T value, T best) {
  return (value > best) | (value != value);
}

// NaN stays, as in torch.relu.
template <class T>
PSSL_HD inline T relu(T value) {
  return value < T(0) ? T(0) : value;
}

// double if any of the maps is, else float
inline ScalarType accumulation_of(const std::vector<Tensor>& maps) {
  for (const Tensor& t : maps)
    if (t.scalar_type() == ScalarType::Double) return ScalarType::Double;
  return ScalarType::Float;
}

inline void check_maps(const char* op, const char* argument, const std::vector<Tensor>& maps,
                       const Tensor& image_labels, int64_t height, int64_t width) {
  STD_TORCH_CHECK(height >= 1 && width >= 1, op, ": size must be at least 1 by 1");
  STD_TORCH_CHECK(image_labels.dim() == 2, op, ": image_labels must be [B,K]");
  STD_TORCH_CHECK(!maps.empty(), op, ": ", argument, " must be at least one map");
  for (const Tensor& t : maps)
    STD_TORCH_CHECK(t.dim() == 4 && t.size(0) == image_labels.size(0) && t.size(1) == image_labels.size(1) &&
                        (t.numel() > 0 || t.size(0) * t.size(1) == 0),
                    op, ": ", argument, " must be [B,K,h,w] with at least one cell");
}

// The arguments of cam_sweep: N of [k,h,w], [k] and [H,W].
inline void check_images(const char* op, const std::vector<Tensor>& cams,
                         const std::vector<Tensor>& class_ids, const std::vector<Tensor>& ground_truth,
                         const Tensor& thresholds, int64_t num_regions) {
  STD_TORCH_CHECK(cams.size() == class_ids.size() && cams.size() == ground_truth.size(), op,
                  ": cams, class_ids and ground_truth must be lists of one length");
  STD_TORCH_CHECK(thresholds.dim() == 1 && num_regions >= 1, op,
                  ": thresholds must be [T], num_regions at least 1");
  for (size_t i = 0; i < cams.size(); ++i) {
    STD_TORCH_CHECK(cams[i].dim() == 3 && class_ids[i].dim() == 1 && ground_truth[i].dim() == 2 &&
                        class_ids[i].size(0) == cams[i].size(0),
                    op, ": cams must be [k,h,w], class_ids [k], ground_truth [H,W]");
    STD_TORCH_CHECK(cams[i].numel() > 0 || cams[i].size(0) == 0 || ground_truth[i].numel() == 0, op,
                    ": cams have no cells");
  }
}

}  // namespace pssl::PSSL_SIMD_NAMESPACE
