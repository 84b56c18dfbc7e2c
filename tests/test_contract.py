"""What every op and backend must hold to; CONTRIBUTING.md has the reasons."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
from pathlib import Path

import pytest
import torch
from op_cases import device_of, skip_unsupported
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import slimkernels
from slimkernels.dispatch import BACKENDS, OPS
from slimkernels.ops._update import UPDATES
from slimkernels.testing import sample_inputs

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "slimkernels"
KERNEL_BACKENDS = [backend for backend in BACKENDS if backend != "torch"]

PUBLIC_NAMES = {
    *("BackendError", "explain", "info", "nn", "optim", "replace", "restore", "use_backend"),
    *("add_layer_norm", "add_rms_norm", "bias_dropout_add", "cross_entropy", "geglu", "gelu"),
    *("group_norm", "layer_norm", "linear", "linear_cross_entropy", "log_softmax"),
    *("relu_squared", "rms_norm", "rotary", "rotary_tables", "scaled_dot_product_attention"),
    *("embedding", "silu", "softmax", "swiglu"),
    *("AttentionVariant", "RelativeBias", "ScoreFunction", "t5_relative_bias"),
}
# Floating inputs that kernels give no gradient.
CONSTANTS = {"rotary": {"cos", "sin"}}
# Ops whose gradients do not depend on their inputs: a second derivative is zero, not an error.
LINEAR = {"rotary"}
# Modules with registered ops that several ops share.
SHARED = {"slimkernels.ops._activation", "slimkernels.ops._gated"}
MAX_PUBLIC_PARAMETERS = 9
MAX_KERNEL_PARAMETERS = 16  # at run time; constexprs are not passed
# Longer lists, by (function): (how many, why).
LONG_PARAMETER_LISTS: dict[str, tuple[int, str]] = {
    "add_layer_norm": (10, "torch's five for layer_norm, and what becomes of the sum"),
    "backends/triton/_long_rows.py:_gradients_kernel": (17, "one kernel for a sum and for plain x"),
    "softmax": (10, "torch's three, six of ours and backend"),
    "scaled_dot_product_attention": (13, "torch's eight, and five of ours; the rest is a variant"),
    "embedding": (14, "torch's three, two other tables with their ids, the norm's and dropout's"),
    "cross_entropy": (11, "torch's six, four of ours and backend"),
    "linear_cross_entropy": (12, "linear's three, cross_entropy's seven, positions and backend"),
}


def relative(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def functions_of(path: Path) -> dict[str, ast.FunctionDef]:
    tree = ast.parse(path.read_text())
    return {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}


def parameters_of(function: ast.FunctionDef) -> list[str]:
    arguments = function.args
    return [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]


def sample(op: str, backend: str, dtype=torch.float32):
    """A valid call's arguments, floating ones wanting gradients; skips where there is no kernel."""
    torch.manual_seed(0)
    args, kwargs = sample_inputs[op](device_of(backend), dtype)
    skip_unsupported(op, backend, *args, **kwargs)
    named = inspect.signature(getattr(slimkernels, op)).bind(*args, **kwargs).arguments
    for name, value in named.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            value.requires_grad_(name not in CONSTANTS.get(op, ()))
    return args, kwargs


def leaves_and_outputs(op: str, backend: str, call=lambda function, *a, **k: function(*a, **k)):
    """The tensors of a valid call that want gradients, and what the call returns, as a tuple."""
    args, kwargs = sample(op, backend)
    leaves = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.requires_grad]
    output = call(getattr(slimkernels, op), *args, **kwargs, backend=backend)
    return leaves, output if isinstance(output, tuple) else (output,)


def copied(argument):
    if isinstance(argument, list):
        return [copied(a) for a in argument]
    return argument.clone() if isinstance(argument, Tensor) else argument


def tensors_in(arguments):
    flat = [a for arg in arguments for a in (arg if isinstance(arg, list) else [arg])]
    return [a for a in flat if isinstance(a, Tensor)]


def recorded_calls(op: str, backend: str, monkeypatch):
    """Every registered op that one forward and backward call, with its arguments and results."""
    args, kwargs = sample(op, backend)
    module, calls = importlib.import_module(f"slimkernels.ops.{op}"), []
    shared = [m for m in vars(module).values() if getattr(m, "__name__", "") in SHARED]

    def recording(function):
        def record(*arguments):
            before = [copied(a) for a in arguments]
            results = function(*arguments)
            calls.append((function.op, arguments, before, results))
            return results

        return record

    if hasattr(module, "may_skip_dispatcher"):
        monkeypatch.setattr(module, "may_skip_dispatcher", lambda args: False)
    for place in (module, *shared):
        for name, function in vars(place).copy().items():
            if hasattr(function, "op"):
                monkeypatch.setattr(place, name, recording(function))
    output = getattr(slimkernels, op)(*args, **kwargs, backend=backend)
    outputs = output if isinstance(output, tuple) else (output,)
    torch.autograd.backward(outputs, [torch.randn_like(y) for y in outputs])
    directions = {call[0].name().rpartition("_")[2] for call in calls}
    assert directions == {"forward", "backward"}, "ops are X_forward and X_backward"
    return calls


@pytest.fixture(autouse=True)
def linear_on_any_processor(monkeypatch):
    """linear's cpu backend refuses where it is not the faster; its contract holds everywhere."""
    module = OPS["linear"].modules["cpu"]
    if not isinstance(module, str) and torch.backends.mkldnn.is_available():
        monkeypatch.setattr(module, "_IS_AMD", True)
        monkeypatch.setattr(module, "_HAS_BOTH", True)


every_op = pytest.mark.parametrize("op", sorted(OPS))
every_backend = pytest.mark.parametrize("backend", KERNEL_BACKENDS)


# Ops


@every_op
def test_backends_have_the_same_parameters(op):
    found = {}
    for path in PACKAGE.glob(f"backends/*/{op}.py"):
        functions = functions_of(path)
        assert {"unsupported", "forward", "backward"} <= set(functions), relative(path)
        names = {n: parameters_of(functions[n]) for n in ("unsupported", "forward", "backward")}
        forward, refused = names["forward"], names["unsupported"]
        assert forward in (refused, [*refused, "seed"]), relative(path)
        found[relative(path)] = names
    assert found, f"{op} has no kernel at all"
    first = next(iter(found))
    for path, names in found.items():
        assert names == found[first], f"{path} differs from {first}"


@every_op
@every_backend
def test_registered_ops_pass_opcheck(op, backend, monkeypatch):
    for registered, arguments, _, _ in recorded_calls(op, backend, monkeypatch):
        with torch.no_grad():
            detached = tuple(copied(a) for a in arguments)
        torch.library.opcheck(registered, detached)


@every_op
@every_backend
def test_inputs_are_not_written_and_outputs_share_no_memory(op, backend, monkeypatch):
    for registered, arguments, before, results in recorded_calls(op, backend, monkeypatch):
        results = results if isinstance(results, tuple) else (results,)
        inputs = tensors_in(arguments)
        for given, kept in zip(inputs, tensors_in(before), strict=True):
            same = torch.equal(given.nan_to_num(7.0), kept.nan_to_num(7.0))
            assert same, f"{registered} writes an input"
        given, own = (
            [t.untyped_storage().data_ptr() for t in tensors if t.numel()]
            for tensors in (inputs, results)
        )
        assert len(own) == len(set(own)), f"two outputs of {registered} share memory"
        assert not set(own) & set(given), f"an output of {registered} shares an input's memory"


@pytest.mark.parametrize("op", sorted(set(OPS) - LINEAR))
@every_backend
@pytest.mark.parametrize("dy", ["constant", "recorded"])
def test_a_second_derivative_is_an_error(op, backend, dy):
    wanted, outputs = leaves_and_outputs(op, backend)
    dys = [torch.ones_like(y, requires_grad=dy == "recorded") for y in outputs]
    first = torch.autograd.grad(outputs, wanted, dys, retain_graph=True)
    recorded = torch.autograd.grad(outputs, wanted, dys, create_graph=True)
    assert all(map(torch.equal, recorded, first)), "recording changes the gradients"
    # Not only alone: beside a loss, what depends on nothing would be left out in silence.
    loss = sum(y.sum() for y in outputs)
    for gradient in recorded:
        for total in (gradient.sum(), gradient.sum() + loss):
            with pytest.raises(RuntimeError, match=f'^{op}: .* use_backend."torch".'):
                torch.autograd.grad(total, wanted, allow_unused=True, retain_graph=True)
    with pytest.raises(RuntimeError, match=f"^{op}: "):
        sum(gradient.sum() for gradient in recorded).backward()


@every_op
@every_backend
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients(op, backend, reentrant):
    wanted, outputs = leaves_and_outputs(op, backend)
    expected = torch.autograd.grad(outputs, wanted, [torch.ones_like(y) for y in outputs])

    def checkpointed(function, *args, **kwargs):
        run = functools.partial(function, **kwargs)  # the reentrant one takes no keywords
        return checkpoint(run, *args, use_reentrant=reentrant)

    wanted, outputs = leaves_and_outputs(op, backend, checkpointed)
    torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])
    assert all(map(torch.equal, (t.grad for t in wanted), expected))


@every_op
@pytest.mark.parametrize("wrong", [[1.0], None, "int16"], ids=["list", "None", "int16"])
def test_a_wrong_call_gets_the_same_sentence_from_every_backend(op, wrong):
    torch.manual_seed(0)
    args, kwargs = sample_inputs[op](torch.device("cpu"), torch.float32)
    first = args[0].to(torch.int16) if wrong == "int16" else wrong
    messages = set()
    for backend in (None, *BACKENDS):
        with pytest.raises(ValueError) as raised:
            getattr(slimkernels, op)(first, *args[1:], **kwargs, backend=backend)
        messages.add(str(raised.value))
    assert len(messages) == 1, messages
    parameter = next(iter(inspect.signature(getattr(slimkernels, op)).parameters))
    assert messages.pop().startswith(f"{op}: {parameter} must be ")


NUMBERS = {
    "layer_norm": {"normalized_shape": 8.0, "eps": -1e-5},
    "add_layer_norm": {"normalized_shape": [True], "eps": -1e-5, "dropout_p": "x"},
    "group_norm": {"num_groups": 2.0, "eps": -1e-5},
    "rms_norm": {"normalized_shape": 8.0, "eps": "a", "zero_centered": 1},
    "add_rms_norm": {"normalized_shape": [True], "eps": -1e-5, "dropout_p": "x"},
    "cross_entropy": {"ignore_index": 1.5, "label_smoothing": "a", "z_loss": "a", "softcap": "a"},
    "bias_dropout_add": {"dropout_p": "x"},
    "embedding": {"padding_idx": 0.5, "eps": -1e-5, "dropout_p": "x"},
    "rotary": {"offset": 0.5},
    "linear_cross_entropy": {"ignore_index": 1.5, "label_smoothing": "a", "z_loss": "a"},
    "softmax": {"dim": 0.5, "scale": "a", "dropout_p": "a", "training": 1},
    "log_softmax": {"dim": 0.5, "scale": "a"},
    "scaled_dot_product_attention": {"dropout_p": "a", "scale": float("nan")},
}


@pytest.mark.parametrize("op, parameter", [(op, p) for op, given in NUMBERS.items() for p in given])
def test_a_wrong_number_gets_the_same_sentence_from_every_backend(op, parameter):
    args, kwargs = sample_inputs[op](torch.device("cpu"), torch.float32)
    function = getattr(slimkernels, op)
    bound = inspect.signature(function).bind(*args, **kwargs)
    bound.arguments[parameter] = NUMBERS[op][parameter]
    messages = set()
    for backend in (None, *BACKENDS):
        bound.arguments["backend"] = backend
        with pytest.raises(ValueError) as raised:
            function(*bound.args, **bound.kwargs)
        messages.add(str(raised.value))
    assert len(messages) == 1, messages
    assert messages.pop().startswith(f"{op}: {parameter} must be ")


@pytest.mark.parametrize("op", sorted(set(OPS) - {"linear"}))
def test_meta_tensors_give_shapes(op):
    args, kwargs = sample_inputs[op](torch.device("cpu"), torch.float32)
    args = tuple(a.to("meta") if isinstance(a, Tensor) else a for a in args)
    kwargs = {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in kwargs.items()}
    kwargs.pop("dropout_p", None)  # no generator on meta
    result = getattr(slimkernels, op)(*args, **kwargs)
    assert all(t.is_meta for t in (result if isinstance(result, tuple) else (result,)))


@every_op
def test_an_unknown_backend_is_one_sentence(op):
    args, kwargs = sample_inputs[op](torch.device("cpu"), torch.float32)
    with pytest.raises(ValueError, match=f"^{op}: unknown backend 'tpu'; the backends are "):
        getattr(slimkernels, op)(*args, **kwargs, backend="tpu")


@every_op
def test_every_op_is_complete(op):
    assert op in sample_inputs, "slimkernels/testing.py has no sample inputs"
    assert op in slimkernels.__all__, "slimkernels/__init__.py does not export it"
    for path in (f"tests/ops/test_{op}.py", f"benchmarks/ops/bench_{op}.py"):
        assert (ROOT / path).is_file(), f"{path} is missing"


def test_every_op_module_defines_its_op():
    modules = {path.stem for path in PACKAGE.glob("ops/*.py") if path.stem[0] != "_"}
    assert modules == set(OPS) | set(UPDATES)
    assert set(OPS) == set(sample_inputs)


# Updates: optimizers' ops, which write their arguments


@pytest.mark.parametrize("update", sorted(UPDATES))
def test_backends_of_an_update_have_the_same_parameters(update):
    backends = UPDATES[update].order
    paths = [PACKAGE / f"backends/{backend}/{update}.py" for backend in backends]
    assert set(paths) == set(PACKAGE.glob(f"backends/*/{update}.py"))
    reference = functions_of(PACKAGE / f"ops/{update}.py")[f"{update}_reference"]
    for path in paths:
        functions = functions_of(path)
        for name in ("unsupported", "update"):
            assert parameters_of(functions[name]) == parameters_of(reference), relative(path)


@pytest.mark.parametrize("name", slimkernels.optim.__all__)
def test_every_optimizer_is_complete(name):
    update = name.lower()
    assert update in UPDATES and getattr(slimkernels.optim, name).op is UPDATES[update]
    for path in (f"tests/optim/test_{update}.py", f"benchmarks/ops/bench_{update}.py"):
        assert (ROOT / path).is_file(), f"{path} is missing"


# Public interface


def test_public_names_are_frozen():
    assert set(slimkernels.__all__) == PUBLIC_NAMES
    assert all(hasattr(slimkernels, name) for name in PUBLIC_NAMES)


PUBLIC_FUNCTIONS = [n for n in sorted(PUBLIC_NAMES) if inspect.isfunction(getattr(slimkernels, n))]


@pytest.mark.parametrize("name", PUBLIC_FUNCTIONS)
def test_public_functions(name):
    function = getattr(slimkernels, name)
    parameters = inspect.signature(function).parameters
    allowed, _ = LONG_PARAMETER_LISTS.get(name, (MAX_PUBLIC_PARAMETERS, ""))
    assert len(parameters) <= allowed, f"{name} has {len(parameters)} parameters"
    if name == "use_backend":  # a context manager returns nothing
        return
    assert "Returns" in (function.__doc__ or ""), f"{name}'s docstring does not say what it returns"
    if name in OPS:
        assert list(parameters)[-1] == "backend"
        assert parameters["backend"].kind is inspect.Parameter.KEYWORD_ONLY


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("backends/triton/*.py")), ids=relative)
def test_kernels_have_few_parameters(path):
    for name, function in functions_of(path).items():
        if not any("triton.jit" in ast.unparse(d) for d in function.decorator_list):
            continue
        at_run_time = [
            a.arg
            for a in function.args.args
            if a.annotation is None or "constexpr" not in ast.unparse(a.annotation)
        ]
        key = f"{relative(path)}:{name}"
        allowed, _ = LONG_PARAMETER_LISTS.get(key, (MAX_KERNEL_PARAMETERS, ""))
        assert len(at_run_time) <= allowed, f"{key} has {len(at_run_time)} parameters"
