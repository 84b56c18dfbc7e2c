"""What the tests of attention share: cases, and the functions that are compared."""

import torch
from op_cases import maybe_compiled, skip_unsupported, with_seed

import slimkernels as sk
from slimkernels.ops._attention_reference import (
    scaled_dot_product_attention_reference as attention_reference,
)
from slimkernels.ops._dropout import draw_seed
from slimkernels.testing import assert_op_matches

NAME = "scaled_dot_product_attention"

# B, H, Hkv, Tq, Tk, D, and options. key_lengths and cu_seqlens become int32 tensors.
DENSE = {
    "one": ((1, 1, 1, 1, 1, 1), {}),
    "narrow": ((2, 2, 2, 9, 9, 8), {}),
    "odd": ((1, 2, 2, 37, 37, 33), {"is_causal": True}),
    "cross": ((2, 4, 2, 5, 70, 64), {}),
    "cross causal": ((1, 2, 1, 21, 6, 16), {"is_causal": True, "scale": -0.7}),
    "lengths": ((3, 2, 1, 7, 19, 80), {"key_lengths": [19, 5, 0]}),
    "lengths causal": ((2, 1, 1, 20, 20, 16), {"key_lengths": [3, 17], "is_causal": True}),
    "dropout": ((2, 2, 1, 33, 40, 32), {"dropout_p": 0.3, "key_lengths": [40, 21]}),
    "dropout causal": ((1, 3, 3, 24, 24, 8), {"dropout_p": 0.6, "is_causal": True}),
    "scale zero": ((2, 2, 1, 9, 40, 16), {"scale": 0.0, "key_lengths": [40, 21]}),
    "no queries": ((2, 1, 1, 0, 5, 8), {}),
    "no keys": ((2, 1, 1, 5, 0, 8), {}),
    "no batch": ((0, 2, 1, 5, 5, 8), {}),
}
# Lengths of the queries, and of the keys where they differ.
RAGGED = {
    "one": ((4, 4, 8), [5], None, {}),
    "several": ((2, 2, 64), [3, 17, 1, 30], None, {}),
    "empty ones": ((2, 1, 33), [0, 9, 0, 0, 12, 0], None, {"is_causal": True}),
    "cross": ((4, 2, 16), [8, 1, 20], [2, 33, 7], {}),
    "cross, one side empty": ((2, 2, 8), [6, 0, 4], [0, 5, 9], {"is_causal": True}),
    "dropout": ((2, 1, 80), [11, 26], None, {"dropout_p": 0.25}),
    "dropout cross": ((3, 3, 32), [7, 0, 16], [18, 3, 5], {"dropout_p": 0.4, "is_causal": True}),
    "nothing": ((2, 2, 8), [], None, {}),
}
MANY_SEQUENCES = {
    "long and empty": ((2, 1, 16), [150, 0, 1, 290, 0, 0, 64], None, {"is_causal": True}),
    "long cross": ((2, 2, 8), [5, 130, 0, 40], [260, 3, 7, 128], {"dropout_p": 0.3}),
    # More sequences than one load of cu_seqlens finds.
    "crowded": ((1, 1, 8), [3, *[0] * 125, 2, 1, 0, 40], None, {}),
}


def cu_of(lengths, device):
    return torch.tensor([0, *lengths], device=device).cumsum(0).int()


def dense_case(name, dtype, device):
    """query, key, value as views of one buffer whose tokens are outermost, and the options."""
    (B, H, Hkv, Tq, Tk, D), options = DENSE[name]
    options = dict(options)
    if "key_lengths" in options:
        options["key_lengths"] = torch.tensor(
            options["key_lengths"], dtype=torch.int32, device=device
        )
    return strided((B, Tq, H), (B, Tk, Hkv), D, dtype, device, swap=True), options


def ragged_case(name, dtype, device):
    (H, Hkv, D), lengths_q, lengths_k, options = {**RAGGED, **MANY_SEQUENCES}[name]
    cu_seqlens = cu_of(lengths_q, device)
    if lengths_k is not None:
        cu_seqlens = cu_seqlens, cu_of(lengths_k, device)
    tokens = sum(lengths_q), sum(lengths_q if lengths_k is None else lengths_k)
    inputs = strided((tokens[0], H), (tokens[1], Hkv), D, dtype, device)
    return inputs, {**options, "cu_seqlens": cu_seqlens}


def strided(rows_q, rows_k, D, dtype, device, swap=False):
    torch.manual_seed(0)
    q = torch.randn(*rows_q, D + 3, device=device).to(dtype)[..., 1 : D + 1]
    k, v = torch.randn(*rows_k, 2, D, device=device).to(dtype).unbind(-2)
    return tuple(t.transpose(1, 2) for t in (q, k, v)) if swap else (q, k, v)


def with_groups(inputs, options):
    """`options` with enable_gqa where the heads ask for it."""
    heads = 1 if "cu_seqlens" in options else -3
    return {"enable_gqa": inputs[0].shape[heads] != inputs[1].shape[heads], **options}


def call_of(inputs, options):
    """What a backend is given, dropout's seed included."""
    *_, call = sk.dispatch.OPS[NAME].arguments(*inputs, **with_groups(inputs, options))
    return call._replace(seed=draw_seed(inputs[0].device)) if call.dropout_p else call


def functions_of(backend, inputs, options, compiled=False):
    """The op, eager attention in the inputs' dtype, and the definition, from the same seed."""
    options = with_groups(inputs, options)

    def ours(q, k, v):
        return sk.scaled_dot_product_attention(q, k, v, **options, backend=backend)

    def eager(q, k, v):
        return attention_reference(q, k, v, call_of((q, k, v), options), dtype=q.dtype)[0]

    def reference(q, k, v):
        return attention_reference(q, k, v, call_of((q, k, v), options))[0]

    return with_seed(maybe_compiled(ours, compiled)), with_seed(eager), with_seed(reference)


def check(backend, inputs, options, compiled=False):
    skip_unsupported(NAME, backend, *inputs, **with_groups(inputs, options))
    assert_op_matches(*functions_of(backend, inputs, options, compiled), inputs)
