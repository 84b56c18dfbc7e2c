"""Triton's interpreter learns of the tensors that optimizers' kernels reach through tables."""

import sys
import weakref

import pytest

from slimkernels.ops._update import TensorLists, Update


@pytest.fixture(autouse=True)
def reachable_through_tables(monkeypatch):
    interpreter = sys.modules.get("interpreter")
    if interpreter is None:
        return
    select = Update.select

    def recording(op, lists, *args, **kwargs):
        every = [lists] if isinstance(lists, TensorLists) else lists
        columns = [column for each in every for column in each.columns.values()]
        # Weak, or no test could see whether an optimizer lets go of them.
        interpreter.reachable[:] = [weakref.ref(tensor) for column in columns for tensor in column]
        return select(op, lists, *args, **kwargs)

    monkeypatch.setattr(Update, "select", recording)
    yield
    interpreter.reachable.clear()
