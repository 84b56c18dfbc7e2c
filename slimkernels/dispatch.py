"""Which backend runs an op, and why.

A backend is a module ``slimkernels/backends/<backend>/<op>.py`` with three functions:

    unsupported(*args) -> str | None    why it cannot run this call; None if it can
    forward(*args)     -> tensors       the output, then what backward needs
    backward(...)      -> gradients

``"torch"`` is the op's reference, run by autograd. It is tried last and never refuses.
The first rule that applies decides:

    1. the call's ``backend=`` argument   2. ``with use_backend(...)``
    3. SLIMKERNELS_BACKEND, read once at import   4. the op's own order, fastest first

Rules 1-3 are orders, not hints: a backend that cannot obey raises BackendError. Only an op whose
kernel is a bonus (linear: torch's own product is as good) takes rules 2 and 3, which name no op, as
orders to all the others.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import ModuleType

import torch
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling

BACKENDS = ("cuda", "triton", "cpu", "torch")
GPU_BACKENDS = ("cuda", "triton")  # chosen for CPU tensors only when asked for by name

# Triton decides when it is imported whether its kernels are compiled or interpreted.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

OPS: dict[str, Op] = {}


class BackendError(RuntimeError):
    """The backend that was asked for cannot run this call."""


def _known(name: str | None, who: str, where: str = "") -> str | None:
    if name is not None and name not in BACKENDS:
        known = ", ".join(BACKENDS)
        raise ValueError(f"{who}: unknown backend {name!r}{where}; the backends are {known}")
    return name


# Where microseconds count, ops/_known_calls.py and nn/_torchs_own.py read it, too.
# A plain global: torch.compile guards on it, and checkpointing's recomputation, which may
# run on an autograd thread, sees it. A ContextVar gives neither.
# The variable's name is looked at when an op is called: an import that fails would take
# slimkernels.info along.
_forced: str | None = os.environ.get("SLIMKERNELS_BACKEND") or None


@contextlib.contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Run every op inside the block on `name`; None restores automatic choice.

    It holds for the whole process: other threads see it, and blocks that overlap in two threads do
    not end as they began.
    """
    global _forced
    previous, _forced = _forced, _known(name, "use_backend")
    try:
        yield
    finally:
        _forced = previous


def _is_transformed() -> bool:
    """Whether a transform of torch.func surrounds the call: it hides that a gradient is due."""
    return not is_dynamo_compiling() and torch._C._are_functorch_transforms_active()


def _load(backend: str, op: str) -> ModuleType | str:
    """The backend's module for `op`, or the sentence saying why it is missing."""
    try:
        return importlib.import_module(f"slimkernels.backends.{backend}.{op}")
    except ModuleNotFoundError as error:
        if error.name == f"slimkernels.backends.{backend}.{op}":
            return f"{op} has no {backend} kernel"
        return f"it is not installed ({error})"
    except ImportError as error:
        return f"it is not installed ({error})"


@dataclass(frozen=True)
class Op:
    """One op: how its public arguments become a call, and the backends in the order tried.

    arguments  takes what the public function takes (without ``backend``), checks it, and returns
               the tuple that the reference and every backend's ``unsupported`` take.
    is_bonus   where use_backend() forces a backend that refuses, torch runs instead of an error
    """

    name: str
    order: tuple[str, ...]
    arguments: Callable[..., tuple]
    is_bonus: bool = False
    modules: dict[str, ModuleType | str] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        # Imported here, once: select() is traced by torch.compile, which cannot trace imports.
        for backend in self.order:
            self.modules[backend] = _load(backend, self.name)
        OPS[self.name] = self
        # A wrong call of explain() is told of under the op's name.
        self.arguments.__qualname__ = self.name

    def unsupported(self, backend: str, *args) -> str | None:
        """Why `backend` cannot run this call, in a sentence; None if it can."""
        if backend == "torch":
            return None
        module = self.modules.get(backend)
        if module is None:
            return f"{self.name} has no {backend} kernel"
        if _is_transformed():
            return "a kernel cannot be seen through by torch.func (vmap, grad, jvp and the like)"
        return module if isinstance(module, str) else module.unsupported(*args)

    def _refusal(self, backend: str, *args) -> str | None:
        """Why automatic choice passes `backend` over; None if it does not."""
        reason = self.unsupported(backend, *args)
        if reason is None and backend == "triton" and INTERPRETED:
            return "Triton's interpreter is for tests: it runs only when asked for by name"
        return reason

    def select(self, *args, backend: str | None = None) -> str:
        """The backend that will run this call. Pure: no imports, logs, warnings or env reads."""
        if backend is None and _forced is None:
            # What a GPU's backends say of tensors on the CPU would take longer than a small call.
            on_cpu = bool(args) and getattr(args[0], "is_cpu", False)
            for candidate in self.order:
                if on_cpu and candidate in GPU_BACKENDS:
                    continue
                if self._refusal(candidate, *args) is None:
                    return candidate
            return "torch"
        wanted = _known(backend, self.name) or _known(_forced, self.name, " in SLIMKERNELS_BACKEND")
        reason = self.unsupported(wanted, *args)
        if reason is not None and self.is_bonus and backend is None:
            return "torch"
        if reason is not None:
            raise BackendError(f"{self.name}: {wanted} was asked for, but {reason}")
        return wanted

    def explain(self, *args, backend: str | None = None) -> str:
        """What select() would choose for this call, and what each backend says of it."""
        chosen = self.select(*args, backend=backend)
        lines = [f"{self.name} runs on {chosen}"]
        others = [name for name in BACKENDS if name not in self.order]  # torch is the last of them
        for name in (*self.order, *others):
            verdict = "chosen" if name == chosen else self._refusal(name, *args) or "could run"
            lines.append(f"  {name:<7}{verdict}")
        return "\n".join(lines)


def explain(op: str | Callable, *args, backend: str | None = None, **kwargs) -> str:
    """Which backend runs ``op(*args, **kwargs)``, and why each other one does not.

    op       a public function of slimkernels, or its name
    Returns  the text, one line a backend: ``print(slimkernels.explain(slimkernels.gelu, x))``
    Errors   ValueError as the call itself would raise; BackendError for a forced backend
             that cannot run it
    """
    name = op if isinstance(op, str) else getattr(op, "__name__", repr(op))
    # A function of the same name elsewhere, as in torch.nn.functional, is no call of ours.
    is_ours = isinstance(op, str) or getattr(op, "__module__", "") == f"slimkernels.ops.{name}"
    if name not in OPS or not is_ours:
        ours = f"; did you mean slimkernels.{name}?" if name in OPS else ""
        if not isinstance(op, str):
            name = f"{op.__module__}.{name}" if hasattr(op, "__module__") else name
        known = ", ".join(sorted(OPS))
        raise ValueError(f"explain: unknown op {name!r}; the ops are {known}{ours}")
    return OPS[name].explain(*OPS[name].arguments(*args, **kwargs), backend=backend)


def needs_gradient(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd must see this call; without it the Function's cost is saved.

    Under forward-mode differentiation it must, to say that kernels have no derivative there.
    """
    if forward_ad._current_level >= 0:
        return True
    # A list: the generator that any() would else take costs more than all the rest.
    return torch.is_grad_enabled() and any([t is not None and t.requires_grad for t in tensors])


def distinct(*args) -> list:
    """`args` with a view in place of a tensor that came before: torch.compile cannot trace a
    Function that is given one tensor twice, as self-attention and tied parameters do."""
    return [
        t.view_as(t) if isinstance(t, torch.Tensor) and any(t is s for s in args[:i]) else t
        for i, t in enumerate(args)
    ]


_library = torch.library.Library("slimkernels", "DEF")
_PLAIN = (torch.Tensor, torch.nn.Parameter)


def kernel_op(
    name: str, fake: Callable, check: Callable | None = None
) -> Callable[[Callable], Callable]:
    """Register a kernel entry point as a torch op; eager calls skip torch's dispatcher.

    fake   returns empty outputs of the right shape and dtype, for torch.compile
    check  looks at the arguments' values, and raises, when the registered op runs: what compiled
           the call could not. An eager call has been checked before it comes here.
    """

    def register(function: Callable) -> Callable:
        @functools.wraps(function)
        def run(*args):
            if check is not None:
                check(*args)
            return on_device_of(args[0], function, *args)

        # Library.define rather than the custom_op decorator: a third of its cost a call.
        _library.define(name + torch.library.infer_schema(function, mutates_args=()))
        _library.impl(name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"slimkernels::{name}", fake, lib=_library)
        op = getattr(torch.ops.slimkernels, name).default

        @functools.wraps(function)
        def call(*args):
            if not may_skip_dispatcher(args):
                return op(*args)
            return on_device_of(args[0], function, *args)

        call.op = op  # for torch.library.opcheck
        return call

    return register


def on_device_of(tensor: torch.Tensor, function: Callable, *args):
    """function(*args), with the device of `tensor` the current one.

    Triton launches on the current device, whatever its arguments are on.
    """
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return function(*args)
    with torch.cuda.device(tensor.device):
        return function(*args)


def may_skip_dispatcher(args: Sequence) -> bool:
    """Whether a kernel may run at once rather than as a registered op.

    That is, whether nobody traces or records the call, and all tensors are memory to be read as it
    stands.

    Tensors of other types (fake ones, DTensors), modes and tracers have their say in torch's
    dispatcher, where a lazy negation is also carried out. A kernel would read address 0.
    """
    if is_dynamo_compiling():  # other tracers are modes, or have tensors of their own
        return False
    if torch._C._len_torch_dispatch_stack() or torch.jit.is_tracing():
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    for arg in args:
        if arg is None:
            continue
        if type(arg) in _PLAIN:
            if arg.is_neg() or arg._is_zerotensor():
                return False
        elif isinstance(arg, torch.Tensor) or (type(arg) is list and not may_skip_dispatcher(arg)):
            return False
    return True
