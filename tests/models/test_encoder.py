"""The encoder against the dense oracle, validity, sizes, dates."""

import pytest
import torch

from tests.models.build import (
    assert_same_gradients,
    assert_same_statistics,
    build,
    clouds,
    oracle,
    series,
)
from tests.models.oracle import assert_same
from timo import create_model


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("T, H, W", [(1, 32, 32), (3, 32, 64), (4, 40, 36)])
def test_equals_the_dense_oracle(T, H, W, training):
    """Sides that are multiples of 4 but not of 32 show that padding changes nothing."""
    model = build().train(training)
    other = oracle(model, requires_grad=True)
    frames = series(T=T, H=H, W=W)
    maps, expected = model(frames), other.encoder(frames)
    for i, (got, exact) in enumerate(zip(maps, expected)):
        assert_same(got, exact, f"stage {i + 1}")
    cotangents = [torch.randn_like(x) for x in expected]
    torch.autograd.backward(maps, cotangents)
    torch.autograd.backward(expected, cotangents)
    if T > 1:  # one date has no difference from its median, so the gate's weight has no gradient
        assert_same_gradients(model, other)
    if training:
        assert_same_statistics(model, other)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("frames_only", [False, True])
def test_validity_equals_the_dense_oracle(frames_only, training):
    model = build().train(training)
    frames, valid = series(), clouds()
    if frames_only:
        given = torch.tensor([[True, False, True], [True, True, True]])
        valid = given[:, :, None, None].expand(valid.shape)
    else:
        given = valid
    other = oracle(model)
    expected = other.encoder(frames, valid)
    poisoned = frames.where(valid[:, :, None], torch.nan)
    for i, (got, exact) in enumerate(zip(model(poisoned, valid=given), expected)):
        assert_same(got, exact, f"stage {i + 1}")
    if training:
        assert_same_statistics(model, other)


def test_invalid_pixels_get_no_gradient_and_no_nan():
    model, valid = build().train(), clouds()
    frames = series().where(valid[:, :, None], torch.nan).requires_grad_()
    sum(x.square().sum() for x in model(frames, valid=valid)).backward()
    assert frames.grad.isfinite().all()
    assert (frames.grad.movedim(2, -1)[~valid] == 0).all()
    assert (frames.grad.movedim(2, -1)[valid] != 0).any()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("training", [False, True])
def test_padded_dates_change_nothing(training):
    model = build().train(training)
    frames, valid = series(), clouds()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    expected = model(frames, valid=valid)
    after = {k: v.clone() for k, v in model.state_dict().items()}
    model.load_state_dict(state)
    longer = torch.cat([frames, series(T=2, seed=5)], 1)
    padded = torch.cat([valid, torch.zeros_like(valid[:, :2])], 1)
    for got, exact in zip(model(longer, valid=padded), expected):
        assert_same(got[:, :3], exact)
        assert (got[:, 3:] == 0).all()
    for name, x in model.state_dict().items():
        assert torch.allclose(x, after[name], rtol=1e-12, atol=0), name


@pytest.mark.parametrize("H, W", [(50, 37), (33, 64), (5, 7), (1, 1)])
def test_any_size_is_padded_with_invalid_pixels(H, W):
    model, frames = build(), series(H=H, W=W)
    h, w = -(-H // 32) * 32, -(-W // 32) * 32
    larger = torch.full((2, 3, 3, h, w), 7.0, dtype=torch.float64)
    larger[..., :H, :W] = frames
    valid = torch.zeros(2, 3, h, w, dtype=torch.bool)
    valid[..., :H, :W] = True
    for i, (got, whole) in enumerate(zip(model(frames), model(larger, valid=valid))):
        stride = 4 * 2**i
        size = (-(-H // stride), -(-W // stride))
        assert got.shape == (2, 3, model.embed_dims[i], *size)
        assert torch.equal(got, whole[..., : size[0], : size[1]])


def test_samples_without_a_valid_pixel_are_zero_and_change_no_other():
    model, frames, valid = build().train(), series(), clouds()
    expected = model(frames[:1], valid=valid[:1])
    valid[1] = False
    for got, exact in zip(model(frames, valid=valid), expected):
        assert_same(got[:1], exact)
        assert (got[1] == 0).all()
    none = model(frames, valid=torch.zeros(2, 3, dtype=torch.bool))
    assert all((x == 0).all() for x in none)


def test_days_count_months_from_the_earliest_valid_date():
    model = build(temporal_position="days")
    frames = series()
    valid = torch.tensor([[False, True, True], [True, True, True]])
    dates = torch.tensor([[3, 110, 100], [20, 0, 90]])
    months = [[(d - first) / 30.4375 for d in row] for row, first in zip(dates.tolist(), (100, 0))]
    pixels = valid[:, :, None, None].expand(2, 3, 64, 32)
    expected = oracle(model).encoder(frames, pixels, months)
    for got, exact in zip(model(frames, dates, valid), expected):
        assert_same(got, exact)
    unlike = build()(frames, dates, valid)[0]
    assert not torch.allclose(unlike, expected[0])


def test_dates_do_not_matter_by_default():
    model, frames = build(), series()
    got = model(frames, torch.tensor([[0, 400, 500], [0, 1, 2]]))
    assert all(torch.equal(a, b) for a, b in zip(got, model(frames)))


def test_attention_kinds_can_be_chosen():
    kinds = ("joint", "gyroscope", "gyroscope", "joint")
    model = build(attention=kinds)
    frames = series()
    for got, exact in zip(model(frames), oracle(model).encoder(frames)):
        assert_same(got, exact)


def test_stochastic_depth_rises_linearly():
    model = build(drop_path_rate=0.4)
    rates = [m.rate for name, m in model.named_modules() if name.endswith("drop_path")]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])


def test_autocast_is_close_to_full_precision():
    model, frames, valid = build().float(), series().float(), clouds()
    full = model(frames, valid=valid)
    with torch.autocast("cpu", torch.bfloat16):
        half = model(frames, valid=valid)
    sum(x.float().square().mean() for x in half).backward()
    for a, b in zip(half, full):
        assert a.isfinite().all()
        assert (a.float() - b).abs().max() < 0.1 * b.abs().max()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(frames=torch.zeros(3, 3, 32, 32)), ["frames", "(3, 3, 32, 32)", "(B, T, C, H, W)"]),
        (dict(frames=torch.zeros(1, 2, 4, 32, 32)), ["frames", "4 bands", "in_chans=4"]),
        (dict(frames=torch.zeros(1, 0, 3, 32, 32)), ["frames", "T is 0"]),
        (dict(frames=torch.zeros(1, 2, 3, 32, 32, dtype=torch.uint8)), ["uint8", "scale"]),
        (dict(dates=torch.zeros(1, 3, dtype=torch.int64)), ["dates", "(1, 3)", "(1, 2)"]),
        (dict(dates=torch.zeros(1, 2)), ["dates", "float32", "int64"]),
        (dict(valid=torch.ones(1, 2)), ["valid", "float32", "bool"]),
        (dict(valid=torch.ones(1, 2, 32, dtype=torch.bool)), ["valid", "(B, T, H, W)"]),
    ],
)
def test_bad_inputs_are_named(changes, words):
    inputs = dict(frames=torch.zeros(1, 2, 3, 32, 32)) | changes
    with pytest.raises((TypeError, ValueError)) as error:
        build().float()(**inputs)
    assert all(word in str(error.value) for word in words), error.value


def test_days_without_dates_is_an_error():
    with pytest.raises(ValueError, match="dates is missing"):
        build(temporal_position="days")(series())


@pytest.mark.parametrize("with_validity", [False, True])
def test_checkpointed_blocks_change_memory_alone(with_validity):
    """Outputs, gradients and running statistics to the bit; less is kept for the backward."""
    kept, results = [], []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        options = dict(checkpoint_blocks=checkpointed, drop_path_rate=0.2)
        encoder = create_model("timo_tiny", in_chans=2, **options).train()
        frames = torch.randn(2, 3, 2, 64, 64)
        valid = torch.rand(2, 3, 64, 64) > 0.3 if with_validity else None
        held = [0]

        def count(tensor, held=held):
            held[0] += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
            maps = encoder(frames, valid=valid)
        kept.append(held[0])
        torch.manual_seed(1)
        cotangents = [torch.randn_like(x) for x in maps]
        torch.autograd.backward(maps, cotangents)
        grads = [p.grad for p in encoder.parameters()]
        results.append([*maps, *grads, *(b.clone() for b in encoder.buffers())])
    for plain, again in zip(*results):
        assert torch.equal(plain, again) if plain is not None else again is None
    assert kept[1] < 0.5 * kept[0]
