"""A swapped model under what torch does to models: compiling, autocast, sharding and the rest."""

import copy

import pytest
import torch
from module_cases import assert_model_no_worse, outputs_and_gradients
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_module, distribute_tensor
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint

import slimkernels
import slimkernels.nn as slim_nn
from slimkernels import replace, restore
from slimkernels.testing import assert_no_worse


@pytest.fixture
def swapped(model):
    replace(model)
    return model


def kernels_in(graph):
    return sum("slimkernels" in str(node.target) for node in graph.nodes)


def test_compiles_whole(swapped, batch, assert_right):
    """The parts for which tests/nn has no such test; of an encoder, what a swap adds to it."""
    torch._dynamo.reset()
    swapped.encoder.eval()
    for name in ("encoder", "mlp", "gate", "scores", "loss"):
        getattr(swapped, name).compile(backend="aot_eager", fullgraph=True)
    assert_right(swapped)


def test_compiled_code_notices_restore():
    graphs = []

    def backend(graph, inputs):
        graphs.append(kernels_in(graph.graph))
        return graph.forward

    model = nn.Sequential(nn.LayerNorm(8))
    replace(model)
    compiled = torch.compile(model, backend=backend)
    x = torch.randn(3, 8)
    with slimkernels.use_backend("cpu"), torch.no_grad():
        compiled(x)
        restore(model)
        assert torch.equal(compiled(x), model(x))
    assert graphs == [1, 0]


def test_exports(swapped, original, batch):
    B = torch.export.Dim("B", min=2, max=64)
    bigger = tuple(torch.cat([t, t]) for t in batch)
    program = torch.export.export(swapped.eval(), batch, dynamic_shapes=({0: B}, {0: B}))
    assert kernels_in(program.graph) > 0
    truth = copy.deepcopy(original).double()(*bigger)
    for results in zip(program.module()(*bigger), original(*bigger), truth, strict=True):
        assert_no_worse(*results)


def test_autocast(model, swapped, original, batch):
    def call(m):
        with torch.autocast("cpu", torch.bfloat16):
            loss, scores = m(*batch)
        return loss.float(), scores.float()

    actual, eager = (outputs_and_gradients(m, call) for m in (swapped, original))
    double = copy.deepcopy(original).double()
    assert_model_no_worse(actual, eager, outputs_and_gradients(double, lambda m: m(*batch)))


def test_grad_scaler_steps(swapped, batch):
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    optimizer = torch.optim.SGD(swapped.parameters(), lr=0.02)
    losses = []
    for _ in range(2):
        with torch.autocast("cpu", torch.float16):
            loss = swapped(*batch)[0]
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert losses[1] < losses[0]


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(swapped, use_reentrant):
    swapped.encoder.layers[0].dropout.p = 0.5  # recomputation must draw the same again
    x = torch.randn(3, 5, 48)

    def run(function):
        torch.manual_seed(1)
        return outputs_and_gradients(swapped.encoder, lambda _, x: function(x), (x,))

    plain = run(swapped.encoder)
    again = run(lambda x: checkpoint(swapped.encoder, x, use_reentrant=use_reentrant))
    assert plain.keys() == again.keys()
    assert all(torch.equal(plain[name], again[name]) for name in plain)


def test_made_on_the_meta_device(original, assert_right):
    with torch.device("meta"):
        model = type(original)()
    replace(model)
    assert model.encoder(torch.empty(2, 3, 48, device="meta")).shape == (2, 3, 48)
    model.to_empty(device="cpu")
    model.load_state_dict(original.state_dict())
    model.head.weight = model.embedding.weight  # to_empty unties, with or without us
    assert_right(model)


def test_functional_call(original, swapped, batch):
    parameters = dict(swapped.named_parameters())

    def loss(parameters):
        return torch.func.functional_call(swapped, parameters, batch)[0]

    results = [torch.func.grad(loss)(parameters)]
    for model in (copy.deepcopy(original), copy.deepcopy(original).double()):
        model(*batch)[0].backward()
        results.append({n: p.grad for n, p in model.named_parameters()})
    assert_model_no_worse(*results)


def test_parametrized_parts_are_left_and_the_rest_is_right(model, batch):
    for part in (model.encoder.norm, model.encoder.layers[0].linear1, model.mlp[0]):
        weight_norm(part)
    expected = outputs_and_gradients(model, lambda m: m(*batch))
    double = copy.deepcopy(model).double()
    report = replace(model)
    parametrized = {row.path for row in report.left if row.detail.startswith("parametrized")}
    assert parametrized == {"encoder.norm", "encoder.layers.0.linear1", "mlp.0"}
    truth = outputs_and_gradients(double, lambda m: m(*batch))
    assert_model_no_worse(outputs_and_gradients(model, lambda m: m(*batch)), expected, truth)


@pytest.mark.parametrize("first", ["replace", "wrap"])
def test_data_parallel(model, first, mesh, batch, expected):
    if first == "replace":
        replace(model)
    wrapped = nn.parallel.DistributedDataParallel(model)
    if first == "wrap":
        assert replace(wrapped).swapped
    actual = outputs_and_gradients(wrapped, lambda m: m(*batch))
    actual = {name.replace("of module.", "of "): value for name, value in actual.items()}
    assert_model_no_worse(actual, *expected)


def shard(model, mesh):
    for part in (*model.encoder.layers, model.encoder.norm, model):
        fully_shard(part, mesh=mesh)


@pytest.mark.parametrize("first", ["replace", "shard"])
def test_fully_shard(model, first, mesh, batch, expected):
    if first == "replace":
        replace(model)
    shard(model, mesh)
    before = [type(m) for m in model.modules()]
    if first == "shard":
        assert replace(model).swapped
    layer = model.encoder.layers[0]
    assert isinstance(layer, FSDPModule) and isinstance(layer, slim_nn.TransformerEncoderLayer)
    actual = outputs_and_gradients(model, lambda m: m(*batch))
    actual = {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in actual.items()}
    assert_model_no_worse(actual, *expected)
    restore(model)
    assert type(model.encoder.norm).__mro__[1:3] == (FSDPModule, nn.LayerNorm)
    if first == "shard":
        assert [type(m) for m in model.modules()] == before
    model(*batch)[0].backward()


DISTRIBUTED = {
    "layer norm": (nn.LayerNorm(64), ()),
    "rms norm": (nn.RMSNorm(64), ()),
    "group norm": (nn.GroupNorm(2, 64), ()),
    "gelu": (nn.GELU(), ()),
    "silu": (nn.SiLU(), ()),
    "softmax": (nn.Softmax(-1), ()),
    "log softmax": (nn.LogSoftmax(-1), ()),
    "loss": (nn.CrossEntropyLoss(), (torch.arange(48),)),
}


@pytest.mark.parametrize("case", DISTRIBUTED)
def test_distributed_tensors_go_to_torch(case, mesh):
    """Tensor and sequence parallelism hand them to norms, activations and the loss."""
    theirs, others = DISTRIBUTED[case]
    theirs = distribute_module(copy.deepcopy(theirs), mesh)
    ours = replace(theirs, inplace=False).model
    x, *others = (distribute_tensor(t, mesh, [Replicate()]) for t in (torch.randn(48, 64), *others))
    y = ours(x, *others)
    assert isinstance(y, DTensor)
    assert torch.equal(y.full_tensor(), theirs(x, *others).full_tensor())
