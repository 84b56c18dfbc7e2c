"""What is kept for a call answers for calls that are alike in all that has a say, and no other."""

import enum
import runpy
import struct
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from slimkernels.ops import _call_memory

pytest.importorskip("slimkernels._cpu", reason="nothing is kept without the extension")

X = torch.randn(2, 3)


class Number(enum.IntEnum):
    ONE = 1


class Named(torch.Tensor):
    pass


def test_calls_that_differ():
    """Each from the others by as little as can be."""
    options = [
        *((None,), (None, None), (0,), (False,), (0.0,), (-0.0,), (1,), (True,), (1.0,)),
        *((-1,), (63,), (64,), (-64,), (-65,), (2**63 - 1,), (-(2**63),), (float("nan"),)),
        *(((),), ((), ()), (((),),), ([],), ((8,),), ((8.0,),), ((True,),), ([8],), ([8.0],)),
        *((8, 1), ((8, 1),), ((8,), 1), (((8,), 1),), ("1",), ("",), ("", ""), ("a", "b"), ("ab",)),
        *(("N",), ("a\0",), ("a",), ("\xe9",), ("a", "Sb"), ("aS", "b")),
    ]
    # Whose bytes would be the same without their types.
    options += [(struct.unpack("<d", b"\x80" * 7 + b"\x40")[0],), (1 << 54,)]
    dtypes = [torch.float64, torch.float16, torch.bfloat16, torch.int32, torch.uint8, torch.bool]
    dtypes += [torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2]
    shapes = [(), (0,), (1,), (6,), (2, 3), (3, 2), (1, 2, 3), (2, 3, 1), (127,), (128,), (200, 3)]
    shapes += [(136, 3), (128, 5), (0, 641), (2, ord("("), 1)]
    tensors = [(torch.zeros(1, dtype=dtype),) for dtype in dtypes]
    tensors += [(torch.zeros(shape),) for shape in shapes]
    tensors += [(), (None,), (X, None), (None, X), (X, X), (X, None, None)]
    calls = [((X,), o) for o in options] + [(t, ()) for t in tensors]
    calls += [((torch.zeros(2),), ((),))]
    memory = _call_memory.CallMemory(200)
    for value, call in enumerate(calls):
        assert memory.get(call) is None, call
        memory.put(call, value)
    assert [memory.get(call) for call in calls] == list(range(len(calls)))


def test_calls_that_are_alike():
    memory = _call_memory.CallMemory(2)
    memory.put(((X, None), ((8, 2), "a")), "kept")
    for x in (X.clone(), torch.nn.Parameter(X), X.T.contiguous().T, X[:1].expand(2, 3), X.neg()):
        assert memory.get(((x, None), (torch.Size((8, 2)), "a"))) == "kept"


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_what_is_never_kept():
    memory = _call_memory.CallMemory(1)

    def refuses(*tensors, options=()):
        memory.put((tensors, options), True)
        return len(memory) == 0 and memory.get((tensors, options)) is None

    def transformed(x):
        assert refuses(x) and refuses(X, x)
        return x.sum()

    itself = []
    itself.append(itself)
    for _ in range(2):  # torch refuses some at first, and is not asked again
        for option in (2**63, -(2**63) - 1, torch.float32, X, X[0, 0], object(), Number.ONE, 1j):
            assert refuses(X, options=(option,)) and refuses(X, options=((option,),))
        for option in (itself, "a" * 600, (8,) * 600, "\ud800", b"a", {}, range(3)):
            assert refuses(X, options=(option,))
        others = [X.to("meta"), X.to_sparse(), X.to_mkldnn(), X.as_subclass(Named), "a", 1.0]
        for x in (*others, torch.nested.nested_tensor([X]), FakeTensorMode().from_tensor(X)):
            assert refuses(x) and refuses(X, x)
        torch.vmap(transformed)(X[None])
        torch.func.grad(transformed)(X)
        torch.func.jvp(transformed, (X,), (X,))
    memory.put(((X,), ()), True)
    assert len(memory) == 1


def test_it_is_emptied_where_it_is_full_and_lets_values_go():
    memory, value = _call_memory.CallMemory(3), object()
    references = sys.getrefcount(value)
    for n in range(10):
        memory.put(((X,), (n,)), value)
        assert len(memory) == n % 3 + 1 and memory.get(((X,), (n,))) is value
    memory.put(((X,), (9,)), value)
    assert len(memory) == 1 and sys.getrefcount(value) == references + 1
    memory.clear()
    assert len(memory) == 0 and memory.get(((X,), (9,))) is None
    memory.put(((X,), (9,)), value)
    del memory
    assert sys.getrefcount(value) == references


def test_what_is_no_call_is_a_type_error():
    memory = _call_memory.CallMemory(1)
    for wrong in (None, (), ((),), ((), (), ()), ([], ()), ((), [])):
        with pytest.raises(TypeError, match="a call is a tuple of two tuples"):
            memory.get(wrong)
        with pytest.raises(TypeError, match="a call is a tuple of two tuples"):
            memory.put(wrong, True)
    for most in (0, -1, 2**20 + 1):
        with pytest.raises(ValueError, match="from 1 to 2"):
            _call_memory.CallMemory(most)


@pytest.mark.parametrize("missing", ["the extension", "torch's table of functions"])
def test_nothing_is_kept_without(missing, monkeypatch):
    if missing == "the extension":
        monkeypatch.setitem(sys.modules, "slimkernels._cpu", None)
    else:
        monkeypatch.delattr(torch.Tensor, "__dlpack_c_exchange_api__")
    memory = runpy.run_path(_call_memory.__file__)["CallMemory"](5)
    memory.put(((X,), ()), True)
    assert memory.get(((X,), ())) is None and len(memory) == 0
    memory.clear()
