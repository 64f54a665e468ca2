"""The masked autoencoder against the dense oracle: mask the image, stem on all of it, pick."""

import pytest
import torch

import timo
from tests.models.build import (
    DECODER,
    assert_same_gradients,
    assert_same_statistics,
    build,
    clouds,
    oracle,
    series,
)
from tests.models.oracle import assert_same, relative_error
from timo.models.masking import visible_count


def visible(ids, units):
    return torch.zeros(len(ids), units, dtype=torch.bool).scatter(1, ids, True)


def dense(model, frames, ids, valid=None, months=None, requires_grad=False):
    """The oracle and its loss, prediction of masked units, latents."""
    other = oracle(model, requires_grad)
    units = frames.shape[1] * (frames.shape[3] // 32) * (frames.shape[4] // 32)
    heads, depth = DECODER["decoder_num_heads"], DECODER["decoder_depth"]
    seen = visible(ids, units)
    loss, pred, latent = other.mae(frames, seen, heads, depth, model.pixel_norm, valid, months)
    masked = torch.stack([p[~s] for p, s in zip(pred, seen)])
    return other, loss, masked, latent


IDS = torch.tensor([[0, 3, 7, 8], [2, 4, 5, 11]])  # of 12 units: 3 dates of 2×2


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("norm", ["none", "patch", "batch"])
def test_equals_the_dense_oracle(norm, training):
    model = build("mae", pixel_norm=norm, stem_statistics="all").train(training)
    frames = series(W=64)
    other, loss, pred, latent = dense(model, frames, IDS, requires_grad=True)
    out = model(frames, visible_ids=IDS)
    assert torch.equal(out.visible_ids, IDS)
    assert torch.equal(visible(out.masked_ids, 12), ~visible(IDS, 12))
    assert (out.masked_ids.diff() > 0).all()
    assert_same(out.latent, latent, "latent")
    assert_same(out.pred, pred, "pred")
    assert_same(out.loss, loss, "loss")
    out.loss.backward()
    loss.backward()
    assert_same_gradients(model, other)
    if training:
        assert_same_statistics(model, other)


@pytest.mark.parametrize("training", [False, True])
def test_validity_equals_the_dense_oracle(training):
    model = build("mae", pixel_norm="patch", stem_statistics="all").train(training)
    frames, valid = series(W=64), clouds(W=64)
    valid[0, 2, :32, :32] = False  # a unit, masked, without a valid pixel
    other, loss, pred, latent = dense(model, frames, IDS, valid, requires_grad=True)
    poisoned = frames.where(valid[:, :, None], torch.nan)
    out = model(poisoned, visible_ids=IDS, valid=valid)
    assert_same(out.latent, latent, "latent")
    assert_same(out.pred, pred, "pred")
    assert_same(out.loss, loss, "loss")
    out.loss.backward()
    loss.backward()
    assert_same_gradients(model, other)
    if training:
        assert_same_statistics(model, other)


def test_visible_statistics_are_those_of_visible_valid_positions():
    model = build("mae").train()
    frames, valid = series(W=64), clouds(W=64)
    model(frames, visible_ids=IDS, valid=valid)
    kept = visible(IDS, 12).view(2, 3, 2, 2).repeat_interleave(32, 2).repeat_interleave(32, 3)
    image = frames.where((kept & valid)[:, :, None], torch.zeros_like(frames))
    x = torch.nn.functional.conv2d(
        image.flatten(0, 1), model.encoder.stem.conv.weight, stride=2, padding=3
    )
    entries = (kept & valid).unfold(2, 2, 2).unfold(3, 2, 2).flatten(4).any(4).flatten(0, 1)
    entries = x.movedim(1, -1)[entries]
    fresh = build("mae").encoder.stem.bn
    stem = model.encoder.stem.bn
    assert_same(stem.running_mean, 0.9 * fresh.running_mean + 0.1 * entries.mean(0))
    assert_same(stem.running_var, 0.9 * fresh.running_var + 0.1 * entries.var(0))


def test_days_equal_the_dense_oracle():
    model = build("mae", temporal_position="days")
    frames, dates = series(W=64), torch.tensor([[60, 0, 10], [5, 6, 90]])
    months = [[(d - min(row)) / 30.4375 for d in row] for row in dates.tolist()]
    _, loss, pred, _ = dense(model, frames, IDS, months=months)
    out = model(frames, visible_ids=IDS, dates=dates)
    assert_same(out.pred, pred, "pred")
    assert_same(out.loss, loss, "loss")


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16])
@pytest.mark.parametrize("statistics", ["visible", "all"])
def test_raw_integers_equal_physical_values(dtype, statistics):
    model = build("mae", stem_statistics=statistics).train()
    raw = torch.randint(0, 250, (2, 3, 3, 50, 64), dtype=torch.uint8).to(dtype)
    scale, offset = torch.tensor([0.1, 0.02, 0.5]), torch.tensor([-1.0, 0.0, 3.0])
    values = raw.double() * scale[:, None, None].double() + offset[:, None, None].double()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    expected = model(values, visible_ids=IDS)
    model.load_state_dict(state)
    out = model(raw, visible_ids=IDS, scale=scale, offset=offset)
    assert_same(out.pred, expected.pred)
    assert_same(out.loss, expected.loss)


def test_any_size_is_padded_with_invalid_pixels():
    model, frames = build("mae"), series(H=50, W=37)
    larger = torch.full((2, 3, 3, 64, 64), 7.0, dtype=torch.float64)
    larger[..., :50, :37] = frames
    valid = torch.zeros(2, 3, 64, 64, dtype=torch.bool)
    valid[..., :50, :37] = True
    out = model(frames, visible_ids=IDS)
    expected = model(larger, visible_ids=IDS, valid=valid)
    assert_same(out.pred, expected.pred)
    assert_same(out.loss, expected.loss)
    assert_same(out.latent, expected.latent)


@pytest.mark.parametrize("training", [False, True])
def test_padded_dates_change_nothing(training):
    model = build("mae").train(training)
    frames, valid = series(W=64), clouds(W=64)
    out = model(frames, visible_ids=IDS, valid=valid)
    longer = torch.cat([frames, torch.full_like(frames[:, :2], torch.nan)], 1)
    padded = model(
        longer, visible_ids=IDS, valid=torch.cat([valid, torch.zeros_like(valid[:, :2])], 1)
    )
    assert_same(padded.pred[:, :8], out.pred)
    assert_same(padded.loss, out.loss)


def test_samples_without_a_valid_pixel_are_finite_and_change_no_loss():
    model = build("mae").train()
    frames = series(W=64)
    valid = torch.tensor([[True, True, True], [False, False, False]])
    expected = model(frames[:1], visible_ids=IDS[:1])
    out = model(frames, visible_ids=IDS, valid=valid)
    assert_same(out.loss, expected.loss)
    assert_same(out.pred[:1], expected.pred)
    none = model(frames, valid=torch.zeros_like(valid))
    assert none.loss == 0 and none.visible_ids.shape == (2, 1)
    none.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    for x in (out.pred, out.latent, none.pred, none.latent):
        assert x.isfinite().all()


@pytest.mark.parametrize("ratio, kept", [(0.75, 3), (0.9, 1), (0.01, 11), (0.99, 1), (0.5, 6)])
def test_as_many_units_stay_visible_as_specified(ratio, kept):
    out = build("mae")(series(W=64), ratio)
    assert out.visible_ids.shape == (2, kept) and out.masked_ids.shape == (2, 12 - kept)


def test_the_count_is_not_lost_to_rounding():
    """10 · (1 − 0.9) is 0.99…98 in floating point; 100 · (1 - 0.93) is 6.99…95."""
    for units, ratio, kept in ((10, 0.9, 1), (100, 0.93, 7), (147, 0.75, 36), (2, 0.9, 1)):
        assert visible_count(units, ratio) == kept


def test_invalid_units_are_never_drawn():
    valid = torch.ones(2, 3, 64, 64, dtype=torch.bool)
    valid[0, 0] = valid[1, 1, 32:] = valid[1, 2, :, :32] = False
    usable = torch.ones(2, 12, dtype=torch.bool)
    usable[0, :4] = usable[1, 6:8] = usable[1, [8, 10]] = False
    model, seen = build("mae"), torch.zeros(2, 12, dtype=torch.bool)
    for seed in range(10):
        out = model(series(W=64), 0.5, valid=valid, generator=torch.Generator().manual_seed(seed))
        assert out.visible_ids.shape == (2, 4) and (out.visible_ids.diff() > 0).all()
        seen |= visible(out.visible_ids, 12)
    assert torch.equal(seen, usable)


def test_the_draw_is_repeatable():
    model, frames, generator = build("mae"), series(W=64), torch.Generator()
    first, second = (
        model(frames, generator=generator.manual_seed(seed)).visible_ids for seed in (3, 4)
    )
    assert not torch.equal(first, second)
    assert torch.equal(first, model(frames, generator=generator.manual_seed(3)).visible_ids)


def test_the_published_defaults():
    with torch.device("meta"):
        model = timo.create_model("timo_tiny", "mae")
    assert model.pixel_norm == "none" and model.stem_statistics == "visible"
    assert model.decoder.embed.out_features == 512
    assert len(model.decoder.blocks) == 8 and model.decoder.blocks[0].attn.num_heads == 16
    assert model.decoder.pred.out_features == 3 * 32 * 32


def test_checkpointed_blocks_change_memory_alone():
    """Of the decoder too, whose blocks hold most of it here."""
    kept, results = [], []
    for checkpointed in (False, True):
        model = build("mae", decoder_depth=8, checkpoint_blocks=checkpointed).train()
        held = [0]

        def count(tensor, held=held):
            held[0] += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
            out = model(series(H=96, W=96), visible_ids=IDS)
        kept.append(held[0])
        out.loss.backward()
        results.append([out.loss, *(p.grad for p in model.parameters()), *model.buffers()])
    assert all(torch.equal(plain, again) for plain, again in zip(*results))
    assert kept[1] < 0.6 * kept[0]


def test_autocast_is_close_to_full_precision():
    model, frames = build("mae").float().train(), series(W=64).float()
    full = model(frames, visible_ids=IDS)
    with torch.autocast("cpu", torch.bfloat16):
        half = model(frames, visible_ids=IDS)
    half.loss.backward()
    assert relative_error(half.pred.float(), full.pred.double()) < 0.1
    assert relative_error(half.loss.float(), full.loss.double()) < 0.1
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(frames=torch.zeros(1, 1, 3, 64, 64, dtype=torch.uint8)), ["uint8", "scale=1 / 255"]),
        (dict(frames=torch.zeros(1, 1, 3, 64, 64, dtype=torch.int64)), ["int64", "uint16"]),
        (dict(frames=torch.zeros(1, 1, 3, 32, 32)), ["single unit", "more dates"]),
        (dict(mask_ratio=1.0), ["mask_ratio is 1.0", "between 0 and 1"]),
        (dict(visible_ids=torch.zeros(1, 2)), ["visible_ids", "float32", "int64"]),
        (dict(visible_ids=torch.zeros(2, 2, dtype=torch.int64)), ["visible_ids", "(2, 2)"]),
        (dict(visible_ids=torch.arange(4)[None]), ["visible_ids", "4 units", "masked"]),
        (dict(visible_ids=torch.tensor([[2, 1]])), ["visible_ids", "ascend"]),
        (dict(visible_ids=torch.tensor([[2, 4]])), ["visible_ids", "[0, 4)"]),
        (dict(scale=torch.ones(2)), ["scale", "(2,)", "(3,)"]),
    ],
)
def test_bad_inputs_are_named(changes, words):
    inputs = dict(frames=torch.zeros(1, 1, 3, 64, 64)) | changes
    with pytest.raises((TypeError, ValueError)) as error:
        build("mae").float()(**inputs)
    assert all(word in str(error.value) for word in words), error.value
