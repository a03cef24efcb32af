// The classes that are present in each image of a batch.
#pragma once

#include "common/tensors.h"

namespace pssl::PSSL_SIMD_NAMESPACE {

// For each image the classes k with image_labels[b,k] != 0, ascending.
inline std::vector<std::vector<int64_t>> present_classes(const Tensor& image_labels) {
  const int64_t B = image_labels.size(0), K = image_labels.size(1);
  std::vector<std::vector<int64_t>> present(B);
  std::vector<double> line(K);
  for (int64_t b = 0; b < B; ++b) {
    read_elements(image_labels, b * image_labels.stride(0), image_labels.stride(1), K, line.data());
    for (int64_t k = 0; k < K; ++k)
      if (line[k] != 0) present[b].push_back(k);
  }
  return present;
}

// double if any of the maps is, else float
inline ScalarType accumulation_of(const std::vector<Tensor>& maps) {
  for (const Tensor& t : maps)
    if (t.scalar_type() == ScalarType::Double) return ScalarType::Double;
  return ScalarType::Float;
}

inline void check_maps(const char* op, const char* argument, const std::vector<Tensor>& maps,
                       const Tensor& image_labels) {
  STD_TORCH_CHECK(image_labels.dim() == 2, op, ": image_labels must be [B,K]");
  STD_TORCH_CHECK(!maps.empty(), op, ": ", argument, " must be at least one map");
  for (const Tensor& t : maps)
    STD_TORCH_CHECK(t.dim() == 4 && t.size(0) == image_labels.size(0) && t.size(1) == image_labels.size(1) &&
                        (t.numel() > 0 || t.size(0) * t.size(1) == 0),
                    op, ": ", argument, " must be [B,K,h,w] with at least one cell");
}

}  // namespace pssl::PSSL_SIMD_NAMESPACE
