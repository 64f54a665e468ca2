"""The pretraining step: one graph, compiled once, and nothing in it that waits for the device."""

from types import SimpleNamespace

import pytest
import torch

import timo
from tests.tasks.test_tasks import SMALL, UNITS
from timo.models import mae
from timo.models.masking import STRATEGIES
from timo.tasks import PretrainingTask
from timo.tasks.pretraining import reconstruct

OPTIONS = SMALL | {"decoder_embed_dim": 16, "decoder_num_heads": 2, "decoder_depth": 1}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()


def batch(step: int, valid: torch.Tensor | None = None) -> dict:
    generator = torch.Generator().manual_seed(step)
    return {
        "image": torch.randint(0, 255, (2, 2, 2, 64, 96), generator=generator).byte(),
        "key": torch.randint(2**63 - 1, (2,), generator=generator),
        "dates": torch.arange(2).expand(2, 2),
        "valid": valid,
        "units": 12 if valid is None else 8,
    }


def clouded() -> torch.Tensor:
    valid = torch.ones(2, 2, 64, 96, dtype=torch.bool)
    valid[0, 1, :, :64] = False
    return valid


def train(compile, valid, steps: int = 4) -> tuple[list[float], list[torch.Tensor]]:
    """Losses and final weights of some steps of fused AdamW."""
    torch.manual_seed(0)
    task = PretrainingTask(
        ("x", "y"), **UNITS, model="timo_tiny", model_options=OPTIONS, masking="mixture"
    ).train()
    run = torch.compile(reconstruct, fullgraph=True, backend=compile) if compile else reconstruct
    optimizer = torch.optim.AdamW(task.parameters(), 1e-3, fused=True)
    losses = []
    for step in range(steps):
        loss = task._run(run, batch(step, valid)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, [p.detach() for p in task.parameters()]


@pytest.mark.parametrize("valid", [None, clouded()], ids=["all", "clouds"])
def test_compiles_whole_and_once(valid):
    with torch._dynamo.config.patch(error_on_recompile=True):
        losses, weights = train("aot_eager", valid)
    expected, exact = train(None, valid)
    assert losses == pytest.approx(expected, rel=1e-5) and losses[0] != losses[1]
    for got, want in zip(weights, exact):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("valid", [None, clouded()], ids=["all", "clouds"])
@pytest.mark.parametrize("masking", STRATEGIES)
def test_never_waits_for_the_device(masking, valid, monkeypatch):
    """Tensors without values cannot be read: `.item()` or boolean indexing would raise."""
    monkeypatch.setattr(mae, "compute_dtype", lambda weight: weight.dtype)  # no autocast there
    with torch.device("meta"):
        model = timo.create_model("timo_tiny", "mae", in_chans=2, **OPTIONS)
        frames = torch.empty((2, 2, 2, 64, 96), dtype=torch.uint8)
        key, dates = torch.empty(2, dtype=torch.int64), torch.empty((2, 2), dtype=torch.int64)
        usable = None if valid is None else torch.empty(valid.shape, dtype=torch.bool)
        units = torch.empty(2), torch.empty(2)
        result = reconstruct(model, frames, key, dates, usable, *units, 3, masking)
        result.loss.backward()
        assert result.visible_ids.is_meta and result.visible_ids.shape == (2, 3)
        assert all(p.grad is not None for p in model.parameters())


def pretraining() -> PretrainingTask:
    return PretrainingTask(("x", "y"), **UNITS, model="timo_tiny", model_options=OPTIONS)


def test_biases_norms_and_the_mask_token_are_not_decayed(monkeypatch):
    monkeypatch.setattr(PretrainingTask, "trainer", SimpleNamespace(estimated_stepping_batches=10))
    task = pretraining()
    decayed, kept = task.configure_optimizers()["optimizer"].param_groups
    assert decayed["weight_decay"] == 0.05 and kept["weight_decay"] == 0
    names = {parameter: name for name, parameter in task.named_parameters()}
    assert all(names[p].endswith("weight") and "norm" not in names[p] for p in decayed["params"])
    assert "model.decoder.mask_token" in {names[p] for p in kept["params"]}
    assert len(names) == len(decayed["params"]) + len(kept["params"])


def test_norms_that_know_no_validity_are_refused():
    """What Lightning's Trainer(sync_batchnorm=True) has done by then."""
    task = torch.nn.SyncBatchNorm.convert_sync_batchnorm(pretraining())
    with pytest.raises(ValueError, match="set task.model_options.sync_batchnorm"):
        task.on_fit_start()


def test_options_are_checked():
    for options, words in (({"masking": "tube"}, "masking is 'tube'"),
                           ({"mask_ratio": 1.5}, "mask_ratio is 1.5")):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            PretrainingTask(
                ("x", "y"), **UNITS, model="timo_tiny", model_options=OPTIONS, **options
            )
