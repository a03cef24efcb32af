// The importable module pssl_ext._C. Loading it registers the kernels, because the operators' objects are linked into
// the same library; its functions tell how it was built and govern what memory it keeps.
//
// No header of torch's in this file: 2.11 refuses pybind11 beside its stable ABI (see module_flags in build_tools/native.py).
#include <pybind11/pybind11.h>

#include <sstream>
#include <string>

#include "common/kept_memory.h"
#include "common/simd.h"
#include "common/threads.h"
#include "pssl_build_config.h"  // written by build_tools/native.py

namespace py = pybind11;

namespace {

#if defined(__clang__)
constexpr const char* kCompiler = "Clang " __clang_version__;
#elif defined(__GNUC__)
constexpr const char* kCompiler = "GCC " __VERSION__;
#else
constexpr const char* kCompiler = "unknown";
#endif

py::list split(const std::string& text) {
  py::list items;
  std::istringstream stream(text);
  for (std::string item; std::getline(stream, item, ';');) items.append(item);
  return items;
}

py::object text_or_none(const std::string& text) {
  if (text.empty()) return py::none();
  return py::str(text);
}

// No date, host or path: the same sources give the same library.
py::dict build_info() {
  py::dict simd;
  simd["compiled"] = split(PSSL_SIMD_LEVELS);
  simd["supported"] = pssl::simd_name(pssl::simd_supported());
  simd["chosen"] = pssl::simd_name(pssl::simd_level());

  py::dict info;
  info["version"] = PSSL_VERSION;
  info["compiler"] = kCompiler;
  info["cxx_standard"] = static_cast<long>(__cplusplus);
  info["torch"] = PSSL_TORCH_VERSION;
  info["torch_target_version"] = PSSL_TORCH_TARGET;
  info["cuda"] = text_or_none(PSSL_CUDA_VERSION);
  info["cuda_architectures"] = split(PSSL_CUDA_ARCHITECTURES);
  info["simd"] = simd;
#ifdef _OPENMP
  info["openmp"] = static_cast<long>(_OPENMP);
#else
  info["openmp"] = py::none();  // kernels run on torch's own threads, whatever those are
#endif
  info["threads"] = pssl::torch_threads();
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  // a wrong PSSL_SIMD or PSSL_KEEP_MIB fails the import, with the reason
  pssl::simd_level();
  pssl::keep_from_environment();
  m.doc() = "Native kernels of pssl_ext; importing this registers them with torch.";
  m.def("build_info", &build_info, "How this library was built and what it uses on this machine, as a dict.");
  m.def("keep_memory", &pssl::keep_memory, "Keeps at most this many MiB of freed results from now on.");
  m.def("release_memory", &pssl::release_kept,
        "Gives kept memory back to the system; returns how many bytes.");
}
