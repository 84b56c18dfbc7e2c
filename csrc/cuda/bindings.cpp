// The only pybind11 file of the CUDA extension: one bind() an entry point, no logic.
#include <pybind11/pybind11.h>

#include "device.h"
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

}  // namespace slimkernels

PYBIND11_MODULE(_cuda, m) {
  using namespace slimkernels;
  m.attr("architectures") = SLIM_CUDA_ARCHITECTURES;  // as TORCH_CUDA_ARCH_LIST names them
  m.def("no_device", &no_device);
  m.def("activation_parts", &activation_parts);
  m.def("norm_programs", &norm_programs);
  bind(m, "activation_forward", &activation_forward);
  bind(m, "activation_backward", &activation_backward);
  bind(m, "cross_entropy_forward", &cross_entropy_forward);
  bind(m, "cross_entropy_backward", &cross_entropy_backward);
  bind(m, "layer_norm_forward", &norm_forward<false>);
  bind(m, "layer_norm_backward", &norm_backward<false>);
  bind(m, "rms_norm_forward", &norm_forward<true>);
  bind(m, "rms_norm_backward", &norm_backward<true>);
  bind(m, "softmax_forward", &softmax_forward);
  bind(m, "softmax_backward", &softmax_backward);
  bind(m, "attention_forward", &attention_forward);
  bind(m, "attention_backward", &attention_backward);
  m.def("attention_backward_bytes", &attention_backward_bytes);
}
