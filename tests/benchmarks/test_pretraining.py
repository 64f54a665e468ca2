"""Benchmarks of pretraining: what they compare with, what they count, what they refuse."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import pretraining
from benchmarks.dense_mae import DenseAutoencoder
from benchmarks.loss_curves import ALL, DENSE, OTHERS, distances
from benchmarks.pretraining import Bench, flops, markdown
from tests.models.build import DECODER, SMALL, build, series
from tests.models.oracle import assert_same
from timo.models.masking import draw_units


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("norm", ["none", "patch", "batch"])
def test_dense_form_equals_the_fast_path(norm, fused):
    frames, key = series(T=2, H=96, W=64), torch.arange(2)
    ids = draw_units(key, (2, 3, 2), 4)
    model = build("mae", pixel_norm=norm, stem_statistics="all").train()
    fast = model(frames, visible_ids=ids).loss
    exact = torch.autograd.grad(fast, tuple(model.parameters()))
    loss = DenseAutoencoder(model, fused)(frames, ids)
    assert_same(loss, fast.detach(), "loss")
    for got, want in zip(torch.autograd.grad(loss, tuple(model.parameters())), exact):
        assert_same(got, want)


def bench(monkeypatch) -> Bench:
    monkeypatch.setattr(pretraining, "SIZE", 64)
    monkeypatch.setattr(pretraining, "OPTIONS", SMALL | DECODER)
    return Bench("timo_tiny", 2, 2, torch.float32, torch.device("cpu"), False)


def test_counted_flops_are_those_that_run(monkeypatch):
    case = bench(monkeypatch)
    # The counter knows the products of attention written out, not those of fused kernels on CPUs.
    monkeypatch.setenv("TIMO_BACKEND", "reference")
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        case.calls[pretraining.FAST](case.host).backward()
    assert sum(flops(case.model, 2, case.keep).values()) * 2 == counter.get_total_flops()


def test_a_wrong_form_is_not_timed(monkeypatch):
    case = bench(monkeypatch)
    fast = case.calls[pretraining.FAST]
    rows = case.rows(0.0, 1e9)
    assert all(row["parity"] and row["speedup"] for row in rows)
    assert rows[2]["phases"].keys() == set(pretraining.PHASES)
    assert all(seconds > 0 for seconds in rows[2]["phases"].values())
    case.calls[pretraining.FAST] = lambda frames: fast(frames) * 1.001
    wrong = {row["name"]: row for row in case.rows(0.0, 1e9)}
    assert not wrong[pretraining.FAST]["parity"] and wrong[pretraining.FAST]["seconds"] is None
    assert wrong[pretraining.FUSED]["seconds"]
    assert "loss differs by 1.0e-03" in markdown({}, list(wrong.values()))


def test_a_wrong_compiled_form_is_not_timed(monkeypatch):
    case = bench(monkeypatch)
    fast = case.calls[pretraining.FAST]
    for factor, right in ((1.0, True), (1.5, False)):
        case.calls[pretraining.COMPILED] = lambda frames, by=factor: fast(frames) * by
        row = {row["name"]: row for row in case.rows(0.0, 1e9)}[pretraining.COMPILED]
        assert row["parity"] == bool(row["seconds"]) == right
    assert row["note"] == "loss differs by 5.0e-01"


def test_a_form_without_memory_leaves_the_others(monkeypatch):
    def full(frames):
        if torch.is_grad_enabled():  # not where losses are compared
            raise torch.OutOfMemoryError
        return dense(frames)

    case = bench(monkeypatch)
    dense = case.calls[pretraining.DENSE]
    case.calls[pretraining.DENSE] = full
    rows = {row["name"]: row for row in case.rows(0.0, 1e9)}
    assert rows[pretraining.DENSE]["seconds"] is None and rows[pretraining.DENSE]["parity"]
    assert rows[pretraining.FAST]["seconds"] and rows[pretraining.FAST]["speedup"] is None
    assert "| dense published | out of memory |" in markdown({}, list(rows.values()))


def test_distance_of_curves():
    curves = {
        form: [[level] * 50 for level in levels]
        for form, levels in {DENSE: (1.0, 0.9, 0.6), ALL: (1.01, 0.92, 0.6)}.items()
    }
    apart = distances(curves)
    assert apart == {ALL: pytest.approx([0.01, 0.02, 0]), OTHERS: pytest.approx([0.1, 0.4, 0.3])}
