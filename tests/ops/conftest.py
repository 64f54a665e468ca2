"""The interpreter's bfloat16 is corrected wherever kernels run in it."""

import os

if os.environ.get("TRITON_INTERPRET") == "1":
    from tests.interpreter_bf16 import install

    install()
