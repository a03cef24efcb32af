#include "common/threads.h"

#include <torch/csrc/stable/ops.h>

namespace pssl {

uint32_t torch_threads() { return torch::stable::get_num_threads(); }

}  // namespace pssl
