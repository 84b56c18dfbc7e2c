"""Hundreds of drawn combinations of everything attention can do, against the definition.

The draws are the same every time, unless pytest is given --hypothesis-seed=N, or =random. A
failure prints the Case, as the Python that makes it: add it to FAILED_ONCE.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from dataclasses import dataclass, field

import pytest
import torch
from attention_cases import NAME
from attention_drawn import Added, Case, arguments, build, for_each_drawn
from attention_yardstick import assert_matches_definition
from op_cases import device_of

import slimkernels as sk
from slimkernels.dispatch import OPS

cpu = pytest.importorskip("slimkernels._cpu")

BACKENDS = ["cpu", "triton", "torch"]

# How many are drawn, and how many of them at least must be tested: distinct, and not refused.
# Triton's interpreter takes seconds for many of them, the CPU a hundredth.
DRAWN = {"torch": 60, "cpu": 320, "triton": 60}
TESTED = {"torch": 55, "cpu": 280, "triton": 50}
assert TESTED["cpu"] + TESTED["triton"] >= 300

# Calls that backends may refuse, by name in SINGLE_FEATURES. All others must run.
REFUSED = {
    "torch": set(),
    "cpu": {"float16", "score", "mask function"},
    "triton": {"wider than tiles"},
}

TWO = ((9, 13), (9, 13))
SINGLE_FEATURES = {
    "nothing": Case(TWO),
    "bfloat16": Case(TWO, dtype="bfloat16"),
    "float16": Case(TWO, dtype="float16"),
    "ragged": Case(((9, 13), (0, 2), (4, 0)), ragged=True),
    "groups": Case(TWO, heads=(2, 3)),
    "narrower value": Case(TWO, widths=(33, 20)),
    "wider value": Case(TWO, widths=(20, 33)),
    "widest of all": Case(TWO, widths=(256, 256)),
    "wide": Case(TWO, widths=(300, 300)),
    "wider than tiles": Case(((3, 5),), widths=(520, 16)),
    "strides": Case(TWO, layouts=("scattered", "padded", "shared by all")),
    "causal": Case(TWO, is_causal=True),
    "offset": Case(TWO, is_causal=True, causal_offset=4),
    "offsets": Case(TWO, is_causal=True, causal_offset=(4, -3)),
    "window": Case(TWO, window=(3, 2)),
    "left window": Case(TWO, window=(3, None)),
    "lengths": Case(TWO, key_lengths=(13, 5)),
    "mask": Case(TWO, mask=Added((True, False, True, True), hidden=0.3)),
    "bias": Case(TWO, bias=Added((False, True, True, True))),
    "mask and bias": Case(TWO, mask=Added((True,) * 4, hidden=0.3), bias=Added((False,) * 4)),
    "alibi": Case(TWO, alibi="heads"),
    "softcap": Case(TWO, softcap=5.0),
    "sinks": Case(TWO, sinks="plain"),
    "relative bias": Case(TWO, relative=(True, 8, 9)),
    "dropout": Case(TWO, dropout_p=0.2),
    "lse": Case(TWO, lse="differentiated"),
    "nothing trained": Case(TWO, frozen=("query", "key", "value")),
    "batch invariant": Case(TWO, batch_invariant=True),
    "score": Case(TWO, score="leaky"),
    "mask function": Case(TWO, score="strided"),
}

# Drawn cases that a kernel has failed.
FAILED_ONCE: list[Case] = []


@dataclass
class Tally:
    tested: set[Case] = field(default_factory=set)
    refused: Counter[str] = field(default_factory=Counter)


def attend_on(backend: str):
    def attend(case, leaves, options):
        if backend == "cpu":  # all instruction sets of this machine, each case one
            isas = cpu.isas_available()
            cpu.set_isa(isas[case.seed % len(isas)])
        inputs, options = arguments(case, leaves, options)
        torch.manual_seed(case.seed)
        result = sk.scaled_dot_product_attention(
            *inputs, **options, return_lse=True, backend=backend
        )
        if case.lse != "unused":
            return result
        torch.manual_seed(case.seed)  # without lse the same output, from the same dropout
        y = sk.scaled_dot_product_attention(*inputs, **options, backend=backend)
        assert torch.equal(y, result[0]) or y.isnan().any()
        return y, result[1]

    return attend


def refusal(backend: str, case: Case) -> str | None:
    inputs, options = arguments(case, *build(case, device_of(backend)))
    return OPS[NAME].unsupported(backend, *OPS[NAME].arguments(*inputs, **options))


def seed_of(config: pytest.Config) -> int:
    wanted = config.getoption("--hypothesis-seed")
    if wanted == "random":
        return int.from_bytes(os.urandom(4), "little")
    return int(wanted or 0)


@pytest.fixture(autouse=True)
def restore_instruction_set():
    isa = cpu.isa()
    yield
    cpu.set_isa(isa)


@pytest.mark.parametrize("backend", BACKENDS)
def test_drawn_calls_match_the_definition(backend, pytestconfig):
    drawn_from, tally = seed_of(pytestconfig), Tally()

    def check(case):
        if case in tally.tested:
            return
        reason = refusal(backend, case)
        if reason is not None:
            tally.refused[reason] += 1
            return
        assert_matches_definition(attend_on(backend), case, device_of(backend))
        tally.tested.add(case)

    try:
        for_each_drawn(backend, drawn_from, DRAWN[backend], check)
    finally:
        print(
            f"\n{backend}: {len(tally.tested)} distinct calls by --hypothesis-seed={drawn_from}; "
            f"refused: {dict(tally.refused)}"
        )
    assert len(tally.tested) >= TESTED[backend]


@pytest.mark.parametrize("feature", SINGLE_FEATURES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_each_feature_alone_runs_or_is_refused_for_good(backend, feature):
    case = SINGLE_FEATURES[feature]
    reason = refusal(backend, case)
    if reason is None:
        assert feature not in REFUSED[backend]
        assert_matches_definition(attend_on(backend), case, device_of(backend))
    else:
        assert feature in REFUSED[backend], reason
        inputs, options = arguments(case, *build(case, device_of(backend)))
        with pytest.raises(sk.BackendError, match=re.escape(reason)):
            sk.scaled_dot_product_attention(*inputs, **options, backend=backend)


@pytest.mark.parametrize("case", FAILED_ONCE, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_failed_once(backend, case):
    if reason := refusal(backend, case):
        pytest.skip(reason)
    assert_matches_definition(attend_on(backend), case, device_of(backend))


@pytest.mark.parametrize("ragged", [False, True], ids=["dense", "ragged"])
@pytest.mark.parametrize(
    "full", [(False,) * 4, (False, False, False, True), (False, True, False, False)], ids=str
)
@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_gradient_of_a_bias_with_few_elements(backend, full, ragged):
    # Many programs share the sum: of sequences, heads, and several tiles of queries. Sinks, since
    # without them it is zero where all keys of a query share an element.
    lengths = ((70, 12), (40, 9), (3, 12)) if ragged else ((70, 12),) * 2
    case = Case(lengths, ragged, (1, 2), bias=Added(full), sinks="plain", dropout_p=0.2)
    assert_matches_definition(attend_on(backend), case, device_of(backend))
