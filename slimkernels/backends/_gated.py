"""Where gate and up lie, for every backend's kernels."""

from torch import Tensor


def gate_and_up(x: Tensor, gate: Tensor | None) -> tuple[Tensor, Tensor]:
    """Both as (M, N) with elements side by side in a row; copied only where no stride says so."""
    if gate is not None:
        return _rows(gate), _rows(x)
    packed, N = _rows(x), x.shape[-1] // 2
    return packed[:, :N], packed[:, N:]


def empty_gradients(x: Tensor, gate: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x and gate, and where in them those of gate and up are to be written."""
    dx = x.new_empty(x.shape)
    dgate = x.new_empty(0 if gate is None else gate.shape)
    return dx, dgate, *gate_and_up(dx, None if gate is None else dgate)


def _rows(x: Tensor) -> Tensor:
    N = x.shape[-1]
    rows = x.reshape(x.numel() // max(N, 1), N)
    return rows if rows.stride(1) == 1 or N < 2 else rows.contiguous()
