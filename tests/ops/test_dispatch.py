"""Selection, explanation and the evidence behind `auto`."""

import json
from dataclasses import replace

import pytest
import torch

import timo
from tests.conftest import REPOSITORY
from timo.ops import dispatch

X = torch.randn(1, 3, 4, 2, 8)


def test_explain_names_every_backend():
    choice = timo.ops.explain(timo.ops.temporal_median, X)
    assert choice.backend in ("cpp", "reference")
    assert {choice.backend, *choice.reasons} == set(dispatch.BACKENDS)
    assert "not on cpu" in choice.reasons["cuda"]
    assert str(choice).startswith("temporal_median: ")


def test_environment_variable_and_argument(monkeypatch):
    monkeypatch.setenv("TIMO_BACKEND", "reference")
    assert timo.ops.explain("temporal_median", X).backend == "reference"
    assert timo.ops.explain("temporal_median", X, backend="cpp,reference").backend in (
        "cpp",
        "reference",
    )
    monkeypatch.setenv("TIMO_BACKEND", "fast")
    with pytest.raises(
        ValueError, match=r"'fast'.*TIMO_BACKEND.*reference, cpp, triton_atomic, triton, cuda"
    ):
        timo.ops.temporal_median(X)


def test_one_error_with_every_reason():
    with pytest.raises(RuntimeError) as caught:
        timo.ops.temporal_median(X, backend="cuda")
    message = str(caught.value)
    assert "(1, 3, 4, 2, 8) float32 on cpu" in message
    for name in dispatch.BACKENDS:
        assert f"  {name}: " in message


def test_unknown_op():
    with pytest.raises(ValueError, match=r"op is 'mean'.*temporal_median"):
        timo.ops.explain("mean", X)


def test_unproven_kernels_stay_off(monkeypatch):
    """On a GPU whose capability has no committed parity result, auto keeps to the reference."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(dispatch, "unavailable", lambda backend: None)
    record = dispatch.Backend("triton", None, ("cuda",), (torch.float32,))
    op = dispatch.Op("op", None, {"triton": record, "reference": dispatch.Backend(
        "reference", None, ("cuda",), (torch.float32,))})  # fmt: skip
    request = dispatch.Request(torch.device("cuda"), torch.float32)
    assert op.choose(request).backend == "reference"
    assert "no committed parity result on sm_90" in op.choose(request).reasons["triton"]
    assert op.choose(request, "triton").backend == "triton"
    proven = {"sm_90": "benchmarks/results/h100/parity.json"}
    op.backends["triton"] = replace(record, proven=proven)
    choice = op.choose(request)
    assert choice.backend == "triton" and choice.evidence == proven["sm_90"]
    assert str(choice).startswith("op: triton (passed: benchmarks/results/h100/parity.json)")


def test_limits_of_a_record():
    record = dispatch.Backend(
        "triton", None, ("cuda",), (torch.float32,), max_dates=8, head_dims=(8, 128)
    )
    request = dispatch.Request(torch.device("cpu"), torch.float64, dates=9, head_dim=256)
    reasons = "; ".join(record.refusals(request))
    for words in ("not on cpu", "not float64", "at most 8 dates", "head dimensions 8 to 128"):
        assert words in reasons


def test_proven_records_have_evidence():
    """Every `proven` entry names a committed parity.json of that capability, and its backend."""
    for op in dispatch.OPS.values():
        for backend in op.backends.values():
            for capability, path in backend.proven.items():
                record = json.loads((REPOSITORY / path).read_text())
                assert record["environment"]["capability"] == capability, path
                name = op.name.removesuffix("_backward")
                assert backend.name in record["passed"].get(name, ()), f"{name}: {path}"


def test_autocast_does_not_round_inside_an_op():
    q, k, v = torch.randn(3, 1, 3, 20, 2, 16).unbind()
    arguments = (q, k, v, q[:, 0], k[:, 0], q[..., 0].relu())
    plain = timo.ops.gyroscope_attention(*arguments)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(timo.ops.gyroscope_attention(*arguments), plain)
