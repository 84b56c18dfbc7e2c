"""Argument checks that several ops share: each raises one sentence naming op and argument."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Integral, Real

import torch
from torch import Tensor

_LARGEST = torch.finfo(torch.float32).max
FLOATING = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def check_tensor(op: str, name: str, value: object) -> None:
    """`value` must be a Tensor of a dtype that the ops compute in."""
    check_dense(op, name, value)
    if value.dtype not in FLOATING:
        raise ValueError(
            f"{op}: {name} must be float32, float16, bfloat16 or float64; got {value.dtype}"
        )


def check_dense(op: str, name: str, value: object) -> None:
    """`value` must be a Tensor, neither sparse nor nested."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{op}: {name} must be a tensor; got {type(value).__name__}")
    if value.is_nested or value.layout != torch.strided:
        got = "a nested tensor" if value.is_nested else value.layout
        raise ValueError(f"{op}: {name} must be a dense tensor; got {got}")


def check_parameter(
    op: str,
    name: str,
    value: object,
    x: Tensor,
    size: int,
    of_what: str = "the normalized dimension",
    whose: str = "input",
) -> None:
    """`value` is None or a (size,) vector on x's device, in x's dtype or float32."""
    if value is None:
        return
    check_tensor(op, name, value)
    if value.shape != (size,):
        raise ValueError(
            f"{op}: {name} must have shape ({size},), {of_what} of {whose} {tuple(x.shape)}; "
            f"got {tuple(value.shape)}"
        )
    check_like(op, name, value, x, whose)


def check_like(op: str, name: str, value: Tensor, x: Tensor, whose: str = "input") -> None:
    """`value` is on x's device, in x's dtype or float32."""
    if value.device != x.device:
        raise ValueError(f"{op}: {name} must be on {x.device} like {whose}; got {value.device}")
    if value.dtype not in (x.dtype, torch.float32):
        raise ValueError(
            f"{op}: {name} must be {x.dtype} like {whose}, or float32; got {value.dtype}"
        )


def normalized_rows(
    op: str,
    input: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`input`, `weight` and `bias` with the normalized dimensions, checked, flattened into one."""
    check_tensor(op, "input", input)
    row = normalized_shape
    row = (row,) if isinstance(row, int) or not isinstance(row, Sequence) else tuple(row)
    for size in row:
        check_integer(op, "normalized_shape", size)
    if not row or input.shape[-len(row) :] != row:
        raise ValueError(
            f"{op}: normalized_shape must be the last dimensions of input "
            f"{tuple(input.shape)}; got {row}"
        )
    if len(row) > 1:
        for name, parameter in (("weight", weight), ("bias", bias)):
            if isinstance(parameter, Tensor) and tuple(parameter.shape) != row:
                raise ValueError(
                    f"{op}: {name} must have shape {row}; got {tuple(parameter.shape)}"
                )
        weight, bias = (p.flatten() if isinstance(p, Tensor) else p for p in (weight, bias))
        input = input.flatten(-len(row))
    size = input.shape[-1]
    if size == 0:
        raise ValueError(f"{op}: a row of input {tuple(input.shape)} has no elements")
    check_parameter(op, "weight", weight, input, size)
    check_parameter(op, "bias", bias, input, size)
    return input, weight, bias


def check_alike(op: str, name: str, value: object, input: Tensor) -> None:
    """`value` must have input's shape, dtype and device."""
    check_tensor(op, name, value)
    for what in ("shape", "dtype", "device"):
        expected, actual = getattr(input, what), getattr(value, what)
        if actual != expected:
            expected, actual = (tuple(v) if what == "shape" else v for v in (expected, actual))
            raise ValueError(f"{op}: {name} must have input's {what} {expected}; got {actual}")


def check_mask(op: str, mask: object, input: Tensor) -> None:
    """`mask` is None or a tensor on input's device that broadcasts to its shape: bool or, to be
    added, in input's dtype or float32."""
    if mask is None:
        return
    check_dense(op, "mask", mask)
    if mask.dtype not in (torch.bool, input.dtype, torch.float32):
        float32 = "" if input.dtype == torch.float32 else " or float32"
        raise ValueError(
            f"{op}: mask must be bool, True where an element takes part, or {input.dtype}"
            f"{float32} to be added; got {mask.dtype}"
        )
    if mask.device != input.device:
        raise ValueError(f"{op}: mask must be on {input.device} like input; got {mask.device}")
    sizes = zip(reversed(mask.shape), reversed(input.shape), strict=False)
    if mask.dim() > input.dim() or any(m not in (1, n) for m, n in sizes):
        raise ValueError(
            f"{op}: mask must broadcast to input {tuple(input.shape)}; got {tuple(mask.shape)}"
        )


def check_number(op: str, name: str, value: object) -> None:
    """`value` is a finite number."""
    if isinstance(value, bool) or not isinstance(value, (float, int, Real)):
        raise ValueError(f"{op}: {name} must be a number; got {value!r}")
    # Comparisons, which torch.compile can trace for a number that it does not know.
    if not -_LARGEST <= value <= _LARGEST:
        raise ValueError(f"{op}: {name} must be finite in float32; got {value}")


def check_eps(op: str, eps: object) -> None:
    """`eps`, which keeps a root's argument above 0, is a number and not negative."""
    check_number(op, "eps", eps)
    if eps < 0:
        raise ValueError(f"{op}: eps must be at least 0; got {eps}")


def check_integer(op: str, name: str, value: object) -> None:
    """`value` is a whole number; what torch.compile counts symbolically is one, too."""
    if isinstance(value, bool) or not isinstance(value, (int, Integral, torch.SymInt)):
        raise ValueError(f"{op}: {name} must be an integer; got {value!r}")


def check_flag(op: str, name: str, value: object) -> None:
    """`value` is True or False, not merely something that has a truth."""
    if not isinstance(value, (bool, torch.SymBool)):
        got = type(value).__name__ if isinstance(value, Tensor) else repr(value)
        raise ValueError(f"{op}: {name} must be True or False; got {got}")


def check_dropout(op: str, dropout_p: float) -> None:
    """`dropout_p` is a probability of dropping, below 1."""
    check_number(op, "dropout_p", dropout_p)
    if not 0.0 <= dropout_p <= 1.0 - 2**-24:  # the next float32 is 1
        raise ValueError(f"{op}: dropout_p must be in [0, 1); got {dropout_p}")


def is_readable(values: Tensor) -> bool:
    """Whether the host may look at the values: not on a GPU, not of fake tensors, and not while
    somebody compiles or transforms the call."""
    if torch.compiler.is_compiling() or type(values) not in (Tensor, torch.nn.Parameter):
        return False
    return values.is_cpu and torch._C._functorch.peek_interpreter_stack() is None


def value_range(values: Tensor) -> tuple[int, int]:
    """The least and the greatest of integers that the host may look at, at least one."""
    if values.numel() <= 256:  # a list is made sooner than two tensors
        listed = values.flatten().tolist()
        return min(listed), max(listed)
    low, high = values.aminmax()
    return int(low), int(high)


def autocast_device(x: Tensor) -> str:
    """The device type whose autocast x's products would follow; meta tensors have none."""
    return "cpu" if x.is_cpu or x.is_meta else x.device.type


def is_under_autocast(x: Tensor) -> bool:
    """Whether autocast may change the dtype of x: float64 it leaves alone."""
    return torch.is_autocast_enabled(autocast_device(x)) and x.dtype != torch.float64


def promoted(x: Tensor, other: object) -> tuple[Tensor, object]:
    """Both in one dtype where autocast has made them differ: the one that torch's operators would
    compute in. What is no tensor of ours comes back as it is, for the checks to refuse."""
    if not isinstance(other, Tensor) or other.dtype == x.dtype or other.dtype not in FLOATING:
        return x, other
    if not torch.is_autocast_enabled(autocast_device(x)):
        return x, other
    dtype = torch.promote_types(x.dtype, other.dtype)
    return x.to(dtype), other.to(dtype)


def autocast_dtype(x: object) -> torch.dtype | None:
    """What autocast casts to beside x, by x's device; None where it is off, or there is none."""
    if not isinstance(x, Tensor):
        return None
    device = autocast_device(x)
    if not torch.is_autocast_enabled(device) or x.is_meta:  # which torch leaves as it is
        return None
    return torch.get_autocast_dtype(device)


def cast_unless_float64(x: object, dtype: torch.dtype) -> object:
    """x in `dtype`, as autocast casts: a floating tensor, but no float64."""
    casts = isinstance(x, Tensor) and x.dtype in FLOATING and x.dtype != torch.float64
    return x.to(dtype) if casts else x


def outside_autocast(function: Callable[..., Tensor], x: Tensor, *args) -> Tensor:
    """function(x, *args) in x's own dtype: torch's norms return float32 under autocast."""
    device = autocast_device(x)
    if not torch.is_autocast_enabled(device):  # leaving it costs more than a small norm
        return function(x, *args)
    with torch.autocast(device, enabled=False):
        return function(x, *args)
