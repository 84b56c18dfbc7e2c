import itertools

import pytest
import torch
from op_cases import DTYPES, KERNEL_BACKENDS, device_of, maybe_compiled, skip_unsupported

import slimkernels as sk
from slimkernels.backends._mask import mask_rows
from slimkernels.ops.softmax import SOFTMAX, softmax_reference
from slimkernels.testing import assert_op_matches, run_with_gradients

SHAPES = [(1, 1), (3, 7), (9, 1), (2, 3, 5, 33), (4, 70, 65), (2, 5, 769), (0, 8)]
KINDS = {
    "plain": {},
    "scale": {"scale": 0.25},
    "mask": {"mask": True},
    "causal": {"is_causal": True},
    "mask+causal": {"scale": -0.5, "mask": True, "is_causal": True},
}
every_backend = pytest.mark.parametrize("backend", KERNEL_BACKENDS)
every_kind = pytest.mark.parametrize("kind", KINDS)
# Triton's rows in registers, and in short blocks: the loop that long rows take.
every_backend_and_cut = pytest.mark.parametrize(
    "backend, cut",
    [*((backend, "whole") for backend in KERNEL_BACKENDS), ("triton", "blocks")],
    indirect=["cut"],
)


def inputs_of(shape, dtype, device, mean=0.0, spread=1.0):
    torch.manual_seed(0)
    x = torch.randn(shape, device=device)
    # Ties: without them each row of extreme scores has one winner, and next to no gradient.
    x = x.round() if spread > 100 else x
    return x.mul(spread).add(mean).to(dtype)


def options_of(kind, shape, device):
    """The keywords of a kind; its mask hides all of some rows."""
    options = dict(KINDS[kind])
    if "mask" in options:
        torch.manual_seed(1)
        options["mask"] = torch.rand(shape, device=device) < 0.7
        options["mask"][..., -1:, :] &= shape[-1] % 2 == 0
    return options


def eager_softmax(x, dim=-1, *, scale=1.0, mask=None, is_causal=False):
    """What a user of plain PyTorch writes."""
    x = x if scale == 1.0 else x * scale
    if is_causal:
        causal = torch.ones(x.shape[-2:], dtype=torch.bool, device=x.device).tril()
        mask = causal if mask is None else mask & causal
    if mask is None:
        return torch.softmax(x, dim)
    mask = mask.expand(x.shape)
    y = torch.softmax(x.masked_fill(~mask, -float("inf")), dim)
    return y.masked_fill(~mask.any(dim, keepdim=True), 0.0)


def check(backend, x, options, compiled=False):
    skip_unsupported("softmax", backend, x, **options)

    def ours(x):
        return sk.softmax(x, **options, backend=backend)

    def eager(x):
        return eager_softmax(x, **options)

    def reference(x):
        return sk.softmax(x, **options, backend="torch")

    assert_op_matches(maybe_compiled(ours, compiled), eager, reference, (x,))


@pytest.fixture
def cut(request, monkeypatch):
    kernels = SOFTMAX.modules["triton"]
    if request.param == "blocks" and not isinstance(kernels, str):
        monkeypatch.setattr(kernels, "MAX_TILE", 4)
        monkeypatch.setattr(kernels, "BLOCK", 32)
    return request.param


@pytest.mark.parametrize("mean, spread", [(0.0, 1.0), (100.0, 1.0), (0.0, 3e3)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@every_kind
@every_backend
def test_matches_reference(backend, kind, shape, dtype, mean, spread):
    device = device_of(backend)
    x = inputs_of(shape, dtype, device, mean, spread)
    check(backend, x, options_of(kind, shape, device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 5, 33), (0, 8)], ids=str)
@every_kind
@every_backend
def test_compiled(backend, kind, shape, dtype):
    device = device_of(backend)
    check(backend, inputs_of(shape, dtype, device), options_of(kind, shape, device), True)


# Past one segment of the CPU kernel, past Triton's tile, and past everyone's.
@pytest.mark.parametrize("shape", [(3, 4097), (5, 16384), (2, 20011), (2, 262147)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["scale", "mask", "causal"])
@every_backend
def test_long_rows(backend, kind, dtype, shape):
    device = device_of(backend)
    options = options_of(kind, shape, device)
    if kind == "mask":
        options["mask"][0, 5000:] = False
        options["mask"][0, :30] = False
    check(backend, inputs_of(shape, dtype, device, 0.0, 3.0), options)


# Blocks of 32 columns: the maximum rises in some, and causality ends before, in and after them.
@pytest.mark.parametrize("shape, spread", [((40, 65), 1.0), ((33, 96), 30.0)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cut", ["blocks"], indirect=True)
@every_kind
def test_triton_blocks(kind, dtype, shape, spread, cut):
    device = device_of("triton")
    x = inputs_of(shape, dtype, device, 0.0, spread)
    check("triton", x, options_of(kind, shape, device))


@pytest.mark.parametrize("scale", [-3.0, -0.125, 0.0, 1e-30, 7.3])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@every_backend
def test_scale(backend, dtype, scale):
    x = inputs_of((50, 37), dtype, device_of(backend), 5.0)
    check(backend, x, {"scale": scale})
    check(backend, x, {"scale": scale, "is_causal": True})


@every_backend
def test_scale_0_shares_evenly(backend):
    x = inputs_of((6, 40), torch.float32, device_of(backend))
    skip_unsupported("softmax", backend, x, scale=0.0)
    y = sk.softmax(x, scale=0.0, backend=backend)
    assert (y == y[0, 0]).all() and abs(y[0, 0].item() * 40 - 1) < 1e-6


@pytest.mark.parametrize("Tq, Tk", [(1, 6), (5, 1), (4, 40), (40, 4), (33, 33)])
@pytest.mark.parametrize("masked", [False, True])
@every_backend_and_cut
def test_causal_counts_from_the_top_left(backend, masked, Tq, Tk, cut):
    x = inputs_of((3, Tq, Tk), torch.float32, device_of(backend))
    options = {"is_causal": True}
    if masked:
        options["mask"] = torch.rand(3, 1, Tk, device=x.device) < 0.5
    check(backend, x, options)
    y = sk.softmax(x, **options, backend=backend)
    assert not y.triu(1).any()


# Masks: every way to broadcast, the same bits as the mask written out


FOUR = (2, 3, 5, 34)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("broadcast", list(itertools.product([True, False], repeat=4)), ids=str)
@every_backend
def test_mask_broadcasts_over_any_dimensions(backend, broadcast, is_causal):
    x = inputs_of(FOUR, torch.float32, device_of(backend))
    skip_unsupported("softmax", backend, x)
    sizes = [1 if wide else n for wide, n in zip(broadcast, FOUR, strict=True)]
    mask = torch.rand(sizes, device=x.device) < 0.6
    mask.view(-1)[::3] = False
    mask.view(-1)[1::3] = True
    for given in (mask, mask.squeeze(0)):
        results = [
            run_with_gradients(
                lambda x, m=m: sk.softmax(x, mask=m, is_causal=is_causal, backend=backend), (x,)
            )
            for m in (given, given.expand(FOUR).contiguous())
        ]
        for name, expected in results[1].items():
            assert torch.equal(results[0][name], expected), name
    check(backend, x, {"mask": mask, "is_causal": is_causal})


def padding_mask(x):
    """Rows that see a prefix: all, one, none, and some of the columns."""
    lengths = torch.tensor([x.shape[-1], 1, 0, 9, 16, 17], device=x.device)
    return torch.arange(x.shape[-1], device=x.device) < lengths[: x.shape[0]].view(-1, 1, 1, 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("N", [34, 64])
@every_backend_and_cut
def test_padding_mask(backend, N, dtype, cut):
    x = inputs_of((6, 1, 4, N), dtype, device_of(backend))
    mask = padding_mask(x)
    check(backend, x, {"mask": mask})
    check(backend, x, {"mask": mask, "is_causal": True})
    # Nothing at the end of a row, and something in its middle.
    check(backend, x, {"mask": mask.flip(-1)})
    check(backend, x, {"mask": mask.roll(3, -1)})


@pytest.mark.parametrize("dim", [-4, -3, -2, -1, 0, 1, 2, 3])
@pytest.mark.parametrize("sizes", [FOUR, (3, 1, 34), (2, 1, 5, 1), (1,)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@every_backend
def test_any_dimension(backend, dtype, sizes, dim):
    x = inputs_of(FOUR, dtype, device_of(backend))
    check(backend, x, {"dim": dim})
    check(backend, x, {"dim": dim, "scale": 3.0, "mask": torch.rand(sizes, device=x.device) < 0.6})


@pytest.mark.parametrize("dim", [0, -1])
@every_backend
def test_one_dimension(backend, dim):
    x = inputs_of((19,), torch.float32, device_of(backend))
    check(backend, x, {"dim": dim})
    check(backend, x, {"dim": dim, "mask": torch.arange(19, device=x.device) % 3 > 0})


def mask_of(sizes, strides=None):
    flat = torch.rand(10_000, generator=torch.Generator().manual_seed(0)) < 0.5
    return flat.as_strided(sizes, strides or torch.empty(sizes).stride())


# The shape of input, a mask, and how many bytes are copied before a kernel reads it.
LAYOUTS = {
    "dense": (FOUR, mask_of(FOUR), 0),
    "over heads": (FOUR, mask_of((2, 1, 5, 34)), 0),
    "per head": (FOUR, mask_of((1, 3, 1, 34)), 0),
    "padding": (FOUR, mask_of((2, 1, 1, 34)), 0),
    "whole rows": (FOUR, mask_of((2, 3, 5, 1)), 0),
    "a slice of each row": (FOUR, mask_of(FOUR, (700, 200, 40, 1)), 0),
    "queries in steps": (FOUR, mask_of((1, 1, 5, 34), (0, 0, 90, 1)), 0),
    "one": (FOUR, mask_of((1, 1, 1, 1)), 0),
    "two alternations": ((2, 3, 2, 3, 34), mask_of((1, 3, 2, 1, 34)), 0),
    "three alternations": ((2, 3, 2, 3, 34), mask_of((2, 1, 2, 1, 34)), 2 * 3 * 2 * 3 * 34),
    "other columns first": (FOUR, mask_of(FOUR, (1, 2, 6, 30)), 2 * 3 * 5 * 34),
    "every second column": (FOUR, mask_of((2, 1, 1, 34), (68, 68, 68, 2)), 2 * 34),
    "heads before batches": (FOUR, mask_of((2, 3, 1, 34), (34, 68, 1, 1)), 0),
    "heads before batches, in steps": (FOUR, mask_of((2, 3, 5, 34), (34, 80, 250, 1)), 0),
    "four runs": ((2, 3, 2, 3, 34), mask_of((2, 3, 2, 3, 34), (40, 80, 250, 600, 1)), 36 * 34),
    "one column": ((2, 3, 5, 1), mask_of((2, 3, 5, 1), (90, 30, 5, 7)), 0),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_of_a_mask(layout):
    shape, mask, copied = LAYOUTS[layout]
    mask = mask.expand(shape)
    rows = mask_rows(mask)
    row, col = torch.arange(mask.numel() // shape[-1]), torch.arange(shape[-1])
    block = row // rows.inner
    starts = block // rows.middle * rows.stride_outer
    starts += block % rows.middle * rows.stride_middle + row % rows.inner * rows.stride_inner
    at = starts[:, None] + col * rows.stride_col
    memory = rows.mask.as_strided((int(at.max()) + 1,), (1,))
    assert torch.equal(memory[at], mask.reshape(-1, shape[-1]))
    assert rows.stride_col in (0, 1)
    storage = rows.mask.untyped_storage()
    shared = storage.data_ptr() == mask.untyped_storage().data_ptr()
    assert copied == (0 if shared else storage.nbytes())


@pytest.mark.parametrize("layout", LAYOUTS)
@every_backend_and_cut
def test_mask_of_any_layout(backend, layout, cut):
    shape, mask, _ = LAYOUTS[layout]
    device = device_of(backend)
    x = inputs_of(shape, torch.float32, device)
    strided = torch.empty_strided(mask.shape, mask.stride(), dtype=torch.bool, device=device)
    strided.copy_(mask)
    skip_unsupported("softmax", backend, x, mask=strided)
    y = sk.softmax(x, mask=strided, backend=backend)
    assert torch.equal(y, sk.softmax(x, mask=mask.to(device).contiguous(), backend=backend))


# Rows that see nothing, NaN and infinity


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(7, 70), (7, 1)], ids=str)
@every_backend_and_cut
def test_a_row_that_sees_nothing_is_zero(backend, sizes, dtype, cut):
    device = device_of(backend)
    x = inputs_of((7, 70), dtype, device)
    mask = torch.ones(sizes, dtype=torch.bool, device=device)
    mask[2], mask[5] = False, False
    x[2], x[5, 3] = -float("inf"), float("nan")
    check(backend, x, {"mask": mask})
    results = run_with_gradients(lambda x: sk.softmax(x, mask=mask, backend=backend), (x,))
    assert not results["output 0"][[2, 5]].any() and not results["gradient 0"][[2, 5]].any()


# Sees nothing by causality and mask together, neither of which hides the whole row.
@every_backend_and_cut
def test_a_causal_row_that_sees_nothing_is_zero(backend, cut):
    x = inputs_of((6, 45), torch.float32, device_of(backend))
    mask = torch.arange(45, device=x.device) > 2
    mask[-1] = False
    options = {"mask": mask, "is_causal": True}
    check(backend, x, options)
    assert not sk.softmax(x, **options, backend=backend)[:3].any()
    options["mask"] = mask & (torch.arange(45, device=x.device) != 20)
    check(backend, x, options)


def check_not_finite(backend, kind, N):
    device = device_of(backend)
    x = inputs_of((8, N), torch.float32, device)
    options = options_of(kind, (8, N), device)
    if "mask" in options:
        options["mask"][:, [3, 5]] = True
        options["mask"][7] = torch.arange(N, device=device) == 5
    inf = float("inf")
    x[0, 0] = x[7, 5] = float("nan")
    x[1, 0], x[2, 1], x[6, 5] = inf, -inf, -inf
    x[3] = -inf
    x[4, : N - 1] = -inf  # whole segments of the row
    x[5, : N - 1], x[5, 3] = -inf, float("nan")
    skip_unsupported("softmax", backend, x, **options)
    y = sk.softmax(x, **options, backend=backend)
    expected = eager_softmax(x.double(), **options)
    close = dict(rtol=1e-5, atol=1e-7, equal_nan=True, check_dtype=False)
    torch.testing.assert_close(y, expected, **close)
    if kind in ("plain", "scale"):
        dy = torch.randn_like(x)
        ours, theirs = (
            torch.autograd.grad(function(leaf), leaf, dy.to(leaf))[0]
            for function, leaf in (
                (lambda x: sk.softmax(x, **options, backend=backend), x.clone().requires_grad_()),
                (lambda x: eager_softmax(x, **options), x.double().requires_grad_()),
            )
        )
        torch.testing.assert_close(ours, theirs, **close)


@pytest.mark.parametrize("N", [20, 100])
@every_kind
@every_backend_and_cut
def test_scores_that_are_not_finite(backend, kind, N, cut):
    check_not_finite(backend, kind, N)


@pytest.mark.parametrize("N", [9001, 20011])
@every_kind
@every_backend
def test_scores_of_long_rows_that_are_not_finite(backend, kind, N):
    check_not_finite(backend, kind, N)


@every_backend_and_cut
def test_hidden_scores_are_never_looked_at(backend, cut):
    x = inputs_of((4, 70), torch.float32, device_of(backend))
    mask = torch.rand((4, 70), device=x.device) < 0.5
    mask[1] = torch.arange(70, device=x.device) < 40
    skip_unsupported("softmax", backend, x, mask=mask)

    def ours(x):
        return sk.softmax(x, mask=mask, is_causal=False, backend=backend)

    clean = run_with_gradients(ours, (x,))
    for poison in (float("nan"), float("inf"), 3e38):
        poisoned = run_with_gradients(ours, (x.masked_fill(~mask, poison),))
        for name, expected in clean.items():
            assert torch.equal(poisoned[name], expected), name


# Layout, memory, determinism


@every_backend
def test_non_contiguous_input_and_gradient(backend):
    x = inputs_of((6, 4, 24), torch.float32, device_of(backend))
    mask = torch.rand((6, 1, 24), device=x.device) < 0.7
    skip_unsupported("softmax", backend, x, mask=mask)

    def ours(x):
        return sk.softmax(x, mask=mask, backend=backend)

    dense = run_with_gradients(lambda x: ours(x).transpose(0, 1), (x,))
    strided = run_with_gradients(
        lambda x: sk.softmax(x.transpose(0, 1), mask=mask.transpose(0, 1), backend=backend), (x,)
    )
    for name, expected in dense.items():
        assert torch.equal(strided[name], expected), name
    # sum() sends back one element, expanded.
    leaf = x.clone().requires_grad_()
    (dx,) = torch.autograd.grad(ours(leaf).sum(), leaf)
    assert dx.abs().max() < 1e-6


@every_kind
@every_backend
@pytest.mark.parametrize("shape", [(3, 0), (0, 8), (2, 0, 5), (0, 0)], ids=str)
def test_nothing_at_all(backend, shape, kind):
    device = device_of(backend)
    x = torch.empty(shape, device=device, requires_grad=True)
    options = options_of(kind, shape, device)
    skip_unsupported("softmax", backend, x, **options)
    y = sk.softmax(x, **options, backend=backend)
    (dx,) = torch.autograd.grad(y, x, torch.empty_like(y))
    assert y.shape == dx.shape == shape


@pytest.mark.parametrize("shape", [(70, 65), (2, 20011)], ids=str)
@every_kind
@every_backend
def test_same_bits_every_time(backend, kind, shape):
    device = device_of(backend)
    x, options = inputs_of(shape, torch.float32, device), options_of(kind, shape, device)
    skip_unsupported("softmax", backend, x, **options)

    def ours(x):
        return sk.softmax(x, **options, backend=backend)

    first, second = run_with_gradients(ours, (x,)), run_with_gradients(ours, (x,))
    for name, expected in first.items():
        assert torch.equal(second[name], expected), name


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@every_kind
def test_every_instruction_set_and_number_of_threads(each_isa, kind, dtype):
    threads = torch.get_num_threads()
    for shape in [(3, 30011), (7, 130, 97), (50, 3), (2, 34, 34), (8, 34)]:
        options = options_of(kind, shape, "cpu")
        x = inputs_of(shape, dtype, "cpu", 0.0, 20.0)
        for isa in each_isa():
            check("cpu", x, options)

            def ours(x, options=options):
                return sk.softmax(x, **options, backend="cpu")

            results = []
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                results.append(run_with_gradients(ours, (x,)))
            torch.set_num_threads(threads)
            for name, expected in results[0].items():
                assert all(torch.equal(other[name], expected) for other in results[1:]), (isa, name)


def test_rows_that_see_nothing_on_every_instruction_set(each_isa):
    x = inputs_of((6, 70), torch.float32, "cpu")
    x[1] = -float("inf")
    x[2, 68] = float("nan")
    mask = torch.rand(6, 70) < 0.5
    mask[0], mask[1:3, 68] = False, True
    expected = eager_softmax(x.double(), mask=mask)
    for _ in each_isa():
        y = sk.softmax(x, mask=mask, backend="cpu")
        torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-7, equal_nan=True)


# The definition, and bad input


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_the_definition_is_torchs(dim):
    x = inputs_of((3, 4, 5), torch.float64, "cpu")
    assert (sk.softmax(x, dim) - torch.softmax(x, dim)).abs().max() < 1e-15
    assert (sk.softmax(x, dim, scale=0.3) - torch.softmax(x * 0.3, dim)).abs().max() < 1e-15


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_the_definition_is_what_a_user_writes(masked, is_causal):
    x = inputs_of((3, 4, 5), torch.float64, "cpu")
    mask = torch.rand(3, 1, 5) < 0.5 if masked else None
    ours = softmax_reference(x, 0.3, mask, is_causal)
    theirs = eager_softmax(x, scale=0.3, mask=mask, is_causal=is_causal)
    assert torch.equal(ours, theirs)


X, MASK = torch.randn(4, 8), torch.ones(4, 8, dtype=torch.bool)


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (dict(input=[1.0]), "input must be a tensor; got list"),
        (dict(input=X.int()), "input must be float32, float16, bfloat16 or float64; got torch.int"),
        (dict(dim=2), r"dim must be in \[-2, 2\) for input \(4, 8\); got 2"),
        (dict(input=X[0, 0]), r"dim must be in \[0, 0\) for input \(\); got -1"),
        (dict(scale=float("nan")), "scale must be finite; got nan"),
        (dict(scale=-float("inf")), "scale must be finite; got -inf"),
        (dict(mask=[True]), "mask must be a tensor; got list"),
        (dict(mask=X), "mask must be bool, True where an element takes part; got torch.float32"),
        (dict(mask=MASK.to("meta")), "mask must be on cpu like input; got meta"),
        (dict(mask=MASK[:3]), r"mask must broadcast to input \(4, 8\); got \(3, 8\)"),
        (dict(mask=MASK[None]), r"mask must broadcast to input \(4, 8\); got \(1, 4, 8\)"),
        (dict(is_causal=True, dim=0), r"is_causal needs input \(..., Tq, Tk\) and dim -1; got"),
        (dict(is_causal=True, input=X[0]), r"is_causal needs .* input \(8,\) and dim -1"),
    ],
)
@pytest.mark.parametrize("backend", [None, *KERNEL_BACKENDS, "torch"])
def test_bad_input_is_one_sentence(backend, arguments, sentence):
    with pytest.raises(ValueError, match="^softmax: " + sentence):
        sk.softmax(**{"input": X, **arguments}, backend=backend)


def test_parameters_of_torchs_softmax_that_are_absent():
    with pytest.raises(TypeError, match="dtype"):
        sk.softmax(X, -1, dtype=torch.float64)
