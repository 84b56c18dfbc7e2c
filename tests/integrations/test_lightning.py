"""The Lightning callback, with Lightning itself or with a stand-in for its base class."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import pytest
import torch

import slimkernels


@pytest.fixture
def integration(monkeypatch):
    try:
        import lightning.pytorch  # noqa: F401
    except ImportError:
        stand_in = ModuleType("lightning.pytorch")
        stand_in.Callback = object
        monkeypatch.setitem(sys.modules, "lightning", ModuleType("lightning"))
        monkeypatch.setitem(sys.modules, "lightning.pytorch", stand_in)
    monkeypatch.delitem(sys.modules, "slimkernels.integrations.lightning", raising=False)
    return importlib.import_module("slimkernels.integrations.lightning")


def test_replaces_at_setup_and_restores_at_teardown(integration):
    model = torch.nn.Sequential(torch.nn.LayerNorm(8), torch.nn.GELU())
    callback = integration.Slimkernels(restore_after=True)
    callback.setup(None, model, "fit")
    assert type(model[0]) is slimkernels.nn.LayerNorm
    assert len(callback.report.swapped) == 2
    callback.teardown(None, model, "fit")
    assert type(model[0]) is torch.nn.LayerNorm


def test_says_what_is_missing(monkeypatch):
    for name in ("lightning", "lightning.pytorch", "pytorch_lightning"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "slimkernels.integrations.lightning", raising=False)
    with pytest.raises(ImportError, match="needs lightning .*found neither"):
        importlib.import_module("slimkernels.integrations.lightning")
