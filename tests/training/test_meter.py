import time
from types import SimpleNamespace

import pytest
import torch

from slimkernels.data import Batch
from slimkernels.models.config import TransformerConfig
from slimkernels.training import meter
from slimkernels.training.meter import Meter, peak_tflops, training_flops

CONFIG = TransformerConfig(
    vocab_size=1000, hidden_size=64, num_layers=3, num_heads=4, intermediate_size=256
)


def batch_of(*lengths, masked=2):
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    T = int(cu_seqlens[-1])
    ids = torch.zeros(T, dtype=torch.int64)
    return Batch(ids, ids, ids, cu_seqlens, ids[:masked], ids[:masked], ids[: len(lengths)])


def test_rates_agree_with_a_stopwatch():
    measured, started = Meter(CONFIG, torch.device("cpu")), time.perf_counter()
    for _ in range(4):
        measured.add(batch_of(30, 10), waited=0.01)
        time.sleep(0.05)
    rates, seconds = measured.report(), time.perf_counter() - started
    assert 160 / seconds <= rates["tokens_per_second"] <= 160 / 0.2
    assert rates["padding_avoided"] == pytest.approx(1 - 40 / 60)
    assert 0.04 / seconds * 0.99 <= rates["waiting"] <= 0.04 / 0.2
    assert "mfu" not in rates
    assert measured.report()["tokens_per_second"] == 0.0  # a report begins anew


def test_flops_are_those_of_the_matrices():
    """Counted by torch itself on the matrix products of one forward, times three."""
    from torch.utils.flop_counter import FlopCounterMode

    T, K, C, V = 40, 6, 64, 1000
    x, masked = torch.randn(T, C), torch.randn(K, C)
    with FlopCounterMode(display=False) as counter:
        for _ in range(CONFIG.num_layers):
            x @ torch.randn(C, 4 * C)  # query, key, value and the output projection
            x @ torch.randn(C, 256), torch.randn(T, 256) @ torch.randn(256, C)
            for length in (30, 10):
                q = torch.randn(length, C)
                (q @ q.T) @ q
        masked @ torch.randn(C, C), masked @ torch.randn(C, V)
    assert training_flops(CONFIG, T, 30**2 + 10**2, K) == 3 * counter.get_total_flops()


@pytest.mark.parametrize(
    "name, peak",
    [("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA L40S", 362), ("X", None)],
)
def test_the_peak_of_a_device(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_tflops(SimpleNamespace(type="cuda")) == peak
    assert peak_tflops(torch.device("cpu")) is None


def test_mfu(monkeypatch):
    monkeypatch.setattr(meter, "peak_tflops", lambda device: 1e-6)  # a million operations a second
    measured, started = Meter(CONFIG, torch.device("cpu")), time.perf_counter()
    measured.add(batch_of(8), waited=0.0)
    time.sleep(0.05)
    mfu, seconds = measured.report()["mfu"], time.perf_counter() - started
    flops = training_flops(CONFIG, 8, 64, 2)
    assert flops / seconds / 1e6 <= mfu <= flops / 0.05 / 1e6
