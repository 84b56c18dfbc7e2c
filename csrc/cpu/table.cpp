// The entry points of one instruction set, in one table. Compiled once for each set, with
// SLIM_ISA naming it.
#include "../ops.h"
#include "kernels.h"

#define SLIM_TABLE_(isa) kernels_##isa
#define SLIM_TABLE(isa) SLIM_TABLE_(isa)

namespace slimkernels {

extern const Kernels SLIM_TABLE(SLIM_ISA);
const Kernels SLIM_TABLE(SLIM_ISA) = {
    SLIM_ISA::layer_norm_forward,
    SLIM_ISA::layer_norm_backward,
    SLIM_ISA::rms_norm_forward,
    SLIM_ISA::rms_norm_backward,
    SLIM_ISA::add_layer_norm_forward,
    SLIM_ISA::add_layer_norm_backward,
    SLIM_ISA::add_rms_norm_forward,
    SLIM_ISA::add_rms_norm_backward,
    SLIM_ISA::group_norm_forward,
    SLIM_ISA::group_norm_backward,
    SLIM_ISA::scaled_dot_product_attention_forward,
    SLIM_ISA::scaled_dot_product_attention_backward,
    SLIM_ISA::activation_forward,
    SLIM_ISA::activation_backward,
    SLIM_ISA::gated_forward,
    SLIM_ISA::gated_backward,
    SLIM_ISA::bias_dropout_add_forward,
    SLIM_ISA::bias_dropout_add_backward,
    SLIM_ISA::embedding_forward,
    SLIM_ISA::embedding_backward,
    SLIM_ISA::embedding_table_backward,
    SLIM_ISA::rotary,
    SLIM_ISA::cross_entropy_forward,
    SLIM_ISA::cross_entropy_backward,
    SLIM_ISA::softmax_forward,
    SLIM_ISA::softmax_backward,
    SLIM_ISA::softmax_columns_forward,
    SLIM_ISA::softmax_columns_backward,
    SLIM_ISA::sum_of_squares,
    SLIM_ISA::adamw,
    SLIM_ISA::lamb,
    SLIM_ISA::muon_direction,
    SLIM_ISA::muon_apply,
};

}  // namespace slimkernels
