"""Every shipped GPU configuration compiles, spills nothing and fits in shared memory."""

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY

pytest.importorskip("triton")
from tests.ahead_of_time import SHARED  # noqa: E402


@pytest.mark.parametrize("capability", SHARED)
def test_triton_configurations(capability, tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    run = subprocess.run(
        [sys.executable, "-m", "tests.ahead_of_time", str(capability)],
        cwd=REPOSITORY, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    lines = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(lines) > 30
    assert capability != 90 or any(line["wgmma"] for line in lines), "disassembly is not understood"
    for line in lines:
        assert line["spills"] == 0 and not line["serialized"], line
        assert line["shared"] <= SHARED[capability], line
        assert not line.get("foreign"), line
