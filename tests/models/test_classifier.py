"""Classification: pooling over valid tokens, per series and per frame."""

import pytest
import torch

from tests.models.build import build, clouds, oracle, series
from tests.models.oracle import assert_same


def model_of(**options):
    return build("classification", num_classes=5, **options)


@pytest.mark.parametrize("per_frame", [False, True])
@pytest.mark.parametrize("kind", ["all", "frames", "pixels"])
def test_logits_are_the_head_of_the_mean_over_valid_tokens(kind, per_frame):
    model, frames = model_of(per_frame=per_frame), series()
    frames_valid = torch.tensor([[True, False, True], [True, True, True]])
    given, pixels = {
        "all": (None, torch.ones(2, 3, 64, 32, dtype=torch.bool)),
        "frames": (frames_valid, frames_valid[:, :, None, None].expand(2, 3, 64, 32)),
        "pixels": (clouds(), clouds()),
    }[kind]
    last = oracle(model).encoder(frames, pixels)[-1].movedim(2, -1)  # [B, T, h, w, D]
    tokens = pixels.unfold(2, 32, 32).unfold(3, 32, 32).flatten(4).any(4).double()
    dims = (2, 3) if per_frame else (1, 2, 3)
    mean = last.sum(dims) / tokens.sum(dims).clamp_min(1)[..., None]
    assert_same(model(frames, valid=given), mean @ model.head.weight.T + model.head.bias)


@pytest.mark.parametrize("per_frame", [False, True])
def test_nothing_valid_gives_the_bias(per_frame):
    model = model_of(per_frame=per_frame)
    valid = torch.tensor([[True, True, False], [False, False, False]])
    logits = model(series(), valid=valid)
    assert torch.equal(logits[1], model.head.bias.expand(logits[1].shape))
    if per_frame:
        assert logits.shape == (2, 3, 5)
        assert torch.equal(logits[0, 2], model.head.bias)


def test_positions_outside_the_frame_are_not_averaged():
    model, frames = model_of(), series(H=40, W=33)
    last = model.encoder(frames)[-1]
    assert last.shape[-2:] == (2, 2)
    mean = last.mean((1, 3, 4))
    assert_same(model(frames), mean @ model.head.weight.T + model.head.bias)


def test_gradients_reach_every_parameter():
    model = model_of().train()
    (model(series(), valid=clouds()) * torch.randn(2, 5)).sum().backward()
    assert all(p.grad is not None and (p.grad != 0).any() for p in model.parameters())


def test_bad_inputs_are_named():
    with pytest.raises(ValueError, match="frames has 2 bands"):
        model_of()(series(C=2))
