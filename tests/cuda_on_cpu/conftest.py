"""The tests of this folder run in a child process, where backend="cuda" takes CPU tensors.

Each is called with the threads of a block in either order, and what it returns (a tensor, a list
or dictionary of them, nothing) must have the same bits: a missing barrier would tell them apart. A
test marked `here` runs in this process.
"""

import pytest
from cuda_on_cpu.harness import Child, build


@pytest.fixture(scope="session")
def cuda_child():
    with Child(build()) as child:
        yield child


@pytest.fixture(autouse=True)
def _child_of_test(request):
    is_here = request.node.get_closest_marker("here")
    request.node.child = None if is_here else request.getfixturevalue("cuda_child")


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    child = getattr(pyfuncitem, "child", None)
    if child is None:
        return None
    names = pyfuncitem._fixtureinfo.argnames
    child.call(pyfuncitem.function, **{name: pyfuncitem.funcargs[name] for name in names})
    return True
