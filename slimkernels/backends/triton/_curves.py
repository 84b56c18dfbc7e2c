"""The activation functions of one number, float32, with their slopes.

Phi(-|z|) is exp(-z^2 / 2) times a polynomial, which keeps its relative accuracy where 1 + erf has
no digit left; csrc/cpu/vec.h derives it. (1 + tanh(u)) / 2 is the logistic function of 2 u, from
exp(-2 |u|), which cannot overflow.
"""

import triton
import triton.language as tl


@triton.jit
def _normal(z):
    """Phi(z) and exp(-z^2 / 2): csrc/cpu/vec.h, normal()."""
    a = tl.minimum(tl.abs(z), 15.0)
    r = 1.0 / (a + 3.5)
    t = (a - 3.5) * r
    p = 1.10689398e-4 * t + 4.21897857e-4
    p = p * t - 4.94943699e-4
    p = p * t - 3.17531079e-3
    p = p * t + 6.49311580e-3
    p = p * t + 1.74063779e-2
    p = p * t - 1.16053037e-1
    p = p * t + 3.15425038e-1
    p = p * t - 5.65561771e-1
    p = p * t + 7.44416058e-1
    e = tl.exp(-0.5 * a * a)
    beyond = e * p * r
    return tl.where(z < 0.0, beyond, 1.0 - beyond), e


@triton.jit
def _logistic(u):
    """1 / (1 + exp(-u)) and its slope."""
    e = tl.exp(-tl.abs(u))
    q = 1.0 / (1.0 + e)
    return tl.where(u < 0.0, e * q, q), e * q * q


@triton.jit
def curve_at(z, CURVE: tl.constexpr):
    """f(z) and f'(z); what is not used of the two is not computed."""
    if CURVE == "relu_squared":
        above = tl.where(z < 0.0, 0.0, z)  # a NaN stays one
        value = above * above
        slope = 2.0 * above
    elif CURVE == "silu":
        share, steepness = _logistic(z)
        value = z * share
        slope = share + z * steepness
    elif CURVE == "gelu_tanh":
        # 2 sqrt(2 / pi) (z + 0.044715 z^3)
        share, steepness = _logistic(z * (1.595769122 + 0.0713548163 * z * z))
        value = z * share
        slope = share + z * steepness * (1.595769122 + 0.2140644488 * z * z)
    else:
        share, e = _normal(z)
        value = z * share
        slope = share + z * e * 0.398942280
    return value, slope
