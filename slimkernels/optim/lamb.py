"""LAMB with the interface of torch's optimizers, on the library's multi-tensor update."""

from __future__ import annotations

from torch import Tensor

from slimkernels.ops.lamb import LAMB as OP
from slimkernels.ops.lamb import lamb
from slimkernels.optim._multi_tensor import MultiTensorOptimizer


class LAMB(MultiTensorOptimizer):
    """LAMB (You et al. 2020, algorithm 2): AdamW whose step is as long as the parameter, times lr.

    params        parameters, or groups; the norms are over each parameter. Whoever wants biases and
                  gains of norms without decay puts them in a group of their own
    lr            a number, or a tensor of one, which CUDA graphs read at each replay
    betas, eps, weight_decay, maximize
                  as in AdamW; where |w| or |u| is 0, the step is lr u
    max_grad_norm, skip_nonfinite, master_weights, backend
                  as in slimkernels.optim.AdamW, as are the state's keys, `grad_norm` and errors
    """

    op = OP

    def __init__(
        self,
        params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 1e-2,
        *,
        maximize: bool = False,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        master_weights: bool = True,
        backend: str | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
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
        return self._moments_of(param, ("exp_avg", "exp_avg_sq"))

    def _columns(self, group: dict, param: Tensor) -> tuple[str, ...]:
        return ("step", "exp_avg", "exp_avg_sq", *self._master_column(param))

    def _options(self, group: dict) -> dict:
        return {name: group[name] for name in ("lr", "betas", "eps", "weight_decay", "maximize")}

    def _update(self, lists, clip: Tensor | None, options: dict) -> None:
        lamb(lists, clip, **options, backend=self.backend)
