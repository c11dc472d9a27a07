"""The tests of an op that has a C++ kernel run twice: on its torch form, and on the kernel.

On a machine without a compiler (or with CXX=none) they run on the torch form, and what is about kernels alone is not collected.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from slipstream.ops.backends.cpp.library import find_compiler, kernels
from slipstream.ops.dispatch import torch_forms

collect_ignore = [] if find_compiler() else ["test_cpp_kernels.py", "test_kernel_library.py"]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.module.__name__.rpartition("test_")[2] in kernels():
        metafunc.parametrize("run_by", ["torch", "cpp"] if find_compiler() else ["torch"], indirect=True)


@pytest.fixture(autouse=True)
def run_by(request: pytest.FixtureRequest) -> Iterator[None]:
    if getattr(request, "param", "cpp") == "cpp":
        yield
    else:
        with torch_forms():
            yield
