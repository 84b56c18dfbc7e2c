// Declarations of the kernels that table.cpp collects: the same signatures as ops.h's table, in
// the namespace of the instruction set being compiled.
#pragma once
#include "../ops.h"

namespace slimkernels::SLIM_ISA {

template <typename Member>
struct Signature;
template <typename... Args>
struct Signature<void (*Kernels::*)(Args...)> {
  using type = void(Args...);
};
// The table in ops.h is the one place where a signature is written down.
#define SLIM_DECLARE(entry) Signature<decltype(&Kernels::entry)>::type entry

SLIM_DECLARE(layer_norm_forward);
SLIM_DECLARE(layer_norm_backward);
SLIM_DECLARE(rms_norm_forward);
SLIM_DECLARE(rms_norm_backward);
SLIM_DECLARE(add_layer_norm_forward);
SLIM_DECLARE(add_layer_norm_backward);
SLIM_DECLARE(add_rms_norm_forward);
SLIM_DECLARE(add_rms_norm_backward);
SLIM_DECLARE(group_norm_forward);
SLIM_DECLARE(group_norm_backward);
SLIM_DECLARE(scaled_dot_product_attention_forward);
SLIM_DECLARE(scaled_dot_product_attention_backward);
SLIM_DECLARE(activation_forward);
SLIM_DECLARE(activation_backward);
SLIM_DECLARE(gated_forward);
SLIM_DECLARE(gated_backward);
SLIM_DECLARE(bias_dropout_add_forward);
SLIM_DECLARE(bias_dropout_add_backward);
SLIM_DECLARE(embedding_forward);
SLIM_DECLARE(embedding_backward);
SLIM_DECLARE(embedding_table_backward);
SLIM_DECLARE(rotary);
SLIM_DECLARE(cross_entropy_forward);
SLIM_DECLARE(cross_entropy_backward);
SLIM_DECLARE(softmax_forward);
SLIM_DECLARE(softmax_backward);
SLIM_DECLARE(softmax_columns_forward);
SLIM_DECLARE(softmax_columns_backward);
SLIM_DECLARE(sum_of_squares);
SLIM_DECLARE(adamw);
SLIM_DECLARE(lamb);
SLIM_DECLARE(muon_direction);
SLIM_DECLARE(muon_apply);

}  // namespace slimkernels::SLIM_ISA
