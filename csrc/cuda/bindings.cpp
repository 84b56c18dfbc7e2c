// The only pybind11 file of the CUDA extension: one bind() an entry point, no logic.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>

#include <string>

#include "ops.h"

namespace py = pybind11;

namespace slimkernels {

// Pointers cross the language border as integers (tensor.data_ptr()).
template <typename T>
struct Wire {
  using type = T;
};
template <typename T>
struct Wire<T*> {
  using type = uintptr_t;
};

template <typename... Args>
void bind(py::module_& m, const char* name, void (*entry)(Args...)) {
  m.def(
      name, [entry](typename Wire<Args>::type... args) { entry((Args)(args)...); },
      py::call_guard<py::gil_scoped_release>());
}

// Why no kernel can run here, in a sentence; empty if one can. Asked for by slimkernels.info, never
// at import: the answer takes the driver's start.
std::string no_device() {
  int count = 0, driver = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  cudaGetLastError();  // without a driver every call fails: leave no error behind
  if (error == cudaSuccess && count > 0) return "";
  if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0)
    return "this machine has no CUDA driver";
  if (error == cudaSuccess || error == cudaErrorNoDevice) return "this machine has no CUDA device";
  return std::string("CUDA cannot start: ") + cudaGetErrorString(error);
}

}  // namespace slimkernels

PYBIND11_MODULE(_cuda, m) {
  using namespace slimkernels;
  m.def("no_device", &no_device);
  bind(m, "activation_forward", &activation_forward);
  bind(m, "activation_backward", &activation_backward);
  bind(m, "cross_entropy_forward", &cross_entropy_forward);
  bind(m, "cross_entropy_backward", &cross_entropy_backward);
  bind(m, "softmax_forward", &softmax_forward);
  bind(m, "softmax_backward", &softmax_backward);
}
