"""Models by name: parameter counts, options, errors."""

import json

import pytest
import torch

import timo

MILLIONS = {
    "timo_tiny": (5.26, None),
    "timo_base": (90.20, 117.52),
    "timo_large": (296.90, 324.49),
    "timo_huge": (672.48, 700.33),
}


def count(*args, **options):
    with torch.device("meta"):
        return sum(p.numel() for p in timo.create_model(*args, **options).parameters())


@pytest.mark.parametrize("name", MILLIONS)
def test_parameter_counts(name):
    """As model.md §1 lists them, in millions to two places."""
    encoder, mae = MILLIONS[name]
    assert round(count(name) / 1e6, 2) == encoder
    if mae:
        assert round(count(name, "mae") / 1e6, 2) == mae
    last = {"timo_tiny": 256, "timo_base": 1024, "timo_large": 1536, "timo_huge": 2048}[name]
    assert count(name, "classification", num_classes=7) == count(name) + 7 * last + 7
    assert count(name, in_chans=10) == count(name) + 7 * 49 * {
        "timo_tiny": 64, "timo_base": 128, "timo_large": 384, "timo_huge": 512
    }[name]  # fmt: skip


def test_attention_kinds_by_stage():
    with torch.device("meta"):
        encoder, mae = timo.create_model("timo_tiny"), timo.create_model("timo_tiny", "mae")
    for model, kinds in ((encoder, "ggjj"), (mae.encoder, "jjjj")):
        for stage, kind in zip((model.stage1, model.stage2, model.stage3, model.stage4), kinds):
            for block in stage.blocks:
                gated = isinstance(block.attn, timo.layers.GyroscopeAttention)
                assert gated == (kind == "g")


@pytest.mark.parametrize(
    "task, rate", [("encoder", 0), ("mae", 0), ("segmentation", 0.2), ("classification", 0.1)]
)
def test_default_stochastic_depth(task, rate):
    with torch.device("meta"):
        model = timo.create_model("timo_tiny", task, num_classes=2)
    rates = [m.rate for m in model.modules() if isinstance(m, timo.layers.DropPath)]
    assert max(rates) == pytest.approx(rate)


def test_initial_values():
    torch.manual_seed(0)
    model = timo.create_model("timo_tiny", "mae", decoder_depth=1)
    blocks = model.encoder.stage3.blocks
    assert blocks[0].mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.03)
    assert blocks[0].mlp.fc1.weight.abs().max() < 0.2
    assert (blocks[0].attn.kv.bias == 0).all() and (blocks[0].norm1.weight == 1).all()
    stem = model.encoder.stem.conv.weight
    assert stem.std().item() == pytest.approx((2 / (49 * 64)) ** 0.5, rel=0.05)
    assert (model.encoder.stage2.embed.proj.bias == 0).all()
    assert model.decoder.mask_token.std().item() == pytest.approx(0.02, rel=0.15)


@pytest.mark.parametrize("task", ["classification", "segmentation"])
def test_first_predictions_favour_no_class(task):
    torch.manual_seed(0)
    model = timo.create_model("timo_tiny", task, num_classes=3)
    assert model(torch.randn(1, 2, 3, 64, 64)).abs().max() < 5


def test_config_rebuilds_the_model():
    options = dict(num_classes=3, temporal_pool="encoder", depths=[1, 1, 1, 1], layer_scale=1e-4)
    with torch.device("meta"):
        model = timo.create_model("timo_tiny", "segmentation", 5, **options)
        again = timo.create_model(**json.loads(json.dumps(model.config)))
    assert str(again) == str(model)
    assert model.encoder.stage1.blocks[0].scale1.shape == (64,)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (dict(name="timo_small"), ["timo_small", "timo_tiny", "timo_huge"]),
        (dict(task="detection"), ["detection", "encoder", "mae", "segmentation"]),
        (dict(depth=3), ["'depth'", "depths", "drop_path_rate"]),
        (dict(task="mae", attention=("joint",) * 4), ["mae", "'attention'", "pixel_norm"]),
        (dict(task="segmentation"), ["num_classes", "missing"]),
        (dict(in_chans=0), ["in_chans is 0"]),
        (dict(task="classification", num_classes=-1), ["num_classes is -1"]),
        (dict(embed_dims=(16, 32)), ["embed_dims", "four"]),
        (dict(embed_dims=(20, 32, 60, 64)), ["embed_dims[0] is 20", "multiple of 8"]),
        (dict(num_heads=(3, 4, 6, 8)), ["num_heads is 3", "64"]),
        (dict(depths=(1, 0, 1, 1)), ["depths is 0"]),
        (dict(attention=("full",) * 4), ["attention", "full", "gyroscope", "joint"]),
        (dict(drop_path_rate=1.0), ["drop_path_rate is 1.0"]),
        (dict(layer_scale=False), ["layer_scale is False", "None or a positive number"]),
        (dict(layer_scale=0), ["layer_scale is 0"]),
        (dict(layer_scale=float("nan")), ["layer_scale is nan"]),
        (dict(layer_scale="0.1"), ["layer_scale is '0.1'"]),
        (dict(temporal_position="hours"), ["temporal_position", "hours", "index", "days"]),
        (dict(task="mae", pixel_norm="frame"), ["pixel_norm", "frame", "patch"]),
        (dict(task="mae", stem_statistics="some"), ["stem_statistics", "visible", "all"]),
        (dict(task="mae", decoder_embed_dim=36), ["decoder_embed_dim is 36"]),
        (dict(task="segmentation", num_classes=2, head="fcn"), ["head is 'fcn'", "linear"]),
        (dict(task="mae", decoder_num_heads=7), ["decoder_num_heads is 7", "512"]),
        (
            dict(task="segmentation", num_classes=2, per_frame=True, temporal_pool="encoder"),
            ["temporal_pool", "per_frame"],
        ),
    ],
)
def test_bad_arguments_are_named(arguments, words):
    with pytest.raises(ValueError) as error:
        timo.create_model(**(dict(name="timo_tiny") | arguments))
    assert all(word in str(error.value) for word in words), error.value
