"""Rotary position embedding of query and key in Triton.

Tiling    A program owns a token: its row of the tables is read once and turns all heads of query
          and of key, a tile of heads at a time. Both are read through strides.
Traffic   Each element is read and written once. Backward is the same pass with the opposite sign of
          every angle.
Numerics  float32.
"""

import triton
import triton.language as tl

from slimkernels.backends._rotary import unsupported_tables
from slimkernels.backends.triton._common import unsupported_tensor


def unsupported(query, key, cos, sin, positions, offset, interleaved):
    return unsupported_tables(cos, sin) or unsupported_tensor(query)


def forward(query, key, cos, sin, positions, offset, interleaved):
    return _turn(query, key, cos, sin, positions, offset, interleaved, False)


def backward(dquery, dkey, cos, sin, positions, offset, interleaved):
    return _turn(dquery, dkey, cos, sin, positions, offset, interleaved, True)


def _turn(query, key, cos, sin, positions, offset, interleaved, is_backward):
    query, key = (t if t.stride(-1) == 1 else t.contiguous() for t in (query, key))
    cos, sin = (t.float().contiguous() for t in (cos, sin))
    outputs = query.new_empty(query.shape), key.new_empty(key.shape)
    (B, T, H, D), (rows, half) = query.shape, cos.shape
    if B * T:
        by_token = (0, 0)
        if positions is not None:
            by_token = positions.stride(0) if positions.shape[0] > 1 else 0, positions.stride(1)
        _turn_kernel[(B * T,)](
            *(query, key, *outputs, cos, sin, positions),
            *(query.stride()[:3], key.stride()[:3], by_token),
            *(T, H, key.shape[2], rows, offset),
            D=D,
            HALF=half,
            INTERLEAVED=interleaved,
            IS_BACKWARD=is_backward,
            **_tile(max(H, key.shape[2]), half, D),
        )
    return outputs


def _tile(heads, half, D):
    """Heads and pairs of a tile of up to 4096 elements: 32 a lane of 4 warps."""
    BLOCK_HALF = triton.next_power_of_2(half)
    BLOCK_REST = triton.next_power_of_2(D - 2 * half) if 2 * half < D else 0
    most = max(2048 // max(BLOCK_HALF, BLOCK_REST // 2), 1)
    BLOCK_H = min(triton.next_power_of_2(max(heads, 1)), most)
    return dict(BLOCK_H=BLOCK_H, BLOCK_HALF=BLOCK_HALF, BLOCK_REST=BLOCK_REST, num_warps=4)


@triton.jit
def _turn_heads(
    x_ptr,
    y_ptr,
    cos,
    sin,
    H,
    stride,
    D: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    """The heads of one token, `stride` apart in x and D in y; cos and sin are (1, BLOCK_HALF)."""
    for first in range(0, H, BLOCK_H):
        heads = first + tl.arange(0, BLOCK_H)[:, None]
        x_rows = x_ptr + heads.to(tl.int64) * stride  # heads of whole sequences may be far apart
        y_rows = y_ptr + heads * D
        if INTERLEAVED:
            # Whole vectors are loaded, and a lane has both elements of its pairs.
            cols = tl.arange(0, 2 * BLOCK_HALF)[None, :]
            mask = (heads < H) & (cols < 2 * HALF)
            x = tl.load(x_rows + cols, mask=mask, other=0.0).to(tl.float32)
            a, b = tl.split(tl.reshape(x, (BLOCK_H, BLOCK_HALF, 2)))
            y = tl.join(a * cos - b * sin, b * cos + a * sin)
            tl.store(y_rows + cols, tl.reshape(y, (BLOCK_H, 2 * BLOCK_HALF)), mask=mask)
        else:
            cols = tl.arange(0, BLOCK_HALF)[None, :]
            mask = (heads < H) & (cols < HALF)
            a = tl.load(x_rows + cols, mask=mask, other=0.0).to(tl.float32)
            b = tl.load(x_rows + HALF + cols, mask=mask, other=0.0).to(tl.float32)
            tl.store(y_rows + cols, a * cos - b * sin, mask=mask)
            tl.store(y_rows + HALF + cols, b * cos + a * sin, mask=mask)
        if BLOCK_REST:
            cols = 2 * HALF + tl.arange(0, BLOCK_REST)[None, :]
            mask = (heads < H) & (cols < D)
            tl.store(y_rows + cols, tl.load(x_rows + cols, mask=mask), mask=mask)


# What grows from call to call in decoding must not compile it anew.
@triton.jit(do_not_specialize=["T", "table_rows", "offset"])
def _turn_kernel(
    query_ptr,
    key_ptr,
    turned_query_ptr,
    turned_key_ptr,
    cos_ptr,
    sin_ptr,
    positions_ptr,
    query_strides,
    key_strides,
    position_strides,
    T,
    H,
    Hkv,
    table_rows,
    offset,
    D: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    IS_BACKWARD: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)  # token * H * D can pass 2^31
    b, t = token // T, token % T
    position = offset + t
    if positions_ptr is not None:
        at = positions_ptr + b * position_strides[0] + t * position_strides[1]
        position = tl.load(at).to(tl.int64)
    pairs = tl.arange(0, BLOCK_HALF)[None, :]
    # A position outside the tables, which the host cannot see, gives NaN and reads no table.
    row = position + tl.zeros((1, 1), tl.int64)  # Triton's interpreter masks with blocks only
    mask = (pairs < HALF) & (row >= 0) & (row < table_rows)
    cos = tl.load(cos_ptr + row * HALF + pairs, mask=mask, other=float("nan"))
    sin = tl.load(sin_ptr + row * HALF + pairs, mask=mask, other=float("nan"))
    sin = -sin if IS_BACKWARD else sin
    query_ptr += b * query_strides[0] + t * query_strides[1]
    key_ptr += b * key_strides[0] + t * key_strides[1]
    to_query, to_key = turned_query_ptr + token * H * D, turned_key_ptr + token * Hkv * D
    _turn_heads(
        query_ptr,
        to_query,
        cos,
        sin,
        H,
        query_strides[2],
        D,
        HALF,
        INTERLEAVED,
        BLOCK_H,
        BLOCK_HALF,
        BLOCK_REST,
    )
    _turn_heads(
        key_ptr,
        to_key,
        cos,
        sin,
        Hkv,
        key_strides[2],
        D,
        HALF,
        INTERLEAVED,
        BLOCK_H,
        BLOCK_HALF,
        BLOCK_REST,
    )


# What tests/test_aot.py compiles for sm_80, sm_90 and sm_100, and the most that may come out.
_TENSORS = ("query_ptr", "key_ptr", "turned_query_ptr", "turned_key_ptr")
_SIGNATURE = {
    **dict.fromkeys(_TENSORS, "*bf16"),
    **{"cos_ptr": "*fp32", "sin_ptr": "*fp32", "positions_ptr": "*i64"},
    **dict.fromkeys(("query_strides", "key_strides"), ("i64", "i64", "i64")),
    **{"position_strides": ("i64", "i64")},
    **dict.fromkeys(("T", "H", "Hkv", "table_rows", "offset"), "i32"),
}
COMPILES = [
    dict(
        kernel=_turn_kernel,
        signature=_SIGNATURE,
        constexprs={
            **{"D": D, "HALF": half, "INTERLEAVED": interleaved, "IS_BACKWARD": False},
            **{k: v for k, v in _tile(32, half, D).items() if k != "num_warps"},
        },
        num_warps=4,
        registers=128,
    )
    for D, half in ((64, 32), (128, 64), (128, 32), (256, 128))
    for interleaved in (False, True)
]
