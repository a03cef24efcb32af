// The classes that are present in each image of a batch.
#pragma once

#include "common/cam_maps.h"
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

}  // namespace pssl::PSSL_SIMD_NAMESPACE
