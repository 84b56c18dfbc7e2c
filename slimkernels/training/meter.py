"""What a run reports while it goes: real tokens a second, padding avoided, and MFU on a GPU."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch

# Dense bfloat16 peaks in TFLOP/s, from the vendors' datasheets (no sparsity). The longest name
# that the device's own name contains is taken.
PEAK_TFLOPS = {
    "A100": 312,
    "A10": 125,
    "A30": 165,
    "A40": 150,
    "L4": 121,
    "L40": 181,
    "L40S": 362,
    "RTX 3090": 71,
    "RTX 4090": 165,
    "RTX 5090": 210,
    "H100": 989,
    "H100 PCIe": 756,
    "H200": 989,
    "B200": 2250,
}


def peak_tflops(device: torch.device) -> float | None:
    """The device's dense bfloat16 peak; None where it is not known, and on a CPU."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    known = [key for key in PEAK_TFLOPS if key in name]
    return PEAK_TFLOPS[max(known, key=len)] if known else None


def training_flops(config, num_tokens: int, attended: int, predicted: int) -> float:
    """Floating-point operations of one training step: forward, and twice that for backward.

    num_tokens  real tokens
    attended    the sum over sequences of length squared: each token sees its own sequence only
    predicted   positions that the vocabulary matrix is applied to

    Six for each matrix parameter and token it meets, as in Kaplan et al. 2020 appendix B, with
    attention counted by what it really attends to.
    """
    C = config.hidden_size
    block = 4 * C * C + 2 * C * config.intermediate_size
    head = C * C + C * config.vocab_size
    attention = 12 * C * attended * config.num_layers
    return 6.0 * (config.num_layers * block * num_tokens + head * predicted) + attention


@dataclass
class Meter:
    """Sums over the steps since the last report."""

    config: object
    device: torch.device
    tokens: int = 0
    padded_tokens: int = 0
    flops: float = 0.0
    waited: float = 0.0
    started: float = field(default_factory=time.perf_counter)

    def add(self, batch, waited: float) -> None:
        """Count one step's batch, still on the CPU, and the seconds spent waiting for it."""
        lengths = batch.cu_seqlens.diff().double()
        self.tokens += batch.num_tokens
        self.padded_tokens += batch.num_sequences * batch.max_length
        attended = int(lengths.square().sum())
        predicted = len(batch.masked_positions)
        self.flops += training_flops(self.config, batch.num_tokens, attended, predicted)
        self.waited += waited

    def report(self) -> dict[str, float]:
        """Rates since the last report, which then begin anew.

        tokens_per_second  real tokens, never padding
        padding_avoided    share of a padded batch that would have been padding
        waiting            share of the time spent waiting for data
        mfu                model FLOP utilisation; absent where the peak is not known
        """
        seconds = max(time.perf_counter() - self.started, 1e-9)
        rates = {
            "tokens_per_second": self.tokens / seconds,
            "padding_avoided": 1.0 - self.tokens / max(self.padded_tokens, 1),
            "waiting": self.waited / seconds,
        }
        peak = peak_tflops(self.device)
        if peak:
            rates["mfu"] = self.flops / seconds / (peak * 1e12)
        self.tokens = self.padded_tokens = 0
        self.flops = self.waited = 0.0
        self.started = time.perf_counter()
        return rates
