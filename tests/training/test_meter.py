import dataclasses
import time
from types import SimpleNamespace

import pytest
import torch

from slimkernels.data import Batch
from slimkernels.dispatch import use_backend
from slimkernels.models.bert import BertForPreTraining
from slimkernels.models.config import TransformerConfig
from slimkernels.training import meter
from slimkernels.training.loop import ragged_losses
from slimkernels.training.meter import Meter, peak_tflops, training_flops

CONFIG = TransformerConfig(
    vocab_size=1000, hidden_size=64, num_layers=3, num_heads=4, intermediate_size=256
)

NONE = torch.empty(0, dtype=torch.int64)


def batch_of(*lengths, masked=NONE):
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    T = int(cu_seqlens[-1])
    ids = torch.zeros(T, dtype=torch.int64)
    labels = torch.zeros_like(masked)
    return Batch(ids, ids, ids, cu_seqlens, masked, labels, ids[: len(lengths)])


def test_rates_agree_with_a_stopwatch():
    measured, started = Meter(CONFIG, torch.device("cpu"), torch.bfloat16), time.perf_counter()
    for _ in range(4):
        measured.add(batch_of(30, 10), waited=0.01)
        time.sleep(0.05)
    rates, seconds = measured.report(), time.perf_counter() - started
    assert 160 / seconds <= rates["tokens_per_second"] <= 160 / 0.2
    assert rates["padding_avoided"] == pytest.approx(1 - 40 / 60)
    assert 0.04 / seconds * 0.99 <= rates["waiting"] <= 0.04 / 0.2
    assert "mfu" not in rates
    assert measured.report()["tokens_per_second"] == 0.0  # a report begins anew


@pytest.mark.parametrize("num_layers", [1, 3])
def test_flops_are_those_of_the_model(num_layers):
    """Counted by torch itself on one forward of two sequences, one by one, times three.

    One by one, because the reference computes scores between all sequences of a batch.
    """
    from torch.utils.flop_counter import FlopCounterMode

    config = dataclasses.replace(CONFIG, num_layers=num_layers)
    model = BertForPreTraining(config).eval()
    masked = {30: 4, 10: 2}
    with FlopCounterMode(display=False) as counter, use_backend("torch"):
        for length, count in masked.items():
            ragged_losses(model, batch_of(length, masked=torch.arange(count)))
    both = batch_of(30, 10, masked=torch.tensor([0, 1, 2, 3, 30, 31]))
    assert training_flops(config, both) == 3 * counter.get_total_flops()


@pytest.mark.parametrize(
    "name, peak",
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100-PCIE-80GB", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("A100-PCIE-40GB", 312),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA RTX A4000", None),
        ("NVIDIA A10G", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("X", None),
    ],
)
def test_the_peak_of_a_device(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_tflops(SimpleNamespace(type="cuda")) == peak
    assert peak_tflops(torch.device("cpu")) is None


def test_mfu(monkeypatch):
    monkeypatch.setattr(meter, "peak_tflops", lambda device: 1e-6)  # a million operations a second
    measured, started = Meter(CONFIG, torch.device("cpu"), torch.bfloat16), time.perf_counter()
    measured.add(batch_of(8), waited=0.0)
    time.sleep(0.05)
    mfu, seconds = measured.report()["mfu"], time.perf_counter() - started
    flops = training_flops(CONFIG, batch_of(8))
    assert flops / seconds / 1e6 <= mfu <= flops / 0.05 / 1e6


def test_no_mfu_in_float32(monkeypatch):
    """The table holds bfloat16's peaks, which are not float32's."""
    monkeypatch.setattr(meter, "peak_tflops", lambda device: 1e-6)
    measured = Meter(CONFIG, torch.device("cpu"), torch.float32)
    measured.add(batch_of(8), waited=0.0)
    assert "mfu" not in measured.report()
