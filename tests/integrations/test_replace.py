"""What replace() changes, what it leaves and says, and that restore() undoes it."""

import copy
import io
import pickle
import sys
import types

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import slimkernels
from slimkernels import replace, restore
from slimkernels.integrations._swap import Swap

replacing = sys.modules["slimkernels.integrations.replace"]  # the module, not the function

SWAPPED = {
    *("LayerNorm", "RMSNorm", "GroupNorm", "GELU", "SiLU", "Softmax", "LogSoftmax", "Dropout"),
    *("CrossEntropyLoss", "MultiheadAttention", "TransformerEncoder", "TransformerEncoderLayer"),
    *("TransformerDecoder", "TransformerDecoderLayer"),
}


def fingerprint(model):
    """Classes, attributes and their order, buffers, hooks: by identity."""
    return [
        (type(m), [(name, id(value)) for name, value in vars(m).items()]) for m in model.modules()
    ]


def outputs(model, batch):
    return [y.detach().clone() for y in model(*batch)]


def test_the_same_numbers(model, assert_right):
    replace(model)
    assert_right(model)


def test_every_module_is_swapped_and_keeps_all_it_has(model, batch):
    names = {name for name in SWAPPED if name in vars(slimkernels.nn)}
    assert names == SWAPPED
    modules, state = dict(model.named_modules()), model.state_dict()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen = []
    model.encoder.layers[0].norm1.register_forward_hook(lambda *_: seen.append("forward"))
    model.mlp[1].register_full_backward_hook(lambda *_: seen.append("backward"))
    model.decoder.eval()
    report = replace(model)
    assert report.model is model
    assert {row.kind.rpartition(".")[2] for row in report.swapped} == SWAPPED
    for path, module in model.named_modules():
        assert module is modules[path]
        name = type(module).__name__
        assert type(module) is getattr(slimkernels.nn, name, None) or name not in SWAPPED, path
    after = model.state_dict()
    assert list(after) == list(state)
    assert all(after[k].data_ptr() == state[k].data_ptr() for k in state)
    assert model.head.weight is model.embedding.weight and model.again is model.mlp[3]
    assert model.training and not model.decoder.training
    before = [p.clone() for p in model.parameters()]
    model(*batch)[0].backward()
    optimizer.step()
    assert seen == ["forward", "backward"]
    assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_restore_is_bit_for_bit(model, batch):
    before, expected = fingerprint(model), outputs(model, batch)
    swapped = replace(model).swapped
    assert fingerprint(model) != before
    report = restore(model)
    assert [row.path for row in report.restored] == [row.path for row in swapped]
    assert fingerprint(model) == before
    assert all(map(torch.equal, outputs(model, batch), expected))
    assert str(restore(model)) == "Model: nothing to restore"


def test_a_second_call_swaps_nothing_more(model):
    first = replace(model)
    state = fingerprint(model)
    second = replace(model)
    assert not second.swapped and fingerprint(model) == state
    assert [row.path for row in second.already] == [row.path for row in first.swapped]
    paths = [row.path for row in first.rows]
    assert len(paths) == len(set(paths)) and "mlp.3" in paths and "again" not in paths


def test_parts_first_then_the_whole(model, batch):
    expected = outputs(replace(model, inplace=False).model, batch)
    replace(model.encoder)
    report = replace(model)
    assert report.already and report.swapped
    assert all(map(torch.equal, outputs(model, batch), expected))


def test_a_copy_leaves_the_original(model):
    before = fingerprint(model)
    report = replace(model, inplace=False)
    assert report.model is not model and report.swapped
    assert fingerprint(model) == before


def saved_and_loaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), saved_and_loaded]
)
def test_copies_are_swapped_and_can_be_restored(duplicate, model, batch):
    expected = outputs(model, batch)
    replace(model)
    other = duplicate(model)
    assert [type(m) for m in other.modules()] == [type(m) for m in model.modules()]
    assert all(map(torch.equal, outputs(other, batch), outputs(model, batch)))
    restore(other)
    assert all(map(torch.equal, outputs(other, batch), expected))
    assert type(model.encoder) is slimkernels.nn.TransformerEncoder


class Doubling(nn.LayerNorm):
    def forward(self, x):
        return 2 * super().forward(x)


class Plain(nn.TransformerEncoderLayer):
    pass


def with_own_forward():
    module = nn.LayerNorm(8)
    module.forward = lambda x: x
    return module


def stack_with_own_forward():
    stack = nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 8), 1)
    stack.layers[0].forward = lambda x, *_, **__: x
    return stack


LEFT = {
    "subclass": (lambda: Doubling(8), "a subclass of torch.nn.LayerNorm, which may"),
    "own forward": (with_own_forward, "its forward has been replaced on the instance"),
    "parametrized": (lambda: weight_norm(nn.LayerNorm(8)), "parametrized"),
    "quantised": (lambda: torch.ao.nn.quantized.Softmax(-1), "quantised"),
    "silu in place": (lambda: nn.SiLU(inplace=True), "inplace=True writes its input"),
    "softmax": (lambda: nn.Softmax(), "dim=None leaves the dimension to torch's guess"),
    "bias_kv": (lambda: nn.MultiheadAttention(8, 2, add_bias_kv=True), "add_bias_kv is not"),
    "zero": (lambda: nn.MultiheadAttention(8, 2, add_zero_attn=True), "add_zero_attn is not"),
    "stack of subclasses": (
        lambda: nn.TransformerEncoder(Plain(8, 2, 8), 1, enable_nested_tensor=False),
        "a layer of it is not torch.nn's TransformerEncoderLayer",
    ),
    "stack with own forward": (
        stack_with_own_forward,
        "a layer of it is not torch.nn's TransformerDecoderLayer",
    ),
    "leaf": (lambda: nn.Tanh(), "nothing of ours takes its place"),
    "container": (lambda: nn.Sequential(nn.ReLU()), "not known; its parts were looked at"),
}


@pytest.mark.parametrize("case", LEFT)
def test_what_is_left_says_why(case):
    make, why = LEFT[case]
    module = make()
    before = fingerprint(module)[0]
    report = replace(module)
    assert fingerprint(module)[0] == before
    (row,) = [row for row in report.left if row.path == ""]
    assert row.detail.startswith(why)
    assert why in str(report)


def test_a_model_it_does_not_know_is_left_alone():
    model = nn.Sequential(nn.Conv1d(3, 4, 2), nn.ReLU(), nn.BatchNorm1d(4))
    before = fingerprint(model)
    report = replace(model)
    assert fingerprint(model) == before and not report.swapped
    assert len(report.left) == 4 and str(report).startswith("Sequential: 4 left")


class Configured(nn.Module):
    def __init__(self):
        super().__init__()
        self.config = {"attention": "eager"}


def configure(module):
    before = module.config["attention"]
    module.config["attention"] = "slimkernels"
    return before


def set_back(module, before):
    assert type(module) is Configured
    module.config["attention"] = before


def test_another_source_may_adapt_modules_of_any_class(monkeypatch):
    how = Swap(Configured, None, adapt=configure, undo=set_back)
    source = types.ModuleType("source_of_a_test")
    source.SWAPS = {}
    source.swap_for = lambda module: how if hasattr(module, "config") else None
    monkeypatch.setitem(sys.modules, source.__name__, source)
    monkeypatch.setitem(replacing._SOURCES, source.__name__, "torch")
    monkeypatch.setitem(replacing._SOURCES, "not.there", "a_package_not_imported")
    model = nn.Sequential(Configured(), nn.GELU())
    assert [row.path for row in replace(model).swapped] == ["0", "1"]
    assert [row.path for row in replace(model).already] == ["0", "1"]
    other = copy.deepcopy(model)
    assert model[0].config["attention"] == "slimkernels"
    restore(model)
    assert model[0].config["attention"] == "eager" and set(vars(model[0])) == set(
        vars(Configured())
    )
    restore(other)
    assert other[0].config["attention"] == "eager"


def test_the_report_prints_as_a_table():
    report = replace(nn.Sequential(nn.LayerNorm(4), nn.Tanh(), nn.SiLU(True), nn.LayerNorm(4)))
    lines = [" ".join(line.split()) for line in str(report).splitlines()]
    assert lines == [
        "Sequential: 2 swapped, 3 left",
        "class first of them now, or why not",
        "swapped 2 torch.nn.LayerNorm 0 slimkernels.nn.LayerNorm",
        "left 1 torch.nn.SiLU 2 inplace=True writes its input, which ours never does",
        "left 1 torch.nn.Sequential (model) not known; its parts were looked at",
        "left 1 torch.nn.Tanh 1 nothing of ours takes its place",
    ]


def test_our_own_modules_are_not_restored():
    model = nn.Sequential(slimkernels.nn.LayerNorm(8))
    assert [row.path for row in replace(model).already] == ["0"]
    restore(model)
    assert type(model[0]) is slimkernels.nn.LayerNorm


def compiled_part():
    model = nn.Sequential(nn.LayerNorm(8), nn.GELU())
    model[1].compile(backend="eager")
    return model


@pytest.mark.parametrize(
    "make, sentence",
    [
        (lambda: nn.LayerNorm, "instance of torch.nn.Module; got the class LayerNorm itself"),
        (lambda: [nn.GELU()], "instance of torch.nn.Module; got list"),
        (lambda: torch.compile(nn.GELU()), "not be compiled yet, and it is; replace first"),
        (compiled_part, "not be compiled yet, and 1 is; replace first"),
        (lambda: torch.jit.script(nn.ReLU()), "not be scripted yet, and it is"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_wrong_models_are_refused(make, sentence):
    with pytest.raises(ValueError, match=f"^replace: model must .*{sentence}"):
        replace(make())


@pytest.mark.parametrize("inplace", ["no", 0, None])
def test_a_wrong_inplace_is_refused(inplace):
    model = nn.Sequential(nn.GELU())
    with pytest.raises(ValueError, match=f"^replace: inplace must be .*; got {inplace!r}$"):
        replace(model, inplace=inplace)
    assert type(model[0]) is nn.GELU


def test_restore_refuses_what_somebody_else_has_changed(model):
    replace(model)
    weight_norm(model.encoder.norm)
    before = fingerprint(model)
    with pytest.raises(ValueError, match="^restore: encoder.norm .* become a ParametrizedLayer"):
        restore(model)
    assert fingerprint(model) == before
    with pytest.raises(ValueError, match="^restore: model must be an instance"):
        restore(None)
