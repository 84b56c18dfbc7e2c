"""The affine map on the CPU: oneDNN's float32 product instead of MKL's, which is slow on AMD.

torch multiplies float32 matrices by MKL. On AMD's Zen 4, two threads, oneDNN's time against it:
    M x K -> N            forward   dx           M x K -> N            forward   dx
    1024 x 384 -> 384     1.10x     1.15x        154 x 384 -> 30522    1.90x     1.27x
    1024 x 384 -> 1536    1.14x     1.11x        1024 x 384 -> 30522   1.44x     1.09x
    1024 x 1536 -> 384    1.09x     1.15x        128 x 384 -> 384      1.28x     1.34x
    8 x 384 -> 384        0.89x     1.25x        64 x 64 -> 64         0.76x     0.99x
dweight stays with MKL, which is as fast or faster (oneDNN: 0.72x to 1.08x), and so does a dx from
very many dy: 1024 x 768 -> 30522 was measured at 0.81x.
"""

from pathlib import Path

import torch

MIN_PRODUCT = 1 << 22  # M * N * K below which the call costs more than oneDNN saves
MAX_DY = 1 << 24  # elements of dy above which MKL makes dx faster


def _vendor() -> str:
    """Who made the processor, in its own words; empty where the system does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return ""
    return next((line.split(":")[1].strip() for line in lines if line.startswith("vendor_id")), "")


# Read once, at import: neither changes, and torch.compile cannot trace the reading. Only AMD,
# since MKL chooses slow code there by the vendor's name and is at its best on Intel's processors;
# anything else is unmeasured.
_IS_AMD = _vendor() == "AuthenticAMD"
_HAS_BOTH = torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()


def unsupported(x, weight, bias):
    if not x.is_cpu:
        return f"it needs CPU tensors and input is on {x.device}"
    if torch.is_autocast_enabled("cpu"):
        return "under autocast torch's own linear converts and multiplies"
    if x.dtype != torch.float32:
        return f"it is for float32 (torch itself gives bfloat16 to oneDNN) and input is {x.dtype}"
    if not _HAS_BOTH:
        return "this torch was not built with both MKL and oneDNN, between which it would choose"
    if not _IS_AMD:
        return "oneDNN has been measured faster than torch's MKL on AMD processors only"
    if x.numel() * weight.shape[0] < MIN_PRODUCT:
        return f"products of fewer than {MIN_PRODUCT} multiplications run faster in torch"
    return None


def forward(x, weight, bias):
    return _multiply(x, weight, bias)


def backward(dy, x, weight, wanted):
    wants_dx, wants_dweight, wants_dbias = wanted
    dx, dweight, dbias = (x.new_empty(0) for _ in range(3))
    rows = dy.reshape(-1, dy.shape[-1])  # (M, N)
    if wants_dx:
        dx = torch.matmul(dy, weight) if dy.numel() > MAX_DY else _multiply(dy, weight.t(), None)
    if wants_dweight:
        dweight = rows.t() @ x.reshape(-1, x.shape[-1])
    if wants_dbias:
        dbias = rows.sum(0)
    return dx, dweight, dbias


def _multiply(x, weight, bias):
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
