"""The interpreter's bfloat16 is corrected wherever kernels run in it; evidence is recorded."""

import os

import pytest

from tests.ops.backends import proves

if os.environ.get("TRITON_INTERPRET") == "1":
    from tests.interpreter_bf16 import install

    install()


@pytest.fixture(autouse=True)
def evidence(request, record_property):
    """Enter into the JUnit report what a test on a GPU proves; `make gpu` reads it."""
    for proof in proves(request.node):
        record_property("proves", proof)
