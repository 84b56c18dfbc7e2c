"""What a run reports while it goes: real tokens a second, padding avoided, and MFU on a GPU."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, field

import torch

# Dense bfloat16 peaks in TFLOP/s, from the vendors' datasheets (no sparsity), by the device's own
# name without the words that rarely change its peak. A word unknown may change it: no guess then.
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
_SAME_PEAK = re.compile(r"NVIDIA|Tesla|GeForce|PCIe|SXM\d?|HBM\d\w?|\d+GB", re.IGNORECASE)


def peak_tflops(device: torch.device) -> float | None:
    """The device's dense bfloat16 peak; None where it is not known, and on a CPU."""
    if device.type != "cuda":
        return None
    words = re.split(r"[\s-]+", torch.cuda.get_device_name(device))
    name = " ".join(word for word in words if not _SAME_PEAK.fullmatch(word))
    if "PCIE" in map(str.upper, words) and f"{name} PCIe" in PEAK_TFLOPS:
        name += " PCIe"
    return PEAK_TFLOPS.get(name)


def training_flops(config, batch) -> float:
    """Floating-point operations that BERT's training step needs: forward, and twice that again.

    Two for each multiplication of a matrix parameter with a token it meets, as in Kaplan et al.
    2020 appendix B, and attention by the tokens that a token really sees. The last block counts
    for the tokens that a loss reads, as models/bert.py computes it: what is skipped is no work.

    batch  a data.batch.Batch on the CPU
    """
    C, width = config.hidden_size, config.intermediate_size
    lengths = batch.cu_seqlens.diff().long()
    masked = torch.searchsorted(batch.masked_positions, batch.cu_seqlens.long()).diff()
    read = masked + 1  # and the first token, for the next-sentence head
    tokens, num_read = int(lengths.sum()), int(read.sum())
    blocks = config.num_layers - 1

    matrices = blocks * tokens * (4 * C * C + 2 * C * width)
    matrices += tokens * 2 * C * C + num_read * (2 * C * C + 2 * C * width)
    matrices += int(masked.sum()) * (C * C + C * config.vocab_size)  # the masked-word head
    matrices += len(lengths) * (C * C + 2 * C)  # the next-sentence head
    seen = blocks * int(lengths.square().sum()) + int((lengths * read).sum())
    return 3.0 * 2 * (matrices + 2 * C * seen)


@dataclass
class Meter:
    """Sums over the steps since the last report."""

    config: object
    device: torch.device
    precision: torch.dtype
    tokens: int = 0
    padded_tokens: int = 0
    flops: float = 0.0
    waited: float = 0.0
    started: float = field(default_factory=time.perf_counter)

    def add(self, batch, waited: float) -> None:
        """Count one step's batch, still on the CPU, and the seconds spent waiting for it."""
        self.tokens += batch.num_tokens
        self.padded_tokens += batch.num_sequences * batch.max_length
        self.flops += training_flops(self.config, batch)
        self.waited += waited

    def report(self) -> dict[str, float]:
        """Rates since the last report, which then begin anew.

        tokens_per_second  real tokens, never padding
        padding_avoided    share of a padded batch that would have been padding
        waiting            share of the time spent waiting for data
        mfu                model FLOP utilisation; absent where the bfloat16 peak is not known, and
                           in float32
        """
        seconds = max(time.perf_counter() - self.started, 1e-9)
        rates = {
            "tokens_per_second": self.tokens / seconds,
            "padding_avoided": 1.0 - self.tokens / max(self.padded_tokens, 1),
            "waiting": self.waited / seconds,
        }
        peak = peak_tflops(self.device) if self.precision == torch.bfloat16 else None
        if peak:
            rates["mfu"] = self.flops / seconds / (peak * 1e12)
        self.tokens = self.padded_tokens = 0
        self.flops = self.waited = 0.0
        self.started = time.perf_counter()
        return rates
