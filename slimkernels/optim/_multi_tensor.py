"""What the optimizers share: gathering tensors into lists, masters, clipping, state dicts."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Real

import torch
from torch import Tensor

from slimkernels.dispatch import BACKENDS
from slimkernels.ops._checks import check_flag, is_readable
from slimkernels.ops._update import TensorLists, Update
from slimkernels.ops.grad_norm import grad_norm

# State that begins anew where there is none: of an option, and of a parameter's dtype.
LATER = ("max_exp_avg_sq", "master")
# What torch's optimizers keep in their groups to choose among their own implementations.
FOREIGN = ("foreach", "fused", "differentiable", "decoupled_weight_decay")
# State that has its parameter's shape, whichever optimizer's it is.
SHAPED = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "master")
LOW = (torch.bfloat16, torch.float16)


class MultiTensorOptimizer(torch.optim.Optimizer):
    """torch.optim.Optimizer whose step is a few kernel launches, whatever the number of tensors.

    Subclasses name their op and say what a parameter's state is, what of it and of the group the op
    takes, and how to run it.
    """

    op: Update
    settings = ("max_grad_norm", "skip_nonfinite", "master_weights", "backend")

    def __init__(
        self,
        params,
        defaults: dict,
        *,
        max_grad_norm: float | None,
        skip_nonfinite: bool,
        master_weights: bool,
        backend: str | None,
    ) -> None:
        if max_grad_norm is not None:
            self._check_number("max_grad_norm", max_grad_norm)
        check_flag(_name(self), "skip_nonfinite", skip_nonfinite)
        check_flag(_name(self), "master_weights", master_weights)
        if backend is not None and backend not in BACKENDS:
            raise ValueError(
                f"{_name(self)}: backend must be None or one of {', '.join(BACKENDS)}; "
                f"got {backend!r}"
            )
        self.max_grad_norm = max_grad_norm
        self.skip_nonfinite = skip_nonfinite
        self.master_weights = master_weights
        self.backend = backend
        self.grad_norm: Tensor | None = None
        self._lists: dict[tuple, TensorLists] = {}
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict) -> None:
        super().add_param_group(param_group)
        try:
            self._check_group(self.param_groups[-1])
        except ValueError:
            self.param_groups.pop()
            raise

    def _check_group(self, group: dict) -> None:
        """ValueError in a sentence if a value of the group makes no sense."""
        for name in self.settings:
            if name in group:
                raise ValueError(
                    f"{_name(self)}: {name} must be given for the whole optimizer, not for a group"
                )
        self._check_hints(group)
        params = group["params"]
        for param in params:
            if not param.is_floating_point():
                raise ValueError(f"{_name(self)}: parameters must be real; got {param.dtype}")
        if len(set(params)) < len(params):  # one pass updates them all, in any order
            raise ValueError(f"{_name(self)}: a group must hold each parameter once")
        if isinstance(group["lr"], Tensor):
            self._check_rate(group["lr"])
        for name in ("lr", "eps", "weight_decay", "momentum"):
            if name in group and not isinstance(group[name], Tensor):
                self._check_number(name, group[name])
        for name in ("amsgrad", "maximize", "nesterov", "capturable"):
            if name in group:
                check_flag(_name(self), name, group[name])
        betas = group.get("betas", (0.0, 0.0))
        is_pair = isinstance(betas, (tuple, list)) and len(betas) == 2
        if not is_pair or not all(isinstance(b, Real) and 0.0 <= b < 1.0 for b in betas):
            raise ValueError(f"{_name(self)}: betas must be two numbers in [0, 1); got {betas!r}")

    def _check_hints(self, options: dict) -> None:
        """torch's ways to take the same step are all one here; a step with a gradient is none."""
        for name in ("foreach", "fused", "differentiable"):
            if options.get(name) is not None:
                check_flag(_name(self), name, options[name])
        if options.get("differentiable"):
            raise ValueError(
                f"{_name(self)}: differentiable must be False: this step writes its parameters "
                "outside autograd; torch.optim's can be differentiated"
            )

    def _check_rate(self, lr: Tensor) -> None:
        if lr.numel() != 1 or not lr.is_floating_point():
            raise ValueError(
                f"{_name(self)}: lr must be one real number; got {lr.dtype} of {tuple(lr.shape)}"
            )
        if is_readable(lr):  # on a GPU it would cost a synchronisation
            self._check_number("lr", lr.item())

    def _check_number(self, name: str, value: object) -> None:
        is_number = isinstance(value, Real) and not isinstance(value, bool)
        if not is_number or not 0.0 <= value < math.inf:
            raise ValueError(f"{_name(self)}: {name} must be a number, 0 or more; got {value!r}")

    # Addresses mean nothing in a compiled graph, which breaks here and goes on after.
    # torch.compiler.disable would import the compiler with the package; this waits for a call.
    @torch._disable_dynamo
    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """One step for every parameter that has a gradient; the closure's value if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        gathered = [
            (group, lists)
            for index, group in enumerate(self.param_groups)
            for lists in self._gather(index, group)
        ]
        try:
            clip = self._clip([lists for _, lists in gathered])
            for group, lists in gathered:
                options = self._options(group)
                if isinstance(options["lr"], Tensor):  # of one dimension; a parameter has none
                    options["lr"] = options["lr"].reshape(())
                self._update(lists, clip, options)
        finally:
            for _, lists in gathered:
                lists.release()
        return loss

    def _state_of(self, group: dict, param: Tensor) -> dict[str, Tensor]:
        """What a parameter's state starts as."""
        raise NotImplementedError

    def _columns(self, group: dict, param: Tensor) -> tuple[str, ...]:
        """The keys of a parameter's state that the op reads."""
        raise NotImplementedError

    def _options(self, group: dict) -> dict:
        """What the op takes of a group, by keyword."""
        raise NotImplementedError

    def _update(self, lists: TensorLists, clip: Tensor | None, options: dict) -> None:
        """Run the op."""
        raise NotImplementedError

    def _clip(self, lists: list[TensorLists]) -> Tensor | None:
        """The norm of all gradients and what follows from it, if anything is to follow."""
        if self.max_grad_norm is None and not self.skip_nonfinite:
            return None
        if len(devices := {each.first.device for each in lists}) > 1:
            raise ValueError(
                f"{_name(self)}: a norm is of gradients on one device; they are on "
                f"{', '.join(sorted(map(str, devices)))}"
            )
        if not lists:
            return None
        clip = grad_norm(
            lists,
            max_norm=self.max_grad_norm,
            skip_nonfinite=self.skip_nonfinite,
            backend=self.backend,
        )
        self.grad_norm = clip[0]
        return clip

    def _gather(self, index: int, group: dict) -> list[TensorLists]:
        """The group's tensors, in lists of one device and dtype."""
        params, grads = [], []
        for param in group["params"]:
            if (grad := param.grad) is not None:
                params.append(param)
                grads.append(grad)
        if not params:
            return []
        kinds = {(param.device, param.dtype) for param in params}
        if len(kinds) == 1:
            return [self._renewed((index, *kinds), group, params, grads)]
        chosen = {kind: ([], []) for kind in kinds}
        for param, grad in zip(params, grads, strict=True):
            of_kind = chosen[param.device, param.dtype]
            of_kind[0].append(param)
            of_kind[1].append(grad)
        # In the order in which parameters come, so that sums have the same order on every run.
        order = dict.fromkeys((param.device, param.dtype) for param in params)
        return [self._renewed((index, kind), group, *chosen[kind]) for kind in order]

    def _renewed(self, key: tuple, group: dict, params: list, grads: list) -> TensorLists:
        """The lists of these tensors: last step's, if they still lie where they did."""
        names = self._columns(group, params[0])
        states = [self.state[param] for param in params]
        columns = {"param": params, "grad": self._alike(params, grads)}
        try:
            columns |= {name: [each[name] for each in states] for name in names}
        except KeyError:  # a parameter's first step, or a new option's
            for param, each in zip(params, states, strict=True):
                for name, value in self._state_of(group, param).items():
                    each.setdefault(name, value)
            columns |= {name: [each[name] for each in states] for name in names}
        known = self._lists.get(key)
        lists = TensorLists(columns) if known is None else known.renewed(columns)
        self._lists[key] = lists
        return lists

    def _master_column(self, param: Tensor) -> tuple[str, ...]:
        return ("master",) if self.master_weights and param.dtype in LOW else ()

    def _moments_of(self, param: Tensor, names: tuple[str, ...]) -> dict[str, Tensor]:
        """Zeros by name, the count of steps, and the master if there is to be one."""
        dtype = torch.promote_types(param.dtype, torch.float32)
        state = {"step": torch.zeros((), dtype=torch.float32, device=param.device)}
        state |= {name: torch.zeros_like(param, dtype=dtype) for name in names}
        return state | {name: param.detach().float() for name in self._master_column(param)}

    def _alike(self, params: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
        """Gradients whose elements lie in memory in the order of their parameter's."""
        try:
            if all(map(Tensor.is_contiguous, grads)) and all(map(Tensor.is_contiguous, params)):
                return grads
        except RuntimeError:  # a sparse tensor has no such order
            pass
        for grad in grads:
            if grad.layout != torch.strided:
                raise ValueError(
                    f"{_name(self)}: gradients must be dense; got one in {grad.layout}; "
                    "torch.optim.SparseAdam takes those"
                )
        return [
            grad if grad.stride() == param.stride() else torch.empty_like(param).copy_(grad)
            for param, grad in zip(params, grads, strict=True)
        ]

    def explain(self) -> str:
        """Which backend runs each part of the next step, and why each other one does not.

        Reads the gradients that are there; before the first backward there is nothing to say.
        """
        lines = []
        for index, group in enumerate(self.param_groups):
            for lists in self._gather(index, group):
                kind = f"{len(lists)} tensors, {lists.first.dtype} on {lists.first.device}"
                lines.append(f"group {index}, {kind}:")
                arguments = self.op.arguments(lists, None, **self._options(group))
                try:
                    lines.append(self.op.explain(*arguments, backend=self.backend))
                finally:
                    lists.release()
        return "\n".join(lines) or f"{_name(self)}: no parameter has a gradient"

    def load_state_dict(self, state_dict: dict) -> None:
        """Take over a state dict of this class, or of torch's optimizer of the same name."""
        # Hooks, since other hooks may have replaced state_dict, or may read what was loaded.
        given = []

        def before(_, loaded: dict) -> None:
            self._check_state_dict(loaded)
            given.append(loaded)

        hooks = [
            self.register_load_state_dict_pre_hook(before),
            self.register_load_state_dict_post_hook(
                lambda _: self._restore(given[-1]), prepend=True
            ),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()

    def _check_state_dict(self, state_dict: dict) -> None:
        """ValueError for the state of another kind of optimizer, or of other parameters."""
        if not isinstance(state_dict, dict) or not {"state", "param_groups"} <= state_dict.keys():
            raise ValueError(f"{_name(self)}: the state dict must have state and param_groups")
        groups = state_dict["param_groups"]
        sizes = [[len(group["params"]) for group in side] for side in (self.param_groups, groups)]
        if sizes[0] != sizes[1]:
            return  # torch refuses it
        for group, saved in zip(self.param_groups, groups, strict=True):
            numbers = zip(group["params"], saved["params"], strict=True)
            states = [(param, n, state_dict["state"].get(n)) for param, n in numbers]
            self._check_kind(group, saved, states)
            self._check_group({**self.defaults, **saved, "params": group["params"]})
            for param, number, state in states:
                for name, value in (state or {}).items():
                    self._check_value(f"{name} of parameter {number}", name, value, param)

    def _check_kind(self, group: dict, saved: dict, states: list[tuple]) -> None:
        """ValueError where the keys are another optimizer's. Its "amsgrad" marks Adam's kin: LAMB's
        state has the same keys."""
        wanted = ("betas", "momentum", "eps", "amsgrad")
        lost = [name for name in wanted if name in self.defaults and name not in saved]
        marks = () if "amsgrad" in self.defaults else ("amsgrad", "decoupled_weight_decay")
        alien = [name for name in marks if name in saved]
        found = f"its groups have {'no ' + ', '.join(lost) if lost else ', '.join(alien)}"
        for param, _, state in states:
            if state and not lost and not alien:
                names = (name for name in self._columns(group, param) if name not in LATER)
                lost = [name for name in names if name not in state]
                found = f"its state has no {', '.join(lost)}"
        if lost or alien:
            raise ValueError(f"{_name(self)}: the state dict is another optimizer's: {found}")

    def _check_value(self, what: str, name: str, value: object, param: Tensor) -> None:
        """ValueError for a state that is not as a parameter's must be."""
        shape = tuple(value.shape) if isinstance(value, Tensor) else None
        got = type(value).__name__ if shape is None else f"{value.dtype} of {shape}"
        if name == "step":
            if not (isinstance(value, Real) if shape is None else value.numel() == 1):
                raise ValueError(f"{_name(self)}: {what} must be one number; got {got}")
            if not 0 <= float(value) < math.inf:
                raise ValueError(f"{_name(self)}: {what} must be 0 or more; got {float(value)}")
        elif name in SHAPED and (shape != param.shape or not value.is_floating_point()):
            raise ValueError(
                f"{_name(self)}: {what} must be real and of its shape {tuple(param.shape)}; "
                f"got {got}"
            )

    def _restore(self, state_dict: dict) -> None:
        """Give groups our own keys, and states their dtype: torch cast them to the parameter's."""
        for group in self.param_groups:
            for name in FOREIGN:
                group.pop(name, None)
            for name, value in self.defaults.items():
                group.setdefault(name, value)
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        params = [param for group in self.param_groups for param in group["params"]]
        for number, param in zip(numbers, params, strict=True):
            dtype = torch.promote_types(param.dtype, torch.float32)
            for name, value in state_dict["state"].get(number, {}).items():
                if name == "step":
                    value = torch.as_tensor(value, dtype=torch.float32, device=param.device)
                    value = value.reshape(()).clone()
                elif isinstance(value, Tensor) and value.is_floating_point():
                    value = value.to(dtype=dtype, device=param.device)
                else:
                    continue
                # A copy, as torch's own is: two optimizers must not share a state.
                given = state_dict["state"][number][name]
                self.state[param][name] = value.clone() if value is given else value
        self._lists.clear()

    def __getstate__(self) -> dict:
        return super().__getstate__() | {name: getattr(self, name) for name in self.settings}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self.defaults.pop("differentiable", None)
        self.grad_norm, self._lists = None, {}


def _name(optimizer: MultiTensorOptimizer) -> str:
    return type(optimizer).__name__
