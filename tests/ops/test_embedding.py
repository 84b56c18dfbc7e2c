import pytest
import torch
import torch.nn.functional as F
from op_cases import (
    DTYPES,
    KERNEL_BACKENDS,
    assert_rounding_alone,
    device_of,
    maybe_compiled,
    skip_unsupported,
    with_seed,
)
from residual_cases import mask_of

import slimkernels as sk
from slimkernels.ops import embedding as module
from slimkernels.ops._dropout import draw_seed
from slimkernels.testing import assert_op_matches, run_with_gradients

NAME = "embedding"
PARTS = {  # tables besides the tokens', and parameters of the norm; None for no norm
    "all": ("position", "segment", "norm_weight", "norm_bias"),
    "plain norm": ("position", "norm"),
    "bias": ("segment", "norm_bias"),
    "sum": ("position", "segment"),
    "tokens": (),
}
CASES = [
    *((torch.bfloat16, parts, 0.0 if parts == "plain norm" else 0.3) for parts in PARTS),
    *((torch.float32, parts, 0.0) for parts in ("all", "sum", "tokens")),
    *((dtype, "all", 0.3) for dtype in (torch.float32, torch.float16)),
]
ROWS = {"": 5, "position": 4, "segment": 2}


def inputs_of(shape, C, dtype, device, parts="all", wide=(), rows=ROWS):
    """What the functions below take: ids and table of each kind, and the norm's parameters."""
    torch.manual_seed(0)
    inputs = []
    for which, count in rows.items():
        ids, table = torch.randint(count, shape), torch.randn(count, C)
        if which and which not in PARTS[parts]:
            inputs += None, None
        else:
            inputs += ids.to(device), table.to(device, torch.float32 if which in wide else dtype)
    weight, bias = torch.randn(2, C).to(device, dtype).unbind()
    weight = weight if "norm_weight" in PARTS[parts] else None
    return (*inputs, weight, bias if "norm_bias" in PARTS[parts] else None)


def options_of(inputs, parts="all", dropout_p=0.0, **options):
    names = ("position_ids", "position_weight", "segment_ids", "segment_weight")
    named = dict(zip((*names, "norm_weight", "norm_bias"), inputs[2:], strict=True))
    eps = 1e-5 if any("norm" in part for part in PARTS[parts]) else None
    return {**named, "eps": eps, "dropout_p": dropout_p, **options}


def functions_of(backend, parts="all", dropout_p=0.0, compiled=False, padding_idx=None):
    """The op, eager PyTorch in the inputs' dtypes, and the definition, from the same seed."""
    eps = 1e-5 if any("norm" in part for part in PARTS[parts]) else None

    def ours(*inputs):
        options = options_of(inputs, parts, dropout_p, padding_idx=padding_idx)
        return sk.embedding(*inputs[:2], **options, backend=backend)

    def eager(ids, weight, position_ids, position, segment_ids, segment, norm_weight, norm_bias):
        y = F.embedding(ids, weight, padding_idx)
        for others, table in ((position_ids, position), (segment_ids, segment)):
            y = y if table is None else y + F.embedding(others, table)
        if eps is not None:
            norm = (None if p is None else p.to(y.dtype) for p in (norm_weight, norm_bias))
            y = F.layer_norm(y, y.shape[-1:], *norm, eps)
        if dropout_p:
            y = y * mask_of(y, draw_seed(y.device), dropout_p) * (1 / (1 - dropout_p))
        return y.to(weight.dtype)

    def reference(*inputs):
        seed = draw_seed(inputs[0].device) if dropout_p else None
        padding = -1 if padding_idx is None else padding_idx % inputs[1].shape[0]
        return module.embedding_reference(*inputs, padding, eps, dropout_p, seed)

    return with_seed(maybe_compiled(ours, compiled)), with_seed(eager), with_seed(reference)


def skip(backend, inputs, parts="all", dropout_p=0.0):
    skip_unsupported(NAME, backend, *inputs[:2], **options_of(inputs, parts, dropout_p))


def wanted(function, inputs):
    """`function` of the inputs that are given: those that run_with_gradients can differentiate."""
    places = [i for i, t in enumerate(inputs) if t is not None]

    def call(*given):
        whole = [None] * len(inputs)
        for place, t in zip(places, given, strict=True):
            whole[place] = t
        return function(*whole)

    return call


def check(backend, inputs, parts="all", dropout_p=0.0, compiled=False, padding_idx=None):
    skip(backend, inputs, parts, dropout_p)
    functions = functions_of(backend, parts, dropout_p, compiled, padding_idx)
    functions = [wanted(function, inputs) for function in functions]
    assert_op_matches(*functions, tuple(t for t in inputs if t is not None))


@pytest.mark.parametrize("dtype, parts, dropout_p", CASES, ids=str)
@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_matches_reference(backend, dtype, parts, dropout_p):
    check(backend, inputs_of((2, 4), 37, dtype, device_of(backend), parts), parts, dropout_p)


@pytest.mark.parametrize("shape, C", [((0,), 8), ((), 5), ((1, 1), 1), ((2, 1, 2), 130)], ids=str)
@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_shapes(backend, shape, C):
    check(backend, inputs_of(shape, C, torch.float32, device_of(backend)))


@pytest.mark.parametrize("parts, dropout_p", [("all", 0.3), ("sum", 0.0)])
@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_compiled(backend, parts, dropout_p):
    inputs = inputs_of((1, 4), 24, torch.bfloat16, device_of(backend), parts)
    check(backend, inputs, parts, dropout_p, compiled=True)


@pytest.mark.parametrize("parts, dropout_p", [("all", 0.0), ("sum", 0.3)])
@pytest.mark.parametrize("wide", [("position",), ("position", "segment")], ids=str)
@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_float32_tables_beside_bfloat16(backend, wide, parts, dropout_p):
    inputs = inputs_of((5,), 37, torch.bfloat16, device_of(backend), parts, wide)
    check(backend, inputs, parts, dropout_p)


@pytest.mark.parametrize("parts, C", [("tokens", 9000), ("plain norm", 20000)])
@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_long_rows(backend, parts, C):
    check(backend, inputs_of((2,), C, torch.float32, device_of(backend), parts), parts)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_every_instruction_set(each_isa, dtype):
    for _ in each_isa():
        for parts in PARTS:
            check("cpu", inputs_of((40,), 133, dtype, "cpu", parts), parts, 0.3)


def ids_of(counts):
    """Ids in no order, each as often as its count says."""
    ids = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    return ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))]


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_a_tables_gradient_is_its_rows_exact_sum(backend, dtype, monkeypatch):
    B = 32  # tokens of a block
    if backend == "triton" and device_of(backend).type == "cpu":  # the interpreter takes its time
        table_gradient = pytest.importorskip("slimkernels.backends.triton._table_gradient")
        B = 4
        monkeypatch.setattr(table_gradient, "BLOCK_M", B)
        monkeypatch.setattr(table_gradient, "RUNS", 2)
    # Once, more often than a block has tokens, over many blocks; and runs that begin and end at the
    # edges of blocks.
    for i, counts in enumerate(
        ([1], [B], [1, B - 1, B + 1], [B - 1, 2 * B, 1], [1] * (B + 1), [B + 1, 0, B - 2, 17 * B])
    ):
        ids, V, C = ids_of(counts).to(device_of(backend)), len(counts) + 2, 21
        # Integers, whose sums are exact in float32 and not in bfloat16.
        dsum = torch.randint(-99, 100, (len(ids), C)).to(ids.device, dtype)
        skip_unsupported(NAME, backend, ids, dsum.new_zeros(V, C), dropout_p=0.1)
        padding_idx = (-1, -1, 0, 1, -1, -1)[i]
        actual = module.embedding_table_backward(dsum, ids, V, dtype, padding_idx, backend)
        expected = torch.zeros(V + 1, C).double().index_add_(0, ids.cpu(), dsum.double().cpu())
        expected[padding_idx] = 0
        expected = expected[:-1]
        assert torch.equal(actual.cpu(), expected.to(dtype)), (counts, padding_idx)


@pytest.mark.parametrize("padding_idx", [2, -5])
@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_the_padding_row_gets_no_gradient(backend, padding_idx):
    inputs = inputs_of((9,), 20, torch.float32, device_of(backend), "sum")
    inputs[0][:4] = padding_idx % ROWS[""]
    check(backend, inputs, "sum", padding_idx=padding_idx)


@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_any_layout_of_ids_and_tables(backend):
    inputs = inputs_of((3, 2), 24, torch.float32, device_of(backend))
    ids, weight, position_ids, position, segment_ids, segment, *norm = inputs
    skip(backend, inputs)
    position_ids = position_ids[0]  # (T,), as one sequence's
    dense = (ids, weight, position_ids.expand(3, 2).clone(), position, segment_ids, segment, *norm)
    strided = (
        *(ids.t().contiguous().t().int(), weight.t().contiguous().t()),
        *(position_ids, position, segment_ids.int()[:1].expand(3, 2), segment.repeat(1, 2)[:, :24]),
        *(torch.stack([t, t], 1)[:, 0] for t in norm),
    )
    dense = (*dense[:4], segment_ids[:1].expand(3, 2).clone(), *dense[5:])
    ours, _, _ = functions_of(backend, dropout_p=0.3)
    dy = torch.randn(2, 3, 24, device=weight.device).transpose(0, 1)
    expected, actual = (run_with_gradients(ours, each, (dy,)) for each in (dense, strided))
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_the_mask_is_that_of_the_definition_and_backward_replays_it(backend):
    inputs = inputs_of((2, 4), 37, torch.float32, device_of(backend), "tokens")
    skip(backend, inputs, "tokens", 0.5)
    ours, _, _ = functions_of(backend, "tokens", 0.5)
    ids = torch.arange(8, device=inputs[0].device).view(2, 4)
    weight = torch.ones(8, 37, device=ids.device)
    results = run_with_gradients(wanted(ours, (1, 1, *[None] * 6)), (ids, weight))
    torch.manual_seed(7)
    keep = mask_of(weight, draw_seed(weight.device), 0.5)
    assert torch.equal(results["output 0"].view(8, 37), 2.0 * keep)
    assert torch.equal(results["gradient 0"] != 0, keep)
    evaluated = sk.embedding(ids, weight, dropout_p=0.5, training=False)
    assert torch.equal(evaluated, weight.view(2, 4, 37))


def test_same_bits_for_any_number_of_threads(each_isa):
    rows = {"": 300, "position": 50, "segment": 2}
    # So many rows that threads do meet, whoever else the machine works for.
    inputs = inputs_of((5000,), 200, torch.float32, "cpu", rows=rows)
    ours, _, _ = functions_of("cpu", dropout_p=0.1)
    threads = torch.get_num_threads()
    for isa in each_isa():
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(run_with_gradients(ours, inputs))
        torch.set_num_threads(threads)
        for name, expected in results[0].items():
            for other in results[1:]:
                assert torch.equal(other[name], expected), (isa, name)


@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_frozen_tables_cost_nothing(backend, monkeypatch):
    inputs = inputs_of((3,), 16, torch.float32, device_of(backend))
    skip(backend, inputs)
    rows, original = [], module.embedding_table_backward

    def counted(dsum, ids, count, *rest):
        rows.append(count)
        return original(dsum, ids, count, *rest)

    monkeypatch.setattr(module, "embedding_table_backward", counted)
    inputs[3].requires_grad_()
    ours, _, _ = functions_of(backend)
    ours(*inputs).sum().backward()
    assert rows == [ROWS["position"]]
    assert inputs[3].grad is not None and inputs[1].grad is None and inputs[6].grad is None


@pytest.mark.parametrize("parts", ["all", "sum"])
@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_an_id_that_the_host_cannot_see_reads_nothing(backend, parts):
    ids, weight, position_ids, *rest = inputs_of((7,), 20, torch.float32, device_of(backend), parts)
    skip(backend, (ids, weight, position_ids, *rest), parts)
    function, _, _ = functions_of(backend, parts, compiled=True)
    kept = torch.tensor([True, False, True, False, False, True, False], device=ids.device)
    wrong = ids.masked_fill(~kept, -1)
    wrong[3], wrong[4] = len(weight), 2**40
    wrong[6], position_ids[6] = ids[6], ROWS["position"]
    weight.requires_grad_()
    y = function(wrong, weight, position_ids, *rest)
    assert y[~kept].isnan().all()
    (dweight,) = torch.autograd.grad(y[kept].sum(), weight)
    position_ids[6] = 0
    expected = function(ids, weight, position_ids, *rest)
    assert torch.equal(y[kept], expected[kept])
    if parts == "sum":  # a norm's backward makes NaN of the last row's 0
        assert torch.equal(dweight, torch.autograd.grad(expected[kept].sum(), weight)[0])


def test_the_definition_is_torchs():
    ids, weight, position_ids, position, _, _, norm_weight, norm_bias = inputs_of(
        (3, 4), 5, torch.float64, "cpu"
    )
    options = dict(position_ids=position_ids, position_weight=position)
    y = sk.embedding(ids, weight, **options, norm_weight=norm_weight, norm_bias=norm_bias)
    total = F.embedding(ids, weight) + F.embedding(position_ids, position)
    assert_rounding_alone(y, F.layer_norm(total, (5,), norm_weight, norm_bias), terms=5)
    assert torch.equal(sk.embedding(ids, weight, **options), total)


@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_autocast_changes_nothing(backend):
    inputs = inputs_of((3, 4), 16, torch.float32, device_of(backend))
    skip(backend, inputs)
    for which in (backend, "torch"):
        ours, _, _ = functions_of(which)
        with torch.autocast(inputs[0].device.type, torch.bfloat16):
            y = ours(*inputs)
        assert torch.equal(y, ours(*inputs))


IDS, W = torch.tensor([[1, 2], [0, 3]]), torch.randn(4, 8)
POSITIONS = {"position_ids": IDS, "position_weight": W}


@pytest.mark.parametrize(
    "args, options, sentence",
    [
        (([1], W), {}, "input must be a tensor; got list"),
        ((W, W), {}, "input must be int64 or int32; got torch.float32"),
        ((IDS, [1.0]), {}, "weight must be a tensor; got list"),
        ((IDS, W[0]), {}, r"weight must be a matrix .*; got \(8,\)"),
        ((IDS, W[:, :0]), {}, r"weight must be a matrix .* C at least 1; got \(4, 0\)"),
        ((IDS, W[:3]), {}, r"input must be in \[0, 3\); got 3"),
        ((IDS - 1, W), {}, r"input must be in \[0, 4\); got -1"),
        ((IDS, W.to("meta")), {}, "input must be on meta like its table; got cpu"),
        ((IDS, W, 4), {}, r"padding_idx must be in \[-4, 4\), the rows of weight; got 4"),
        ((IDS, W), {"position_ids": IDS}, "position_weight must be given with position_ids"),
        ((IDS, W), {"segment_weight": W}, "segment_ids must be given with segment_weight"),
        ((IDS, W), POSITIONS | {"position_ids": IDS + 1}, r"position_ids must be in \[0, 4\)"),
        ((IDS, W), POSITIONS | {"position_ids": IDS[0, :1].expand(3)}, "position_ids must broad"),
        ((IDS, W), POSITIONS | {"position_weight": W[:, 1:]}, r"position_weight must be \(rows, 8"),
        ((IDS, W), POSITIONS | {"position_weight": W.half()}, "position_weight must be torch.floa"),
        ((IDS, W), {"norm_bias": W[0, 1:]}, r"norm_bias must have shape \(8,\), the columns of we"),
        ((IDS, W), {"norm_weight": W[0].half()}, "norm_weight must be torch.float32 like weight"),
        ((IDS, W), {"dropout_p": 1.0}, r"dropout_p must be in \[0, 1\); got 1.0"),
        ((IDS, W), {"training": 1}, "training must be True or False; got 1"),
    ],
)
def test_bad_input_is_one_sentence(args, options, sentence):
    for backend in (None, *KERNEL_BACKENDS, "torch"):
        with pytest.raises(ValueError, match=f"^{NAME}: {sentence}"):
            sk.embedding(*args, **options, backend=backend)


def test_what_eager_is_faster_at_is_left_to_it(monkeypatch):
    cpu = pytest.importorskip("slimkernels.backends.cpu.embedding")
    monkeypatch.setattr(cpu, "MIN_ELEMENTS", 33)
    with pytest.raises(sk.BackendError, match="faster below 33 elements, and the output has 32"):
        sk.embedding(IDS, W, **POSITIONS, backend="cpu")
    with pytest.raises(sk.BackendError, match="F.embedding is faster where one table"):
        sk.embedding(IDS, W, backend="cpu")
    for options in (POSITIONS | {"dropout_p": 0.1}, {"dropout_p": 0.1}):
        assert sk.explain(sk.embedding, IDS, W, **options).startswith("embedding runs on cpu")
