import pytest
import torch
from op_cases import DTYPES, assert_rounding_alone, device_of, skip_unsupported
from softmax_cases import (
    FOUR,
    added_mask,
    check,
    check_tensors,
    eager_softmax,
    every_backend,
    every_backend_and_cut,
    every_kind,
    inputs_of,
    options_of,
)

import slimkernels as sk
from slimkernels.testing import assert_no_worse, run_with_gradients

INF = float("inf")


@pytest.mark.parametrize(
    "shape, mean, spread",
    [((9, 1), 0.0, 1.0), ((2, 3, 5, 33), 100.0, 1.0), ((40, 65), 0.0, 3e3), ((0, 8), 0.0, 1.0)],
    ids=str,
)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@every_kind
@every_backend
def test_matches_reference(backend, kind, shape, dtype, mean, spread):
    device = device_of(backend)
    x = inputs_of(shape, dtype, device, mean, spread)
    check(backend, x, options_of(kind, shape, device), log=True)


@pytest.mark.parametrize("shape", [(3, 4097), (2, 20011)], ids=str)
@pytest.mark.parametrize("kind", ["mask"])
@every_backend
def test_long_rows(backend, kind, shape):
    device = device_of(backend)
    options = options_of(kind, shape, device)
    check(backend, inputs_of(shape, torch.float32, device, 0.0, 3.0), options, log=True)


@pytest.mark.parametrize("shape", [(2, 5, 34), (1, 300, 70)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@every_backend
def test_columns(backend, dtype, shape):
    if backend == "triton":  # its tiles have 32 rows, and its interpreter no haste
        shape = tuple(min(n, 70) for n in shape)
    x = inputs_of(shape, dtype, device_of(backend), 0.0, 5.0)
    check(backend, x, {"dim": 1}, log=True)
    mask = torch.rand(shape, device=x.device) < 0.6
    mask[:, :, 3] = False
    check(backend, x, {"dim": 1, "mask": mask, "scale": -0.5}, log=True)


@pytest.mark.parametrize("options", [{"dim": 1}, {"mask": True, "is_causal": True}], ids=str)
@every_backend
def test_compiled(backend, options):
    x = inputs_of(FOUR, torch.float32, device_of(backend))
    if "mask" in options:
        options = options | {"mask": torch.rand(FOUR, device=x.device) < 0.5}
    check(backend, x, options, compiled=True, log=True)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@every_backend
def test_added_mask(backend, dtype):
    x = inputs_of(FOUR, dtype, device_of(backend))
    tensors = {"input": x, "mask": added_mask((2, 1, 5, 34), dtype, x.device)}
    check_tensors(backend, tensors, {"scale": 0.5}, log=True)
    check_tensors(backend, tensors, {"dim": 1}, log=True)


@pytest.mark.parametrize("sizes", [(7, 70), (7, 1)], ids=str)
@every_backend_and_cut
def test_a_row_that_sees_nothing_is_minus_infinity(backend, sizes, cut):
    x = inputs_of((7, 70), torch.float32, device_of(backend))
    mask = torch.ones(sizes, dtype=torch.bool, device=x.device)
    mask[2], mask[5] = False, False
    x[2], x[5, 3] = -INF, float("nan")
    check(backend, x, {"mask": mask}, log=True)
    for given in (mask, torch.zeros(sizes, device=x.device).masked_fill(~mask, -INF)):
        results = run_with_gradients(
            lambda x, m=given: sk.log_softmax(x, mask=m, backend=backend), (x,)
        )
        assert (results["output 0"][[2, 5]] == -INF).all()
        assert not results["gradient 0"][[2, 5]].any()


@pytest.mark.parametrize("is_causal", [False, True])
@every_backend_and_cut
def test_hidden_elements_have_no_part_in_the_gradient(backend, is_causal, cut):
    """Neither their inputs nor what flows back into their -inf."""
    x = inputs_of((8, 45), torch.float32, device_of(backend))
    mask = torch.rand((8, 45), device=x.device) < 0.5
    mask[:, 0] = True
    options = {"mask": None if is_causal else mask, "is_causal": is_causal}
    skip_unsupported("log_softmax", backend, x, **options)
    seen = torch.ones_like(mask).tril() if is_causal else mask
    dy = torch.randn_like(x)

    def results(x, dy):
        def ours(x):
            return sk.log_softmax(x, **options, backend=backend)

        return run_with_gradients(ours, (x,), (dy,))

    expected = results(x, dy)
    poisoned = results(x.masked_fill(~seen, float("nan")), dy.masked_fill(~seen, 1e9))
    for name, clean in expected.items():
        assert torch.equal(poisoned[name], clean), name
    assert not expected["gradient 0"][~seen].any()


@pytest.mark.parametrize("dim", [-1, 0])
@every_backend_and_cut
def test_scores_that_are_not_finite(backend, dim, cut):
    x = inputs_of((8, 100), torch.float32, device_of(backend))
    x[0, 0] = float("nan")
    x[1, 0], x[2, 1] = INF, -INF
    x[3] = -INF
    x[4, :99] = -INF
    x = x if dim == -1 else x.T.contiguous()
    skip_unsupported("log_softmax", backend, x, dim)
    functions = (
        lambda x: sk.log_softmax(x, dim, backend=backend),
        lambda x: torch.log_softmax(x, dim),
        lambda x: torch.log_softmax(x.double(), dim),
    )
    runs = [run_with_gradients(function, (x,)) for function in functions]
    for name in runs[0]:
        assert_no_worse(*(run[name] for run in runs), what=name)


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_the_definition_is_torchs(dim):
    x = inputs_of((3, 4, 5), torch.float64, "cpu")
    expected = torch.log_softmax(x * 0.3, dim)
    assert_rounding_alone(sk.log_softmax(x, dim, scale=0.3), expected, terms=x.shape[dim])
    mask = torch.rand(3, 4, 5) < 0.6
    options = {"mask": mask, "scale": 0.3}
    ours = sk.log_softmax(x, dim, **options)
    assert torch.equal(ours == -INF, sk.softmax(x, dim, **options) == 0)
    seen = mask & (ours != -INF)
    theirs = eager_softmax(x, dim, **options, log=True)
    assert_rounding_alone(ours[seen], theirs[seen], terms=x.shape[dim])


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_every_instruction_set_and_number_of_threads(each_isa, dtype):
    threads = torch.get_num_threads()
    for shape, dim in [((7, 130, 97), -1), ((3, 300, 97), 1), ((2, 5000), -1)]:
        x = inputs_of(shape, dtype, "cpu", 0.0, 20.0)
        for isa in each_isa():
            check("cpu", x, {"dim": dim, "scale": 0.5}, log=True)
            results = []
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                results.append(
                    run_with_gradients(
                        lambda x, d=dim: sk.log_softmax(x, d, scale=0.5, backend="cpu"), (x,)
                    )
                )
            torch.set_num_threads(threads)
            for name, expected in results[0].items():
                assert all(torch.equal(other[name], expected) for other in results[1:]), (isa, name)


def test_bad_input_names_the_op():
    with pytest.raises(ValueError, match="^log_softmax: dim must be in"):
        sk.log_softmax(torch.randn(3, 4), 2)
    with pytest.raises(TypeError, match="sinks"):
        sk.log_softmax(torch.randn(3, 4), sinks=None)
