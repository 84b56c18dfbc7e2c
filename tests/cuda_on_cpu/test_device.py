"""What the CUDA backend makes of the device that it is given."""

import os

import pytest
import torch

import slimkernels as sk


def common():
    """Of this process, which alone has a CUDA backend for certain."""
    from slimkernels.backends.cuda import _common

    return _common


@pytest.mark.parametrize(
    "built, device, has_code",
    [
        ("9.0a", (9, 0), True),
        ("9.0a", (9, 1), False),
        ("8.0", (8, 6), True),
        ("8.6", (8, 0), False),
        ("8.0", (9, 0), False),
        ("8.0+PTX", (12, 0), True),
        ("9.0a 8.0 10.0+PTX", (7, 5), False),
        ("10.0f", (10, 3), True),
    ],
)
def test_code_for_a_device(built, device, has_code):
    _common = common()
    known = _common.ARCHITECTURES
    try:
        _common.ARCHITECTURES = tuple(_common._architecture(name) for name in built.split())
        assert _common.has_code_for(*device) == has_code
    finally:
        _common.ARCHITECTURES = known


def test_attention_without_code_for_hopper_is_refused():
    from slimkernels.backends.cuda import scaled_dot_product_attention as attention

    query = torch.randn(1, 1, 8, 64).bfloat16()
    attention.IS_BUILT = False
    try:
        with pytest.raises(sk.BackendError, match="needs code for 9.0a and the extension"):
            sk.scaled_dot_product_attention(query, query, query, backend="cuda")
    finally:
        attention.IS_BUILT = True


def test_attention_for_another_device_is_refused():
    """In a sentence, and by the extension, in which its kernels for such a device are empty."""
    from slimkernels.backends.cuda import scaled_dot_product_attention as attention

    query = torch.randn(1, 1, 8, 64).bfloat16()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "capability", lambda x: (10, 0))
        with pytest.raises(sk.BackendError, match="capability 9.0 and cpu has 10.0"):
            sk.scaled_dot_product_attention(query, query, query, backend="cuda")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_ON_CPU_CAPABILITY", "100")
        with pytest.raises(RuntimeError, match="capability 9.0 is needed"):
            sk.scaled_dot_product_attention(query, query, query, backend="cuda")


def test_parts_of_tall_narrow_inputs_fit_a_grid():
    os.environ["CUDA_ON_CPU_MULTIPROCESSORS"] = "132"
    try:
        assert common()._cuda.activation_parts(600_000, 1, 0) == 65535
        assert common()._cuda.activation_parts(600_000, 768, 0) == 352
    finally:
        del os.environ["CUDA_ON_CPU_MULTIPROCESSORS"]


def test_programs_of_unaligned_rows_are_as_few_as_their_registers_allow():
    float32, bfloat16 = (common().DTYPES[dtype] for dtype in (torch.float32, torch.bfloat16))
    assert common()._cuda.norm_programs(1000, 128, bfloat16, 0) == 4
    assert common()._cuda.norm_programs(1000, 130, bfloat16, 0) == 2
    assert common()._cuda.norm_programs(1000, 132, float32, 0) == 4
