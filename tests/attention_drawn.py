"""Calls of attention drawn by hypothesis: plain numbers, which `build` turns into tensors.

A drawn Case prints as the Python that makes it, so that a failure can be pasted into a test.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
import triton.language as tl
from attention_cases import cu_of
from hypothesis import HealthCheck, Phase, configuration, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor

from slimkernels.ops._attention_variant import (
    AttentionVariant,
    ScoreFunction,
    t5_relative_bias,
)

# It keeps files even without a database; the repository is not the place.
configuration.set_hypothesis_home_dir(Path(tempfile.gettempdir(), "slimkernels-hypothesis"))


@triton.jit
def _leaky(score, batch, head, i, j, tensors):
    return tl.where(score > 0.0, score, 0.25 * score) + tl.load(tensors[0] + head)


@triton.jit
def _leaky_derivative(score, batch, head, i, j, tensors):
    return tl.where(score > 0.0, 1.0, 0.25)


def _torch_leaky(score, batch, head, i, j, tensors):
    return torch.where(score > 0.0, score, 0.25 * score) + tensors[0][head]


@triton.jit
def _tilted(score, batch, head, i, j, tensors):
    return score * (0.5 + 0.25 * ((batch + 2 * head + i + 3 * j) % 3))


@triton.jit
def _tilted_derivative(score, batch, head, i, j, tensors):
    return 0.5 + 0.25 * ((batch + 2 * head + i + 3 * j) % 3)


def _torch_tilted(score, batch, head, i, j, tensors):
    return score * (0.5 + 0.25 * ((batch + 2 * head + i + 3 * j) % 3)).to(score.dtype)


@triton.jit
def _prefix(batch, head, i, j, tensors):
    return (j <= i) | (j < tl.load(tensors[1] + batch))


def _torch_prefix(batch, head, i, j, tensors):
    prefix = tensors[1]  # as in _attention_reference.py: a token may belong to no sequence
    return (j <= i) | (j < prefix[batch.clamp(0, len(prefix) - 1)])


@triton.jit
def _strided(batch, head, i, j, tensors):
    return (i + 2 * j + head) % 3 == 0


def _torch_strided(batch, head, i, j, tensors):
    return (i + 2 * j + head) % 3 == 0


LEAKY = {"score": _leaky, "derivative": _leaky_derivative, "torch_score": _torch_leaky}
TILTED = {"score": _tilted, "derivative": _tilted_derivative, "torch_score": _torch_tilted}
FUNCTIONS = {
    "leaky": ScoreFunction(**LEAKY),
    "tilted": ScoreFunction(**TILTED),
    "prefix": ScoreFunction(mask=_prefix, torch_mask=_torch_prefix),
    "strided": ScoreFunction(mask=_strided, torch_mask=_torch_strided),
    "leaky prefix": ScoreFunction(**LEAKY, mask=_prefix, torch_mask=_torch_prefix),
}


@dataclass(frozen=True)
class Added:
    """A mask, or a bias: which of (B, H, Tq, Tk) it has whole, the others being one long."""

    full: tuple[bool, bool, bool, bool]
    storage: str = "contiguous"  # or "transposed", or "expanded": those of one by stride 0
    fewer_dims: bool = False  # without the leading dimensions of one
    dtype: str = "query's"  # or "float32"; a mask is bool
    hidden: float = 0.0  # the share that is -inf, or False
    longer: int = 0  # ragged: how much longer than the longest sequence, or shorter


@dataclass(frozen=True)
class Case:
    lengths: tuple[tuple[int, int], ...]  # queries and keys of each sequence; dense: all alike
    ragged: bool = False
    heads: tuple[int, int] = (1, 1)  # key heads, query heads for each
    widths: tuple[int, int] = (8, 8)
    dtype: str = "float32"
    layouts: tuple[str, str, str] = ("contiguous",) * 3
    is_causal: bool = False
    causal_offset: int | tuple[int, ...] = 0
    window: tuple[int | None, int | None] | None = None
    key_lengths: tuple[int, ...] | None = None
    mask: Added | None = None
    bias: Added | None = None
    bias_is_mask: bool = False  # handed over as attn_mask, where no bool mask is in the way
    alibi: str | None = None  # "heads": (H,), "batch": (B, H)
    softcap: float | None = None
    sinks: str | None = None  # "plain", "large", "some -inf"
    relative: tuple[bool, int, int] | None = None  # bidirectional, buckets, max_distance
    parameter_dtype: str = "query's"  # of sinks and the relative bias's table
    score: str | None = None
    dropout_p: float = 0.0
    scale: float | None = None
    lse: str = "unused"  # "returned", "differentiated", "alone": nothing flows through the output
    batch_invariant: bool = False
    frozen: tuple[str, ...] = ()  # what gets no gradient
    seed: int = 0


SIZES = (5, 1, 2, 3, 7, 8, 13, 16, 17, 20, 24, 29, 31, 32, 33, 36, 40, 0, 11, 19)
TINY = (1, 2, 3, 7, 12)
# Past every tile: 128 in Triton; 256 queries and 512 keys on the CPU.
LARGE = {"triton": (65, 129, 140), "cpu": (130, 257, 300, 515, 530), "torch": (130,)}
WIDTHS = (8, 16, 1, 2, 3, 7, 12, 24, 32, 33, 40, 48, 64, 65, 80)
WIDE = (128, 200, 256, 300, 512)
LAYOUTS = ("contiguous", "tokens outermost", "padded", "scattered", "shared by all")
DTYPES = {"triton": ("float32", "bfloat16", "float16")}
PARAMETERS = ("bias", "sinks", "table")
FROZEN = (
    *(PARAMETERS, ("query",), ("key", "value"), ("query", "key", "value"), ("value", "sinks")),
    ("query", "key", "value", *PARAMETERS),  # forward alone
)


def often(draw, *values, of=3):
    """One of `values` once in `of` times, else None."""
    if draw(st.integers(0, of - 1)) < of - 1:
        return None
    return draw(st.sampled_from(values))


@st.composite
def cases(draw, backend: str) -> Case:
    pick = lambda *values: draw(st.sampled_from(values))  # noqa: E731
    flip = lambda: draw(st.booleans())  # noqa: E731
    ragged = pick(False, False, True)
    size = pick("small", "small", "small", "small", "small", "wide", "large")
    # The interpreter takes milliseconds a tile, and the definition stores all scores.
    sequences = pick(2, 1, 3, 2, 1, 3, 2, 1, 3, 2, 1, 0) + ragged * pick(0, 1, 2)
    if size == "large":
        sequences = 1 + ragged
    sizes = TINY if size == "wide" else SIZES
    lengths = [(pick(*sizes), pick(*sizes)) for _ in range(sequences if ragged else 1)]
    if size == "large":
        n, m = pick(*LARGE[backend]), pick(*LARGE[backend], 20, 1, 3)
        lengths[0] = (n, m) if flip() else (m, n)
    if pick(False, True):  # as many queries as keys
        lengths = [(n, n) for n, _ in lengths]
    lengths = tuple(lengths if ragged else lengths * sequences)
    heads = (1, pick(1, 2)) if size == "large" else pick((1, 1), (2, 1), (1, 2), (2, 2), (1, 3))
    if size == "wide":
        wide = tuple(D for D in WIDE if backend != "triton" or D <= 256)
        widths = pick(*wide), pick(*wide, 20)
        widths = widths if flip() else widths[::-1]
    else:
        widths = (pick(8, 16, 33),) * 2 if size == "large" else (pick(*WIDTHS), pick(*WIDTHS))
        widths = (widths[0],) * 2 if flip() else widths
    longest = [max((n[side] for n in lengths), default=0) for side in (0, 1)]
    dense_lengths = None
    if not ragged and often(draw, True):
        dense_lengths = tuple(draw(st.integers(0, longest[1])) for _ in range(sequences))
    is_causal = pick(False, False, True)
    offsets = st.one_of(
        st.integers(-6, 6), st.sampled_from([longest[1] - longest[0], 1000, -1000, 20, -20])
    )
    causal_offset: int | tuple = 0
    if often(draw, True, of=3 - is_causal):
        causal_offset = draw(offsets)
        if flip():
            causal_offset = tuple(draw(offsets) for _ in range(sequences))
    sides = (0, None, 1, 3, 16, 40, 10**6)
    score = often(draw, *FUNCTIONS, of=4) if backend != "cpu" else None
    return Case(
        lengths=lengths,
        ragged=ragged,
        heads=heads,
        widths=widths,
        dtype=pick(*DTYPES.get(backend, ("float32", "bfloat16"))),
        layouts=tuple(pick(*LAYOUTS) for _ in range(3)),
        is_causal=is_causal,
        causal_offset=causal_offset,
        window=often(draw, True) and (pick(*sides), pick(*sides)),
        key_lengths=dense_lengths,
        mask=often(draw, True) and draw(added(ragged, True)),
        bias=often(draw, True) and draw(added(ragged, False)),
        bias_is_mask=flip(),
        alibi=often(draw, "heads", "batch", of=4),
        softcap=often(draw, 5.0, 0.5, 30.0, of=4),
        sinks=often(draw, "plain", "some -inf", "large"),
        relative=often(draw, (True, 32, 128), (False, 32, 128), (True, 8, 9), (False, 4, 6), of=4),
        parameter_dtype=pick("query's", "float32"),
        score=score,
        dropout_p=often(draw, 0.1, 0.3, 0.6) or 0.0,
        scale=often(draw, 0.3, -0.7, 0.0, 1e-3),
        lse=pick("unused", "differentiated", "returned", "alone"),
        batch_invariant=pick(False, False, False, True),
        frozen=often(draw, *FROZEN, of=4) or (),
        seed=draw(st.integers(0, 9999)),
    )


def for_each_drawn(backend: str, start: int, count: int, check: Callable[[Case], None]) -> None:
    """Calls `check` with about `count` cases; one that fails is simplified, printed and raised.

    Each comes from a run of hypothesis of its own: within a run most are variations of a few, of
    which a quarter is equal and some features are never drawn at all.
    """
    for k in range(count):
        # No database: a failure must not depend on what ran before. Two examples: the first of
        # every run is the simplest case there is. Phase.explain would take minutes.
        once = given(case=cases(backend))(check)
        once = settings(
            max_examples=2,
            database=None,
            deadline=None,
            derandomize=False,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        )(once)
        seed(start * 100_000 + k)(once)()


@st.composite
def added(draw, ragged: bool, is_mask: bool) -> Added:
    hidden = (0.2, 0.6, 0.95) if is_mask else (0.0, 0.0, 0.3)
    return Added(
        full=tuple(draw(st.booleans()) for _ in range(4)),
        storage=draw(st.sampled_from(("contiguous", "transposed", "expanded"))),
        fewer_dims=draw(st.booleans()),
        dtype=draw(st.sampled_from(("query's", "float32"))),
        hidden=draw(st.sampled_from(hidden)),
        longer=draw(st.sampled_from((0, 0, 2, -2))) if ragged else 0,
    )


def build(case: Case, device: torch.device) -> tuple[dict[str, Tensor], dict]:
    """What gets gradients, by name, and the other arguments."""
    generator = torch.Generator().manual_seed(case.seed)
    dtype = getattr(torch, case.dtype)
    parameter_dtype = dtype if case.parameter_dtype == "query's" else torch.float32

    def randn(*shape, dtype=dtype):
        return torch.randn(*shape, generator=generator).to(device, dtype)

    def ints(values):
        return torch.tensor(values, dtype=torch.int32, device=device)

    (Hkv, group), (D, Dv), B = case.heads, case.widths, len(case.lengths)
    H, lengths_q, lengths_k = Hkv * group, *([n[side] for n in case.lengths] for side in (0, 1))
    Tq, Tk = max(lengths_q, default=5), max(lengths_k, default=7)  # 5 and 7 of no sequence
    leaves, options = {}, {}
    for name, heads, width, layout in zip(
        ("query", "key", "value"), (H, Hkv, Hkv), (D, D, Dv), case.layouts, strict=True
    ):
        ours = lengths_q if name == "query" else lengths_k
        T = Tq if name == "query" else Tk
        shape = (sum(ours), heads, width) if case.ragged else (B, heads, T, width)
        leaves[name] = arranged(randn(*shape), layout)
    if case.ragged:
        cu_seqlens = cu_of(lengths_q, device), cu_of(lengths_k, device)
        options["cu_seqlens"] = cu_seqlens if lengths_q != lengths_k else cu_seqlens[0]
    if case.key_lengths is not None:
        options["key_lengths"] = ints(case.key_lengths)
    variant = {"window": case.window, "softcap": case.softcap}
    variant |= {"batch_invariant": case.batch_invariant}
    offset = case.causal_offset
    variant["causal_offset"] = ints(offset) if isinstance(offset, tuple) else offset
    if case.mask is not None:
        mask = torch.rand(sizes_of(case.mask, B, H, Tq, Tk), generator=generator)
        mask = mask.to(device) >= case.mask.hidden
        options["attn_mask"] = stored(case.mask, mask, B, H, Tq, Tk)
    if case.bias is not None:
        wanted = dtype if case.bias.dtype == "query's" else torch.float32
        bias = randn(*sizes_of(case.bias, B, H, Tq, Tk), dtype=wanted)
        hidden = torch.rand(bias.shape, generator=generator).to(device) < case.bias.hidden
        bias = bias.masked_fill(hidden, -torch.inf)
        leaves["bias"] = stored(case.bias, bias, B, H, Tq, Tk)
    if case.alibi is not None:
        slopes = torch.rand(*(B, H)[case.alibi == "heads" :], generator=generator)
        variant["alibi_slopes"] = slopes.to(device)
    if case.sinks is not None:
        sinks = randn(H, dtype=parameter_dtype)
        if case.sinks == "large":
            # No smaller outputs than float16 has all bits for: delta is taken from them.
            sinks = sinks + (6 if case.dtype == "float16" else 15)
        elif case.sinks == "some -inf":
            sinks[::2] = -torch.inf
        leaves["sinks"] = sinks
    if case.relative is not None:
        leaves["table"] = randn(case.relative[1], H, dtype=parameter_dtype)
    if case.score is not None:
        variant["score"] = FUNCTIONS[case.score]
        variant["score_tensors"] = randn(H, dtype=torch.float32), ints([3] * max(B, 1))
    options |= {"dropout_p": case.dropout_p, "is_causal": case.is_causal, "scale": case.scale}
    return leaves, {**options, "enable_gqa": group > 1, "variant": variant}


def arguments(case: Case, leaves: dict[str, Tensor], options: dict) -> tuple[tuple, dict]:
    """The op's arguments, of leaves in any dtype."""
    leaves, options = dict(leaves), dict(options)
    fields = {**options.pop("variant"), "sinks": leaves.get("sinks")}
    bias = leaves.get("bias")
    if bias is not None and case.bias_is_mask and "attn_mask" not in options:
        options["attn_mask"] = bias
    else:
        fields["bias"] = bias
    if case.relative is not None:
        bidirectional, _, max_distance = case.relative
        fields["relative_bias"] = t5_relative_bias(
            leaves["table"], bidirectional=bidirectional, max_distance=max_distance
        )
    inputs = leaves["query"], leaves["key"], leaves["value"]
    return inputs, {**options, "variant": AttentionVariant(**fields)}


def sizes_of(added: Added, B: int, H: int, Tq: int, Tk: int) -> tuple[int, ...]:
    sizes = B, H, max(Tq + added.longer, 0), max(Tk + added.longer, 0)
    return tuple(n if full else 1 for n, full in zip(sizes, added.full, strict=True))


def stored(added: Added, x: Tensor, B: int, H: int, Tq: int, Tk: int) -> Tensor:
    if added.storage == "transposed":
        x = x.mT.contiguous().mT
    elif added.storage == "expanded":
        everything = Added((True,) * 4, longer=added.longer)
        x = x.expand(sizes_of(everything, B, H, Tq, Tk))
    while added.fewer_dims and x.dim() > 0 and x.shape[0] == 1:
        x = x[0]
    return x


def arranged(x: Tensor, layout: str) -> Tensor:
    """The same values at other strides; but "shared by all": the first batch's, or head's."""
    if layout == "tokens outermost":  # of ragged ones the heads
        return x.transpose(-3, -2).contiguous().transpose(-3, -2)
    if layout == "padded":
        wider = x.new_full((*x.shape[:-1], x.shape[-1] + 3), torch.nan)
        wider[..., 1:-2] = x
        return wider[..., 1:-2]
    if layout == "scattered":
        return x.mT.contiguous().mT
    if layout == "shared by all" and x.numel():
        dim = 0 if x.dim() == 4 else 1
        return x.narrow(dim, 0, 1).expand_as(x)
    return x
