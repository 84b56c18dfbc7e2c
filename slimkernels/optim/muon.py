"""Muon with torch.optim.Muon's interface, on the library's multi-tensor update."""

from __future__ import annotations

from torch import Tensor

from slimkernels.ops.muon import MUON, OPTIONS, muon
from slimkernels.optim._multi_tensor import MultiTensorOptimizer


class Muon(MultiTensorOptimizer):
    """torch.optim.Muon (Jordan 2024): the momentum of a matrix, made almost orthogonal.

    params        matrices, or groups of them; what is not a matrix, or is an embedding, is AdamW's
    lr            a number, or a tensor of one, which CUDA graphs read at each replay
    weight_decay, momentum, nesterov, ns_coefficients, eps, ns_steps, adjust_lr_fn
                  as in torch
    max_grad_norm, skip_nonfinite, master_weights, backend
                  as in slimkernels.optim.AdamW, as are `grad_norm` and errors

    The state's key is torch's, momentum_buffer, and a state dict can go either way. Momenta are
    float32 whatever the parameter is. On a GPU matrices of one shape are orthogonalized together.
    """

    op = MUON

    def __init__(
        self,
        params,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = (3.4445, -4.775, 2.0315),
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        *,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        master_weights: bool = True,
        backend: str | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_coefficients": ns_coefficients,
            "eps": eps,
            "ns_steps": ns_steps,
            "adjust_lr_fn": adjust_lr_fn,
        }
        super().__init__(
            params,
            defaults,
            max_grad_norm=max_grad_norm,
            skip_nonfinite=skip_nonfinite,
            master_weights=master_weights,
            backend=backend,
        )

    def _check_group(self, group: dict) -> None:
        super()._check_group(group)
        for param in group["params"]:
            if param.dim() != 2:
                shape = tuple(param.shape)
                raise ValueError(f"Muon: parameters must be matrices; got one of shape {shape}")
        if group["adjust_lr_fn"] not in (None, "original", "match_rms_adamw"):
            raise ValueError(
                "Muon: adjust_lr_fn must be None, 'original' or 'match_rms_adamw'; "
                f"got {group['adjust_lr_fn']!r}"
            )
        if len(group["ns_coefficients"]) != 3:
            count = len(group["ns_coefficients"])
            raise ValueError(f"Muon: ns_coefficients must be three numbers; got {count}")
        steps = group["ns_steps"]
        if not isinstance(steps, int) or isinstance(steps, bool) or not 0 <= steps < 100:
            raise ValueError(f"Muon: ns_steps must be an integer from 0 to 99; got {steps!r}")

    def _state_of(self, group: dict, param: Tensor) -> dict[str, Tensor]:
        state = self._moments_of(param, ("momentum_buffer",))
        del state["step"]  # which Muon does not count
        return state

    def _columns(self, group: dict, param: Tensor) -> tuple[str, ...]:
        return ("momentum_buffer", *self._master_column(param))

    def _options(self, group: dict) -> dict:
        return {name: group[name] for name in OPTIONS}

    def _update(self, lists, clip: Tensor | None, options: dict) -> None:
        muon(lists, clip, **options, backend=self.backend)
