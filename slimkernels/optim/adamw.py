"""AdamW with torch.optim.AdamW's interface, on the library's multi-tensor update."""

from __future__ import annotations

from torch import Tensor

from slimkernels.ops.adamw import ADAMW, adamw
from slimkernels.optim._multi_tensor import MultiTensorOptimizer


class AdamW(MultiTensorOptimizer):
    """torch.optim.AdamW (Loshchilov and Hutter 2019): one pass over all tensors of a group.

    params          parameters, or groups as in torch; float32, bfloat16, float16 or float64
    lr              a number, or a tensor of one, which CUDA graphs read at each replay
    betas, eps, weight_decay, amsgrad, maximize
                    as in torch
    capturable      for torch's state dicts: a step can always be captured in a CUDA graph
    foreach, fused  torch's ways to take the same step, taken and not needed: there is one way here
    differentiable  must be False: a step writes its parameters, and has no gradient
    max_grad_norm   scale the gradients of all groups together to at most this norm, as
                    torch.nn.utils.clip_grad_norm_ does, without writing them; None: do not
    skip_nonfinite  where that norm is NaN or infinite, change nothing, and count no step
    master_weights  keep float32 values of bfloat16 and float16 parameters in state["master"];
                    parameters are their rounded copies. One that somebody else writes stays as
                    written
    backend         as in the ops; explain() says which runs, and why

    The state's keys are torch's, and a state dict can go either way; load_state_dict refuses
    another optimizer's, or wrong numbers or shapes, before it loads anything. Moments are float32
    whatever the parameter is, float64 for float64. After a step with max_grad_norm or
    skip_nonfinite, `grad_norm` is the norm before clipping, a tensor on the device. Nothing waits
    for the device.
    Errors: ValueError for a number out of range or for sparse gradients.
    """

    op = ADAMW

    def __init__(
        self,
        params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        master_weights: bool = True,
        backend: str | None = None,
    ) -> None:
        self._check_hints({"foreach": foreach, "fused": fused, "differentiable": differentiable})
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "capturable": capturable,
        }
        super().__init__(
            params,
            defaults,
            max_grad_norm=max_grad_norm,
            skip_nonfinite=skip_nonfinite,
            master_weights=master_weights,
            backend=backend,
        )

    def _state_of(self, group: dict, param: Tensor) -> dict[str, Tensor]:
        return self._moments_of(param, self._moments(group))

    def _columns(self, group: dict, param: Tensor) -> tuple[str, ...]:
        return ("step", *self._moments(group), *self._master_column(param))

    def _moments(self, group: dict) -> tuple[str, ...]:
        moments = ("exp_avg", "exp_avg_sq")
        return (*moments, "max_exp_avg_sq") if group["amsgrad"] else moments

    def _options(self, group: dict) -> dict:
        return {name: group[name] for name in ("lr", "betas", "eps", "weight_decay", "maximize")}

    def _update(self, lists, clip: Tensor | None, options: dict) -> None:
        adamw(lists, clip, **options, backend=self.backend)
