import copy

import pytest
import torch
from module_cases import assert_model_no_worse, outputs_and_gradients
from op_cases import maybe_compiled

import slimkernels.nn as slim_nn
from slimkernels.dispatch import use_backend

# So wide that the largest of eager's errors, which the rule doubles, is no matter of luck.
B, T, C, H = 3, 7, 96, 4

ENDS = torch.arange(T) >= torch.tensor([[7], [4], [1]])  # (B, T)
HOLES = torch.zeros(B, T, dtype=torch.bool)
HOLES[0, 0] = HOLES[0, 4] = HOLES[2, 3] = True
PAIRS = torch.rand(T, T, generator=torch.Generator().manual_seed(1)) < 0.4
PAIRS.fill_diagonal_(False)
CAUSAL = torch.ones(T, T, dtype=torch.bool).triu(1)
ADDED = torch.randn(B * H, T, T, generator=torch.Generator().manual_seed(2))
MASKS = {
    "none": {},
    "padding at the ends": {"key_padding_mask": ENDS},
    "padding with holes": {"key_padding_mask": HOLES},
    "padding added": {"key_padding_mask": torch.where(ENDS, -3.0, 0.5)},
    "pairs": {"attn_mask": PAIRS},
    "pairs and padding": {"attn_mask": CAUSAL, "key_padding_mask": ENDS},
    "added": {"attn_mask": ADDED},
    "added and padding": {"attn_mask": ADDED, "key_padding_mask": torch.where(ENDS, -3.0, 0.5)},
    "causal": {"attn_mask": CAUSAL, "is_causal": True},
    "causal and padding at the ends": {
        "attn_mask": CAUSAL,
        "is_causal": True,
        "key_padding_mask": ENDS,
    },
    "causal and padding with a hole": {
        "attn_mask": CAUSAL,
        "is_causal": True,
        "key_padding_mask": HOLES & (torch.arange(T) > 0),
    },
}


def pair(**kwargs):
    torch.manual_seed(0)
    theirs = torch.nn.MultiheadAttention(C, H, **kwargs)
    torch.manual_seed(0)
    ours = slim_nn.MultiheadAttention(C, H, **kwargs)
    for (name, parameter), other in zip(
        theirs.state_dict().items(), ours.state_dict().values(), strict=True
    ):
        assert torch.equal(parameter, other), name  # the same seed gives the same parameters
    for bias in (m for name, m in theirs.named_parameters() if "bias" in name):
        torch.nn.init.normal_(bias)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def check(ours, theirs, call, inputs, masks=None, compiled=False):
    """`call(module, masks, *inputs)`; floating masks are widened with the rest."""
    masks = masks or {}
    wide = {
        name: m.double() if isinstance(m, torch.Tensor) and m.is_floating_point() else m
        for name, m in masks.items()
    }
    function = maybe_compiled(ours, compiled)
    results = {}
    for backend in (None, "torch"):
        with use_backend(backend):
            results[backend] = outputs_and_gradients(
                ours, lambda _, *xs: call(function, masks, *xs), inputs
            )
    eager = outputs_and_gradients(theirs, lambda m, *xs: call(m, masks, *xs), inputs)
    truth = outputs_and_gradients(
        copy.deepcopy(theirs).double(),
        lambda m, *xs: call(m, wide, *xs),
        tuple(x.double() for x in inputs),
    )
    for actual in results.values():
        assert_model_no_worse(actual, eager, truth)


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("weights", ["none", "mean", "each"])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("masks", MASKS)
def test_self_attention_drops_in(masks, batch_first, weights):
    ours, theirs = pair(batch_first=batch_first)
    x = torch.randn((B, T, C) if batch_first else (T, B, C))

    def call(module, masks, x):
        return module(
            *(x, x, x),
            need_weights=weights != "none",
            average_attn_weights=weights == "mean",
            **masks,
        )

    check(ours, theirs, call, (x,), MASKS[masks])


HIDING = {
    "key_padding_mask": ("key_padding_mask", ENDS | (torch.arange(B) == 1)[:, None]),
    "attn_mask of 2": ("attn_mask", PAIRS | (torch.arange(T) == 3)[:, None]),
    "attn_mask of 3": ("attn_mask", PAIRS | (torch.arange(B * H * T) == 9).view(-1, T, 1)),
}


def added(mask):
    return torch.zeros(mask.shape).masked_fill(mask, float("-inf"))


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("floating", [False, True])
@pytest.mark.parametrize("form", HIDING)
def test_a_query_that_sees_no_key_gets_zeros(form, floating, weights):
    """As from torch without weights; with them torch gives NaN."""
    ours, theirs = pair(batch_first=True)
    name, mask = HIDING[form]
    masks = {name: added(mask) if floating else mask}

    def call(module, masks, x):
        return module(x, x, x, need_weights=weights and module is ours, **masks)[0]

    x = torch.randn(B, T, C)
    check(ours, theirs, call, (x,), masks)
    _, given = ours(x, x, x, average_attn_weights=False, **masks)
    hidden = mask[:, None, None] if name == "key_padding_mask" else mask
    hidden = hidden.unflatten(0, (B, H)) if mask.dim() == 3 else hidden
    hidden = hidden.expand(B, H, T, T)
    assert hidden.all(-1).any() and (given[hidden] == 0).all()


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("name, mask", [("attn_mask", ADDED), ("key_padding_mask", added(ENDS))])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_mask_may_be_wider_than_the_module(dtype, name, mask, weights):
    """As in torch without weights; with them torch refuses."""
    ours, theirs = pair(batch_first=True, dtype=dtype)

    def call(module, masks, x):
        return module(x, x, x, need_weights=weights and module is ours, **masks)[0]

    check(ours, theirs, call, (torch.randn(B, T, C, dtype=dtype),), {name: mask})


@pytest.mark.parametrize("masks", ["none", "padding at the ends", "padding with holes", "causal"])
def test_compiles_whole(masks):
    ours, theirs = pair(batch_first=True)

    def call(module, masks, x):
        return module(x, x, x, need_weights=False, **masks)

    check(ours, theirs, call, (torch.randn(B, T, C),), MASKS[masks], compiled=True)


@pytest.mark.parametrize("kwargs", [{}, {"bias": False}, {"kdim": 10, "vdim": 14}], ids=str)
@pytest.mark.parametrize("weights", [False, True])
def test_cross_attention_drops_in(kwargs, weights):
    ours, theirs = pair(batch_first=True, **kwargs)
    key, value = (torch.randn(B, 5, kwargs.get(name, C)) for name in ("kdim", "vdim"))

    def call(module, masks, query, key, value):
        return module(query, key, value, need_weights=weights)

    check(ours, theirs, call, (torch.randn(B, T, C), key, value))


@pytest.mark.parametrize("weights", [False, True])
def test_key_that_is_also_the_value(weights):
    ours, theirs = pair()

    def call(module, masks, query, key):
        return module(query, key, key, need_weights=weights)

    check(ours, theirs, call, (torch.randn(T, B, C), torch.randn(5, B, C)))


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("weights", [False, True])
def test_without_a_batch(weights, batch_first):
    ours, theirs = pair(batch_first=batch_first)

    def call(module, masks, x):
        return module(x, x, x, need_weights=weights, **masks)

    check(ours, theirs, call, (torch.randn(T, C),), {"key_padding_mask": ENDS[1]})


def test_eval_takes_the_same_way():
    ours, theirs = pair(batch_first=True, dropout=0.5)
    ours.eval(), theirs.eval()
    x = torch.randn(B, T, C)

    def call(module, masks, x):
        return module(x, x, x, need_weights=False)

    check(ours, theirs, call, (x,))
    with torch.no_grad():
        assert torch.equal(ours(x, x, x, need_weights=False)[0], call(ours, None, x)[0])


@pytest.mark.parametrize("weights", [False, True])
def test_dropout_only_in_training(weights):
    ours, _ = pair(batch_first=True, dropout=0.5)
    x = torch.randn(B, T, C)
    first, second = (ours(x, x, x, need_weights=weights)[0] for _ in range(2))
    assert not torch.equal(first, second)
    ours.eval()
    first, second = (ours(x, x, x, need_weights=weights)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_causal_needs_no_mask_of_its_own():
    ours, _ = pair(batch_first=True)
    x = torch.randn(B, T, C)
    for weights in (False, True):
        expected = ours(x, x, x, attn_mask=CAUSAL, need_weights=True)[0]
        actual = ours(x, x, x, is_causal=True, need_weights=weights)[0]
        wide = copy.deepcopy(ours).double()(*(x.double(),) * 3, attn_mask=CAUSAL)[0]
        assert_model_no_worse({"y": actual}, {"y": expected}, {"y": wide})


X = torch.randn(B, T, C)


@pytest.mark.parametrize(
    "make, sentence",
    [
        ({"add_bias_kv": True}, "add_bias_kv is not implemented"),
        ({"add_zero_attn": True}, "add_zero_attn is not implemented"),
        ({"num_heads": 5}, "embed_dim must be a multiple of num_heads 5; got 96"),
    ],
)
def test_constructor_refuses(make, sentence):
    with pytest.raises(ValueError, match="^MultiheadAttention: " + sentence):
        slim_nn.MultiheadAttention(**({"embed_dim": C, "num_heads": H} | make))


@pytest.mark.parametrize(
    "inputs, masks, sentence",
    [
        ((X, X[..., :5], X), {}, "key must have 3 dimensions.* a last one of 96; got"),
        ((X, X[0], X), {}, "key must have 3 dimensions"),
        ((X, X, X[:, :2]), {}, r"value must have as many tokens as key .*; got \(3, 2, 96\)"),
        ((X[:2], X, X), {}, "key must have query's batch of 2; got 3"),
        ((X, X, X), {"key_padding_mask": ENDS[:2]}, r"shape \(3, 7\); got \(2, 7\)"),
        ((X, X, X), {"key_padding_mask": ENDS.int()}, "must be bool or floating; got"),
        ((X, X, X), {"attn_mask": PAIRS[:2]}, r"shape \(7, 7\) or \(12, 7, 7\); got \(2, 7\)"),
    ],
)
def test_forward_refuses(inputs, masks, sentence):
    ours, _ = pair(batch_first=True)
    with pytest.raises(ValueError, match="^MultiheadAttention: .*" + sentence):
        ours(*inputs, **masks)
