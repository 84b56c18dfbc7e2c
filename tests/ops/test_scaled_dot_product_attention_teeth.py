"""The drawn calls of attention catch each of the faults that kernels are known to have."""

import pytest
import torch
from attention_drawn import Case, for_each_drawn
from attention_faults import FAULTS
from attention_yardstick import assert_matches_definition


@pytest.fixture(scope="module")
def drawn() -> list[Case]:
    """As many as the slowest backend is tested with, every feature among them."""
    cases: dict[Case, None] = {}
    for_each_drawn("triton", 0, 130, lambda case: cases.setdefault(case))
    return list(cases)


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_caught(drawn, fault):
    for case in drawn:
        try:
            assert_matches_definition(FAULTS[fault], case, torch.device("cpu"))
        except AssertionError:
            return
    pytest.fail(f"none of {len(drawn)} drawn calls notices")
