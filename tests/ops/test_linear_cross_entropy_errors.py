import pytest
import torch

import slimkernels as sk

BACKENDS = ["triton", "cpu"]
X, W, T, B = torch.randn(4, 8), torch.randn(5, 8), torch.tensor([0, 4, -100, 3]), torch.randn(5)


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (dict(input=[1.0]), "input must be a tensor; got list"),
        (dict(input=X.sum()), r"input must have a last dimension; got shape \(\)"),
        (dict(weight=None), "weight must be a tensor; got NoneType"),
        (dict(weight=W[:, :3]), r"weight must have shape \(V, 8\), V > 0, .*; got \(5, 3\)"),
        (dict(weight=W[:0]), r"weight must have shape \(V, 8\), V > 0, .*; got \(0, 8\)"),
        (dict(weight=W.half()), "weight must be torch.float32 like input, or float32; got .*16"),
        (dict(weight=W.to("meta")), "weight must be on cpu like input; got meta"),
        (dict(bias=B[:3]), r"bias must have shape \(5,\), the rows of weight .*; got \(3,\)"),
        (dict(target=T[:3]), r"target must have shape \(4,\), that of input .*; got \(3,\)"),
        (dict(target=X), "target must hold class labels, int64 or int32; got torch.float32"),
        (dict(target=T + 1), r"target must be in \[0, 5\) or .* -100; got 5 at position \(1,\)"),
        (dict(reduction="max"), "reduction must be 'none', 'mean' or 'sum'; got 'max'"),
        (dict(label_smoothing=2.0), r"label_smoothing must be in \[0, 1\]; got 2.0"),
        (dict(softcap=-1.0), "softcap must be None or above 0; got -1.0"),
        (dict(return_correct=None), "return_correct must be True or False; got None"),
        (dict(positions=[0]), "positions must be a tensor; got list"),
        (dict(positions=T.bool()), "positions must be int64 or int32; got torch.bool"),
        (dict(positions=T.view(2, 2)), r"positions must have shape \(K,\); got \(2, 2\)"),
        (dict(positions=T.to("meta")), "positions must be on cpu like input; got meta"),
        (dict(positions=T[:2]), r"positions must be in \[0, 4\), rows of input; got 4"),
        (dict(positions=T[2:]), r"positions must be in \[0, 4\), rows of input; got -100"),
        (dict(positions=T[:1]), r"target must have shape \(1,\), that of positions; got \(4,\)"),
        (dict(input=X[:0], positions=T[:1]), "positions must be empty, as input is; got 1"),
    ],
)
@pytest.mark.parametrize("backend", [None, *BACKENDS, "torch"])
def test_bad_input_is_one_sentence(backend, arguments, sentence):
    arguments = {"input": X, "weight": W, "target": T, "bias": B, **arguments}
    with pytest.raises(ValueError, match="^linear_cross_entropy: " + sentence):
        sk.linear_cross_entropy(**arguments, backend=backend)
