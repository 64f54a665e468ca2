"""Segmentation: the head against a plain one, temporal pooling, validity, sizes."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.models.build import build, clouds, series
from tests.models.oracle import assert_same
from tests.tolerance import assert_close
from timo.models.upernet import PyramidConv2d, pool, resize


def model_of(**options):
    return build("segmentation", num_classes=4, **options)


def plain_head(model, maps):
    """UPerNet by torch's own modules on (M, C, h, w) maps, in the model's mode."""

    def unit(layer, x):
        bn = nn.BatchNorm2d(layer.bn.num_features).double().train(model.training)
        bn.load_state_dict(layer.bn.state_dict())
        conv = layer.conv
        return F.relu(bn(F.conv2d(x, conv.weight, conv.bias, padding=conv.padding)))

    def resize(x, like):
        return F.interpolate(x, like.shape[2:], mode="bilinear", align_corners=False)

    net, last = model.upernet, maps[3]
    pools = [nn.AdaptiveAvgPool2d(s)(last) for s in (1, 2, 3, 6)]
    pools = [resize(unit(layer, x), last) for layer, x in zip(net.pyramid, pools)]
    p4 = unit(net.bottleneck, torch.cat([last, *pools], 1))
    p3 = unit(net.laterals[2], maps[2]) + resize(p4, maps[2])
    p2 = unit(net.laterals[1], maps[1]) + resize(p3, maps[1])
    p1 = unit(net.laterals[0], maps[0]) + resize(p2, maps[0])
    levels = [unit(layer, x) for layer, x in zip(net.smooth, (p1, p2, p3))] + [p4]
    x = unit(net.fuse, torch.cat([resize(x, p1) for x in levels], 1))
    return F.interpolate(x, scale_factor=4, mode="bilinear", align_corners=False)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("pool", ["decoder", "encoder", "per_frame"])
@pytest.mark.parametrize("H, W", [(64, 32), (32, 96)])
def test_equals_a_plain_head(H, W, pool, training):
    options = dict(per_frame=True) if pool == "per_frame" else dict(temporal_pool=pool)
    model = model_of(**options).train(training)
    model.dropout.eval()
    frames = series(H=H, W=W)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    maps = model.encoder(frames)
    model.load_state_dict(state)
    if pool == "encoder":
        x = plain_head(model, [m.max(1).values for m in maps])
    else:
        x = plain_head(model, [m.flatten(0, 1) for m in maps])
        x = x.unflatten(0, (2, 3)).max(1).values if pool == "decoder" else x
    expected = model.classifier(x)
    expected = expected.unflatten(0, (2, 3)) if pool == "per_frame" else expected
    got = model(frames)
    assert got.shape == ((2, 3, 4, H, W) if pool == "per_frame" else (2, 4, H, W))
    assert_same(got, expected)


class SideBySide(nn.Conv2d):
    """`PyramidConv2d` as it is defined."""

    def forward(self, levels):
        return super().forward(torch.cat([resize(x, levels[0]) for x in levels], 1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "sizes",
    [
        [(16, 24), (8, 12), (4, 6), (2, 3)],
        [(9, 7), (5, 4), (3, 2), (1, 1)],
        [(1, 25), (1, 12)],
        [(3, 4), (3, 4), (2, 1)],
    ],
)
def test_convolution_of_levels_not_enlarged(sizes, dtype):
    torch.manual_seed(0)
    channels = [12, 9, 17, 15][: len(sizes)]
    state = nn.Conv2d(sum(channels), 6, 3, padding=1).to(dtype).state_dict()
    levels = [torch.randn(2, c, h, w).to(dtype) for c, (h, w) in zip(channels, sizes)]
    cotangent = torch.randn(2, 6, *sizes[0]).to(dtype)

    def run(layer, dtype):
        layer = layer(sum(channels), 6, 3, padding=1).to(dtype)
        layer.load_state_dict(state)
        inputs = [x.to(dtype).requires_grad_() for x in levels]
        out = layer(inputs)
        return out, *torch.autograd.grad(out, [*inputs, *layer.parameters()], cotangent.to(dtype))

    exact, plain = run(SideBySide, torch.float64), run(SideBySide, dtype)
    for got, want, by_definition in zip(run(PyramidConv2d, dtype), exact, plain):
        assert got.dtype == dtype
        if dtype == torch.float64:
            assert_same(got, want)
        else:
            assert_close(got, want, by_definition)


@pytest.mark.parametrize("pool", ["decoder", "encoder", "per_frame"])
def test_the_linear_head_weighs_the_pyramid(pool):
    options = dict(per_frame=True) if pool == "per_frame" else dict(temporal_pool=pool)
    model = model_of(head="linear", **options)
    assert {n for n, _ in model.named_children()} == {"encoder", "dropout", "classifier"}
    frames = series()
    finest = (16, 8)
    maps = [
        F.interpolate(x.flatten(0, 1), finest, mode="bilinear", align_corners=False)
        for x in (x.max(1, keepdim=True).values if pool == "encoder" else x
                  for x in model.encoder(frames))
    ]  # fmt: skip
    x = F.interpolate(torch.cat(maps, 1), (64, 32), mode="bilinear", align_corners=False)
    if pool == "decoder":
        x = x.unflatten(0, (2, 3)).max(1).values
    weight = model.classifier.weight[:, :, 0, 0]
    expected = torch.einsum("kc,mchw->mkhw", weight, x) + model.classifier.bias[:, None, None]
    assert_same(model(frames), expected.unflatten(0, (2, 3)) if pool == "per_frame" else expected)


def test_pyramid_pooling_is_over_valid_positions():
    x = torch.randn(2, 3, 4, 6, dtype=torch.float64)
    valid = torch.rand(2, 4, 6) > 0.5
    valid[0, :2, :3] = False
    pooled, usable = pool(x.where(valid[:, None], torch.zeros_like(x)), valid, 2)
    for b in range(2):
        for i in range(2):
            for j in range(2):
                cell = (b, slice(None), slice(2 * i, 2 * i + 2), slice(3 * j, 3 * j + 3))
                inside = valid[b, cell[2], cell[3]]
                assert usable[b, i, j] == inside.any()
                if inside.any():
                    assert_same(pooled[b, :, i, j], x[cell][:, inside].mean(1))
    assert not usable[0, 0, 0] and (pooled[0, :, 0, 0] == 0).all()
    assert pool(x, None, 2)[1] is None


@pytest.mark.parametrize("options", [{}, {"per_frame": True}, {"temporal_pool": "encoder"}])
@pytest.mark.parametrize("H, W", [(50, 37), (5, 7)])
def test_frames_of_any_size_are_those_of_a_padded_raster(H, W, options):
    """Maps of all strides cover the same pixels: none is stretched to a part of them."""
    model, frames = model_of(**options), series(H=H, W=W)
    logits = model(frames)
    assert logits.shape[-2:] == (H, W)
    padding = (0, -W % 32, 0, -H % 32)
    valid = F.pad(torch.ones(2, 3, H, W, dtype=torch.bool), padding)
    padded = model(F.pad(frames, padding, value=torch.nan), valid=valid)
    assert_same(logits, padded[..., :H, :W])


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("pool", ["decoder", "encoder", "per_frame"])
def test_padded_dates_change_nothing(pool, training):
    options = dict(per_frame=True) if pool == "per_frame" else dict(temporal_pool=pool)
    model = model_of(**options).train(training)
    model.dropout.eval()
    frames, valid = series(), clouds()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    expected = model(frames, valid=valid)
    after = {k: v.clone() for k, v in model.state_dict().items()}
    model.load_state_dict(state)
    longer = torch.cat([frames, torch.full_like(frames[:, :2], torch.nan)], 1)
    got = model(longer, valid=torch.cat([valid, torch.zeros_like(valid[:, :2])], 1))
    assert_same(got[:, :3] if pool == "per_frame" else got, expected)
    assert got.isfinite().all()
    for name, x in model.state_dict().items():
        assert torch.allclose(x, after[name], rtol=1e-10, atol=1e-12), name


@pytest.mark.parametrize("pool", ["decoder", "encoder"])
def test_the_maximum_is_over_valid_dates(pool):
    """With one valid date, the series is that frame alone."""
    model, frames = model_of(temporal_pool=pool), series()
    valid = torch.tensor([[False, True, False], [False, True, False]])
    one = model(frames[:, 1:2], valid=valid[:, 1:2])
    index = model.encoder.time
    model.encoder.time = lambda *_: torch.tensor([0, 0, 0])
    assert_same(model(frames, valid=valid), one)
    model.encoder.time = index
    pixels = valid[:, :, None, None].expand(2, 3, 64, 32).clone()
    assert_same(model(frames, valid=pixels), model(frames, valid=valid))


@pytest.mark.parametrize("pool", ["decoder", "encoder"])
def test_tokens_without_a_valid_date_give_the_bias(pool):
    model, frames = model_of(temporal_pool=pool).train(), series()
    valid = torch.ones(2, 3, 64, 32, dtype=torch.bool)
    valid[0] = False
    valid[1, :, :32] = False
    logits = model(frames, valid=valid)
    assert logits.isfinite().all()
    bias = model.classifier.bias[:, None, None]
    if pool == "decoder":  # the head of pooled maps sees their surroundings
        assert torch.equal(logits[0], bias.expand(4, 64, 32))
        assert torch.equal(logits[1, :, :32], bias.expand(4, 32, 32))
    assert not torch.allclose(logits[1, :, 32:], bias)
    logits.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_gradients_reach_every_parameter():
    model = model_of().train()
    logits = model(series(), valid=clouds())
    (logits * torch.randn_like(logits)).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    # A bias in front of a batch norm has gradient 0 up to rounding; everything else must move.
    for name, p in model.named_parameters():
        if not name.endswith("conv.bias"):
            assert (p.grad != 0).any(), name


def test_autocast():
    model = model_of().float()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(series().float(), valid=clouds())
    assert logits.isfinite().all()


def test_channels_are_dropped_in_training_only():
    model = model_of(temporal_pool="encoder")
    assert model.dropout.p == 0.1 and isinstance(model.dropout, nn.Dropout2d)
    assert torch.equal(model(series()), model(series()))
