"""Inputs and comparisons shared by tests/ and benchmarks/; nothing in the package imports it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor


def assert_no_worse(
    actual: Tensor,
    eager: Tensor,
    truth: Tensor,
    *,
    factor: float = 2.0,
    floor: float = 0.0,
    what: str = "output",
) -> None:
    """`actual` may err at most `factor` times as much as eager PyTorch, measured against float64.

    actual, eager  the same shape and dtype: the result under test, and eager PyTorch's
    truth          the reference's result from the same inputs in float64
    factor         2, as in flash-attention's tests: tight, and no constant to tune
    floor          allowed in any case, where one unit of the largest value (below) is too little
    Errors         AssertionError; also where NaN or infinity is not exactly where the truth has it

    The floor is one unit in the last place of the largest value, for when eager is exact.
    """
    assert actual.shape == truth.shape, f"{what}: shape {actual.shape}, expected {truth.shape}"
    assert actual.dtype == eager.dtype, f"{what}: dtype {actual.dtype}, expected {eager.dtype}"
    ulp = torch.finfo(actual.dtype).eps
    actual, eager, truth = (t.detach().double().cpu() for t in (actual, eager, truth))
    assert not (truth.isnan() & eager.isfinite()).any(), f"{what}: the truth itself is NaN"
    finite = truth.isfinite() & eager.isfinite()  # float16 may overflow where float64 does not
    same = torch.where(finite, actual.isfinite(), actual.isfinite() == eager.isfinite())
    assert same.all(), f"{what}: {int((~same).sum())} values are finite where they must not, or not"
    assert (actual.isnan() == eager.isnan()).all(), f"{what}: NaN where eager has none, or not"
    infinite = actual.isinf() & eager.isinf()
    assert torch.equal(actual[infinite], eager[infinite]), f"{what}: infinity of the other sign"
    if not finite.any():
        return
    actual, eager, truth = actual[finite], eager[finite], truth[finite]
    error = (actual - truth).abs().max().item()
    allowed = factor * (eager - truth).abs().max().item()
    allowed += max(ulp * truth.abs().max().item(), floor)
    assert error <= allowed, f"{what}: error {error:.3e}, allowed {allowed:.3e}"


@contextlib.contextmanager
def forbid_synchronisation() -> Iterator[None]:
    """On a GPU, an op inside that makes the host wait for the device raises."""
    if not torch.cuda.is_available():
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def run_with_gradients(
    function: Callable, inputs: tuple, dys: tuple[Tensor, ...] | None = None, seed: int = 0
) -> dict[str, Tensor]:
    """Outputs of ``function(*inputs)`` and the gradient of every floating input, by name.

    dys  what flows into backward, one an output; None draws them, the same for every dtype
    """
    leaves = [t.detach().clone().requires_grad_() if _is_floating(t) else t for t in inputs]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    if dys is None:
        generator = torch.Generator().manual_seed(seed)
        # Drawn in bfloat16 precision, so that every dtype under test sees the same dy.
        dys = tuple(torch.randn(y.shape, generator=generator).bfloat16().to(y) for y in outputs)
    wanted = [t for t in leaves if _is_floating(t)]
    gradients = torch.autograd.grad(outputs, wanted, dys)
    results = {f"output {i}": y.detach() for i, y in enumerate(outputs)}
    results |= {f"gradient {i}": g for i, g in enumerate(gradients)}
    return results


def assert_op_matches(
    function: Callable, eager: Callable, reference: Callable, inputs: tuple
) -> dict[str, Tensor]:
    """Outputs and every gradient of `function` are no worse than eager's, by the float64 truth.

    inputs   what all three functions take; floating tensors get gradients
    Returns  what run_with_gradients says of `function`
    """
    with forbid_synchronisation():
        actual = run_with_gradients(function, inputs)
    baseline = run_with_gradients(eager, inputs)
    wide = tuple(t.double() if _is_floating(t) else t for t in inputs)
    truth = run_with_gradients(reference, wide)
    assert actual.keys() == truth.keys(), (actual.keys(), truth.keys())
    for name, expected in truth.items():
        assert_no_worse(actual[name], baseline[name], expected, what=name)
    return actual


def _is_floating(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _layer_norm_sample(device: torch.device, dtype: torch.dtype) -> tuple[tuple, dict]:
    x = torch.randn(6, 96, device=device).to(dtype)
    weight, bias = torch.randn(2, 96, device=device).to(dtype).unbind()
    return (x, (96,), weight, bias), {}


def _add_layer_norm_sample(device: torch.device, dtype: torch.dtype) -> tuple[tuple, dict]:
    args, _ = _layer_norm_sample(device, dtype)
    residual = torch.randn(6, 96, device=device).to(dtype)
    return (args[0], residual, *args[1:]), {"dropout_p": 0.1}


def _group_norm_sample(device: torch.device, dtype: torch.dtype) -> tuple[tuple, dict]:
    x = torch.randn(3, 6, 4, 5, device=device).to(dtype)
    weight, bias = torch.randn(2, 6, device=device).to(dtype).unbind()
    return (x, 2, weight, bias), {}


def _rms_norm_sample(device: torch.device, dtype: torch.dtype) -> tuple[tuple, dict]:
    args, _ = _layer_norm_sample(device, dtype)
    return args[:3], {"zero_centered": True}


def _add_rms_norm_sample(device: torch.device, dtype: torch.dtype) -> tuple[tuple, dict]:
    args, kwargs = _add_layer_norm_sample(device, dtype)
    return args[:4], kwargs


def _scaled_dot_product_attention_sample(
    device: torch.device, dtype: torch.dtype
) -> tuple[tuple, dict]:
    query = torch.randn(2, 4, 9, 16, device=device).to(dtype)
    key, value = torch.randn(2, 2, 2, 13, 16, device=device).to(dtype).unbind()
    key_lengths = torch.tensor([13, 5], dtype=torch.int32, device=device)
    return (query, key, value), {"dropout_p": 0.1, "key_lengths": key_lengths, "enable_gqa": True}


def _softmax_sample(device: torch.device, dtype: torch.dtype) -> tuple[tuple, dict]:
    (x,), options = _log_softmax_sample(device, dtype)
    sinks = torch.randn(3, device=device).to(dtype)
    return (x,), {**options, "is_causal": True, "sinks": sinks, "dropout_p": 0.1}


def _log_softmax_sample(device: torch.device, dtype: torch.dtype) -> tuple[tuple, dict]:
    x = torch.randn(2, 3, 4, 33, device=device).to(dtype)
    mask = torch.randn(2, 1, 1, 33, device=device).to(dtype)
    mask = torch.where(torch.rand(mask.shape, device=device) < 0.8, mask, -torch.inf)
    return (x,), {"scale": 0.25, "mask": mask}


def _activation_sample(device: torch.device, dtype: torch.dtype) -> tuple[tuple, dict]:
    return (torch.randn(6, 96, device=device).to(dtype),), {
        "bias": torch.randn(96, device=device).to(dtype)
    }


def _gated_sample(device: torch.device, dtype: torch.dtype) -> tuple[tuple, dict]:
    return (torch.randn(6, 2 * 96, device=device).to(dtype),), {}


def _bias_dropout_add_sample(device: torch.device, dtype: torch.dtype) -> tuple[tuple, dict]:
    x, residual = torch.randn(2, 6, 96, device=device).to(dtype).unbind()
    return (x, torch.randn(96, device=device).to(dtype), residual), {"dropout_p": 0.1}


def _cross_entropy_sample(device: torch.device, dtype: torch.dtype) -> tuple[tuple, dict]:
    target = torch.tensor([3, 95, -100, 0, 7, 7], device=device)
    return (torch.randn(6, 96, device=device).to(dtype), target), {"label_smoothing": 0.1}


def _linear_sample(device: torch.device, dtype: torch.dtype) -> tuple[tuple, dict]:
    # As small as the backend that has a kernel takes.
    x, weight = torch.randn(2, 130, 256, device=device).to(dtype).unbind()
    return (x, weight, torch.randn(130, device=device).to(dtype)), {}


def _linear_cross_entropy_sample(device: torch.device, dtype: torch.dtype) -> tuple[tuple, dict]:
    x = torch.randn(6, 24, device=device).to(dtype)
    weight, bias = torch.randn(37, 24, device=device), torch.randn(37, device=device)
    target = torch.tensor([3, 36, -100, 0, 7], device=device)
    positions = torch.tensor([5, 0, 1, 2, 5], device=device)
    return (x, weight.to(dtype), target, bias.to(dtype)), {
        "reduction": "none",
        "positions": positions,
    }


def _rotary_sample(device: torch.device, dtype: torch.dtype) -> tuple[tuple, dict]:
    query, key = (torch.randn(2, H, 9, 24, device=device).to(dtype) for H in (4, 2))
    angles = torch.randn(20, 8, device=device)
    offset = torch.tensor([0, 7], device=device)
    return (query, key), {"cos": angles.cos(), "sin": angles.sin(), "offset": offset}


def _embedding_sample(device: torch.device, dtype: torch.dtype) -> tuple[tuple, dict]:
    ids = torch.tensor([[5, 0, 36], [5, 2, 5]], device=device)
    weight, position, segment = (torch.randn(n, 96, device=device).to(dtype) for n in (37, 3, 2))
    norm_weight, norm_bias = torch.randn(2, 96, device=device).to(dtype).unbind()
    return (ids, weight), {
        **{"position_ids": torch.arange(3, device=device), "position_weight": position},
        **{"segment_ids": (ids == 5).long(), "segment_weight": segment},
        **{"norm_weight": norm_weight, "norm_bias": norm_bias, "dropout_p": 0.1},
    }


# One small valid call of each op: sample_inputs["layer_norm"](device, dtype) -> (args, kwargs).
sample_inputs: dict[str, Callable[[torch.device, torch.dtype], tuple[tuple, dict]]] = {
    "add_layer_norm": _add_layer_norm_sample,
    "add_rms_norm": _add_rms_norm_sample,
    "bias_dropout_add": _bias_dropout_add_sample,
    "cross_entropy": _cross_entropy_sample,
    "embedding": _embedding_sample,
    "geglu": _gated_sample,
    "gelu": _activation_sample,
    "group_norm": _group_norm_sample,
    "layer_norm": _layer_norm_sample,
    "linear": _linear_sample,
    "linear_cross_entropy": _linear_cross_entropy_sample,
    "log_softmax": _log_softmax_sample,
    "relu_squared": _activation_sample,
    "rms_norm": _rms_norm_sample,
    "rotary": _rotary_sample,
    "scaled_dot_product_attention": _scaled_dot_product_attention_sample,
    "silu": _activation_sample,
    "softmax": _softmax_sample,
    "swiglu": _gated_sample,
}
