"""The benchmark of the encoder: its rows, and what it says where memory ends."""

import pytest
import torch

from benchmarks import encoder

CPU = torch.device("cpu")


@pytest.mark.parametrize("again", [True, False])
def test_a_row(again):
    row = encoder.measure("timo_tiny", (1, 2, 4, 64, 32), torch.float32, CPU, again, 0.0)
    assert row["shape"] == [1, 2, 4, 64, 32] and row["checkpoint_blocks"] is again
    assert row["seconds"]["median"] > 0 and row["note"] is None and row["total_bytes"] is None
    assert f"| timo_tiny | 1, 2, 4, 64, 32 | {again} |" in encoder.markdown({"cores": 2}, [row])


def test_out_of_memory_is_a_row(monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(encoder.harness, "measure", full)
    row = encoder.measure("timo_tiny", (1, 1, 3, 32, 32), torch.float32, CPU, False, 0.0)
    assert row["seconds"] is None
    assert "| False | out of memory |" in encoder.markdown({}, [row])
