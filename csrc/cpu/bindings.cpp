// The only pybind11 file of the CPU extension: one bind() an entry point, no logic.
//
// This file is compiled for the baseline instruction set, since inline functions it shares with
// the standard library must run on every machine; only what sits behind a Kernels table may use
// more.
#include <omp.h>
#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "../ops.h"
#include "call_memory.h"

namespace py = pybind11;

namespace slimkernels {

// SLIM_ISA_LIST(apply), which setup.py defines, is apply(isa) for each, the slowest first.
#define SLIM_EXTERN(isa) extern const Kernels kernels_##isa;
SLIM_ISA_LIST(SLIM_EXTERN)

struct InstructionSet {
  std::string name;
  const Kernels* kernels;
  bool available;
};

bool cpu_has(const std::string& isa) {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq");
  if (isa == "avx2") return avx2;
  if (isa == "avx512") return avx512;
  if (isa == "avx512bf16") return avx512 && __builtin_cpu_supports("avx512bf16");
#endif
  return isa == "base";
}

// Linux gives a process AMX's registers only when it asks. It is asked when the module is loaded,
// since isas_available() and what runs afterwards depend on the answer.
bool cpu_has_amx() {
#if defined(SLIM_COMPILER_HAS_AMX) && defined(__linux__)
  constexpr long kAskPermission = 0x1023,
                 kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILE_DATA
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;  // of leaf 7's EDX
  unsigned a = 0, b = 0, c = 0, d = 0;  // not __builtin_cpu_supports: old compilers know no AMX
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kBf16) && (d & kTile) &&
         syscall(SYS_arch_prctl, kAskPermission, kTileData) == 0;
#else
  return false;
#endif
}

const std::vector<InstructionSet>& instruction_sets() {
#define SLIM_ENTRY(isa) {#isa, &kernels_##isa, cpu_has(#isa)},
  static const std::vector<InstructionSet> sets = [] {
    std::vector<InstructionSet> all = {SLIM_ISA_LIST(SLIM_ENTRY)};
    const InstructionSet best = all.back();
#if defined(SLIM_COMPILER_HAS_AMX)
    if (best.name == "avx512bf16")
      all.push_back({"amx", best.kernels, best.available && cpu_has_amx()});
#endif
    return all;
  }();
  return sets;
}

const InstructionSet* active = nullptr;
bool has_amx = false;

void set_isa(const std::string& name) {
  for (const auto& set : instruction_sets())
    if (name == set.name && set.available) {
      active = &set;
      has_amx = name == "amx";
      return;
    }
  throw std::invalid_argument("no kernels for instruction set '" + name + "' on this machine");
}

struct OutOfMemory : std::bad_alloc {
  const char* what() const noexcept override {
    return "slimkernels: not enough memory for a CPU kernel's intermediate results";
  }
};

void out_of_memory() { throw OutOfMemory(); }

// Pointers cross the language border as integers (tensor.data_ptr(), 0 for None).
template <typename T>
struct Wire {
  using type = T;
};
template <typename T>
struct Wire<T*> {
  using type = uintptr_t;
};

// Each takes the number of threads first. OpenMP keeps it per calling thread, where torch sets it
// only when that thread first runs a parallel op of torch's own.
template <typename... Args>
void bind(py::module_& m, const char* name, void (*Kernels::*entry)(Args...)) {
  m.def(
      name,
      [entry](int threads, typename Wire<Args>::type... args) {
        omp_set_num_threads(threads);
        (active->kernels->*entry)((Args)(args)...);
      },
      py::call_guard<py::gil_scoped_release>());
}

}  // namespace slimkernels

PYBIND11_MODULE(_cpu, m) {
  using namespace slimkernels;
  for (const auto& set : instruction_sets())
    if (set.available) set_isa(set.name);

  m.def("isas_built", [] {
    std::vector<std::string> names;
    for (const auto& set : instruction_sets()) names.push_back(set.name);
    return names;
  });
  m.def("isas_available", [] {
    std::vector<std::string> names;
    for (const auto& set : instruction_sets())
      if (set.available) names.push_back(set.name);
    return names;
  });
  m.def("isa", [] { return active ? active->name : std::string(); });
  m.def("set_isa", &set_isa);

  if (add_call_memory(m.ptr()) != 0) throw py::error_already_set();

  bind(m, "layer_norm_forward", &Kernels::layer_norm_forward);
  bind(m, "layer_norm_backward", &Kernels::layer_norm_backward);
  bind(m, "rms_norm_forward", &Kernels::rms_norm_forward);
  bind(m, "rms_norm_backward", &Kernels::rms_norm_backward);
  bind(m, "add_layer_norm_forward", &Kernels::add_layer_norm_forward);
  bind(m, "add_layer_norm_backward", &Kernels::add_layer_norm_backward);
  bind(m, "add_rms_norm_forward", &Kernels::add_rms_norm_forward);
  bind(m, "add_rms_norm_backward", &Kernels::add_rms_norm_backward);
  bind(m, "group_norm_forward", &Kernels::group_norm_forward);
  bind(m, "group_norm_backward", &Kernels::group_norm_backward);
  bind(m, "scaled_dot_product_attention_forward", &Kernels::scaled_dot_product_attention_forward);
  bind(m, "scaled_dot_product_attention_backward", &Kernels::scaled_dot_product_attention_backward);
  bind(m, "activation_forward", &Kernels::activation_forward);
  bind(m, "activation_backward", &Kernels::activation_backward);
  bind(m, "gated_forward", &Kernels::gated_forward);
  bind(m, "gated_backward", &Kernels::gated_backward);
  bind(m, "bias_dropout_add_forward", &Kernels::bias_dropout_add_forward);
  bind(m, "bias_dropout_add_backward", &Kernels::bias_dropout_add_backward);
  bind(m, "embedding_forward", &Kernels::embedding_forward);
  bind(m, "embedding_backward", &Kernels::embedding_backward);
  bind(m, "embedding_table_backward", &Kernels::embedding_table_backward);
  bind(m, "rotary", &Kernels::rotary);
  bind(m, "cross_entropy_forward", &Kernels::cross_entropy_forward);
  bind(m, "cross_entropy_backward", &Kernels::cross_entropy_backward);
  bind(m, "softmax_forward", &Kernels::softmax_forward);
  bind(m, "softmax_backward", &Kernels::softmax_backward);
  bind(m, "softmax_columns_forward", &Kernels::softmax_columns_forward);
  bind(m, "softmax_columns_backward", &Kernels::softmax_columns_backward);
  bind(m, "sum_of_squares", &Kernels::sum_of_squares);
  bind(m, "adamw", &Kernels::adamw);
  bind(m, "lamb", &Kernels::lamb);
  bind(m, "muon_direction", &Kernels::muon_direction);
  bind(m, "muon_apply", &Kernels::muon_apply);
}
