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


def test_explain_takes_arguments_by_name():
    """The op's own: one that it does not know, or that is missing, is an error."""
    frames, ids = torch.zeros(1, 2, 3, 64, 64), torch.tensor([[0, 5]])
    calls = {
        "temporal_median": {"x": X},
        "median_deviation": {"q": X, "weight": X[0, 0, 0, 0]},
        "temporal_maximum": {"x": X, "valid": None, "factor": 2},
        "gyroscope_attention": {
            **dict.fromkeys("qkv", X), "q_median": X[:, 0], "k_median": X[:, 0],
            "gate": X[..., 0], "valid": None, "scale": 0.5,
        },
        "gather_units": {"frames": frames, "visible_ids": ids, "scale": 0.5, "unit": 32},
        "scatter_units": {
            "tokens": X[0, 0, :1], "visible_ids": ids, "mask_token": torch.zeros(8),
            "position": torch.zeros(9, 8),
        },
        "masked_pixel_loss": {
            "pred": torch.zeros(1, 2, 3 * 32 * 32), "frames": frames, "masked_ids": ids,
            "norm": "patch",
        },
    }  # fmt: skip
    forward = {name for name in dispatch.OPS if not name.endswith("_backward")}
    assert set(calls) == forward
    for name, arguments in calls.items():
        getattr(timo.ops, name)(**arguments)
        assert timo.ops.explain(name, **arguments).backend in ("cpp", "reference")


def test_a_module_that_does_not_load_says_why(monkeypatch):
    def broken(name):
        raise ImportError("libgomp.so.1: cannot open shared object file")

    monkeypatch.setattr(dispatch.importlib, "import_module", broken)
    assert dispatch.load_compiled() == (
        "timo._C does not load: libgomp.so.1: cannot open shared object file"
    )


def test_environment_variable_and_argument(monkeypatch):
    monkeypatch.setenv("TIMO_BACKEND", "reference")
    assert timo.ops.explain("temporal_median", X).backend == "reference"
    assert timo.ops.explain("temporal_median", X, backend="cpp,reference").backend in (
        "cpp",
        "reference",
    )
    monkeypatch.setenv("TIMO_BACKEND", "cpp, reference")
    assert timo.ops.explain("temporal_median", X).backend in ("cpp", "reference")
    monkeypatch.setenv("TIMO_BACKEND", "")
    assert timo.ops.explain("temporal_median", X).backend in ("cpp", "reference")
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
    reference = dispatch.Backend("reference", None, ("cuda",), (torch.float32,))
    op = dispatch.Op("op", None, {"reference": reference, "triton": record})
    request = dispatch.Request(torch.device("cuda"), torch.float32)
    assert op.choose(request).backend == "reference"
    assert "no committed parity result on sm_90" in op.choose(request).reasons["triton"]
    assert op.choose(request, "triton").backend == "triton"
    proven = {"sm_90": "benchmarks/results/h100/parity.json"}
    op.backends["triton"] = replace(record, proven=proven)
    choice = op.choose(request)
    assert choice.backend == "triton" and choice.evidence == proven["sm_90"]
    assert str(choice).startswith("op: triton (passed: benchmarks/results/h100/parity.json)")


def test_the_last_record_is_preferred(monkeypatch):
    """Of a GPU's kernels that of Triton where it was measured to be the faster one."""
    monkeypatch.delenv("TIMO_BACKEND", raising=False)
    monkeypatch.setattr(dispatch, "unavailable", lambda backend: None)
    names = dispatch.CPP, dispatch.REFERENCE
    records = {b: dispatch.Backend(b, None, ("cpu",), (torch.float32,)) for b in names}
    request = dispatch.Request(torch.device("cpu"), torch.float32)
    for order in (names, names[::-1]):
        op = dispatch.Op("op", None, {name: records[name] for name in order})
        assert op.choose(request).backend == order[-1]
        assert op.choose(request, "cpp,reference").backend == dispatch.CPP
    for name in ("masked_pixel_loss", "masked_pixel_loss_backward"):
        assert list(dispatch.OPS[name].backends)[-1] == dispatch.TRITON


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


def test_autocast_does_not_round_inside_second_derivatives():
    x = torch.randn(1, 3, 20, 2, 16)

    def second():
        leaf = x.clone().requires_grad_()
        median, direction = leaf[:, 0] * 0.5, leaf[0, 0, 0, 0]
        out = timo.ops.gyroscope_attention(
            leaf, leaf, leaf, median, median, leaf[..., 0].square()
        ).square()
        out = out.sum() + timo.ops.median_deviation(leaf, direction)[2].square().sum()
        out = out + timo.ops.temporal_median(leaf)[0].square().sum()
        (first,) = torch.autograd.grad(out, leaf, create_graph=True)
        return torch.autograd.grad(first.square().sum(), leaf)[0]

    plain = second()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(second(), plain)
