"""Hundreds of drawn combinations of everything attention can do, against the definition.

The draws are the same every time, unless pytest is given --hypothesis-seed=N, or =random. A
failure prints the Case, as the Python that makes it: add it to FAILED_ONCE.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, field

import pytest
import torch
from attention_cases import NAME
from attention_drawn import Case, arguments, build, cases
from attention_yardstick import assert_matches_definition
from hypothesis import HealthCheck, Phase, given, seed, settings
from op_cases import device_of

import slimkernels as sk
from slimkernels.dispatch import OPS

# How many are drawn, and how many of them at least must be tested: distinct, and not refused.
# Triton's interpreter takes a second for most of them.
DRAWN = {"torch": 60, "cpu": 300, "triton": 150}
TESTED = {"torch": 40, "cpu": 220, "triton": 100}
assert TESTED["cpu"] + TESTED["triton"] >= 300

# All that unsupported() may say to what is drawn.
REFUSALS: dict[str, set[str]] = {"torch": set(), "cpu": set(), "triton": set()}
# Until the kernels have all features; counted as tested. Delete when they have.
INTERIM = {
    "it has plain scores only",
    "it has no window",
    "value must be as wide as query",
    "lse has no gradient here yet",
}

# Drawn cases that a kernel has failed.
FAILED_ONCE: list[Case] = []


@dataclass
class Tally:
    tested: set[Case] = field(default_factory=set)
    refused: Counter[str] = field(default_factory=Counter)


def attend_on(backend: str):
    def attend(case, leaves, options):
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
    if "lse has no gradient here yet" in INTERIM and backend != "torch":
        if case.lse in ("differentiated", "alone"):
            return "lse has no gradient here yet"
    inputs, options = arguments(case, *build(case, device_of(backend)))
    return OPS[NAME].unsupported(backend, *OPS[NAME].arguments(*inputs, **options))


def seed_of(config: pytest.Config) -> int:
    wanted = config.getoption("--hypothesis-seed")
    if wanted == "random":
        return int.from_bytes(os.urandom(4), "little")
    return int(wanted or 0)


@pytest.mark.parametrize("backend", ["cpu", "triton", "torch"])
def test_drawn_calls_match_the_definition(backend, pytestconfig):
    drawn_from, tally = seed_of(pytestconfig), Tally()

    # No database: a failure must not depend on what ran before. Explaining takes minutes here.
    @seed(drawn_from)
    @settings(
        max_examples=DRAWN[backend],
        database=None,
        deadline=None,
        derandomize=False,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=cases(backend))
    def check(case):
        if reason := refusal(backend, case):
            tally.refused[reason] += 1
            if reason not in INTERIM:
                return
        else:
            assert_matches_definition(attend_on(backend), case, device_of(backend))
        tally.tested.add(case)

    try:
        check()
    finally:
        print(
            f"\n{backend}: {len(tally.tested)} distinct calls by --hypothesis-seed={drawn_from}; "
            f"refused: {dict(tally.refused)}"
        )
    assert len(tally.tested) >= TESTED[backend]
    assert tally.refused.keys() <= REFUSALS[backend] | INTERIM
