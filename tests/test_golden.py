"""Conformance vectors: tensors computed in float64 by the published implementation."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import timo
from tests.models.oracle import relative_error
from timo.models.names import published


def paths(kind):
    """File names are listed where the vectors are, else one test per kind is skipped, saying so."""
    root = os.environ.get("TIMO_GOLDEN", Path(__file__).resolve().parents[2] / "shared" / "golden")
    return sorted(p.name for p in Path(root).glob(f"{kind}_*.safetensors")) or [kind]


def read(path):
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        spec = json.loads(file.metadata()["spec"])
    state = {k.removeprefix("state."): v for k, v in tensors.items() if k.startswith("state.")}
    return spec, state, tensors


def build(spec, state, task, dtype, **options):
    shape = {k: spec[k] for k in ("embed_dims", "num_heads", "depths")}
    model = timo.create_model("timo_tiny", task, spec["in_chans"], **shape, **options)
    timo.load_checkpoint(model, {"model": state})
    return model.to(dtype).eval()


def tolerance(dtype, kind):
    """As ../shared/golden states: the published positional codes are float32."""
    return 1e-4 if dtype == torch.float32 else 1e-10 if kind == "gyroscope" else 1e-6


def check(got, exact, limit, name):
    error = relative_error(got, exact.double())
    assert error <= limit, f"{name}: relative error {error:.2e}, allowed {limit:.0e}"


DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32])


@DTYPES
@pytest.mark.parametrize("name", paths("gyroscope"))
def test_gyroscope_attention(name, dtype, golden_root):
    spec, state, tensors = read(golden_root / name)
    layer = timo.layers.GyroscopeAttention(spec["dim"], spec["num_heads"], spec["qkv_bias"])
    layer = layer.double()
    report = timo.load_checkpoint(layer, state)
    assert len(report.mapped) == len(state) == len(layer.state_dict())
    layer = layer.to(dtype).train(spec["train"])
    x = tensors["input"].to(dtype).requires_grad_()
    out = layer(x, spec["T"])
    out.backward(tensors["grad_output"].to(dtype))
    limit = tolerance(dtype, "gyroscope")
    check(out, tensors["output"], limit, "output")
    check(x.grad, tensors["grad_input"], limit, "grad_input")
    for own, p in layer.named_parameters():
        check(p.grad, tensors[f"grad.{published(own, '')}"], limit, own)
    after = {k: v for k, v in tensors.items() if k.startswith("after.")}
    assert bool(after) == spec["train"]
    own = {published(k, ""): v for k, v in layer.state_dict().items()}
    for key, exact in after.items():
        check(own[key.removeprefix("after.")], exact, limit, key)


@DTYPES
@pytest.mark.parametrize("name", paths("encoder"))
def test_encoder(name, dtype, golden_root):
    spec, state, tensors = read(golden_root / name)
    model = build(spec, state, "encoder", dtype)
    for i, got in enumerate(model(tensors["input"].to(dtype)), 1):
        exact = tensors[f"feature{i}"]
        check(got.flatten(0, 1), exact, tolerance(dtype, "encoder"), f"feature{i}")


@DTYPES
@pytest.mark.parametrize("per_frame", [False, True])
@pytest.mark.parametrize("name", paths("classifier"))
def test_classifier(name, per_frame, dtype, golden_root):
    spec, state, tensors = read(golden_root / name)
    options = dict(num_classes=spec["num_classes"], per_frame=per_frame)
    model = build(spec, state, "classification", dtype, **options)
    exact = tensors["logits_per_frame" if per_frame else "logits"]
    got = model(tensors["input"].to(dtype))
    check(got.flatten(0, -2), exact, tolerance(dtype, "classifier"), "logits")


@DTYPES
@pytest.mark.parametrize("name", paths("segmenter"))
def test_segmenter(name, dtype, golden_root):
    spec, state, tensors = read(golden_root / name)
    options = dict(num_classes=spec["num_classes"], per_frame=spec["per_frame"])
    model = build(spec, state, "segmentation", dtype, **options)
    got = model(tensors["input"].to(dtype))
    check(got.view(tensors["logits"].shape), tensors["logits"], tolerance(dtype, ""), "logits")


@DTYPES
@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("name", paths("mae"))
def test_masked_autoencoder(name, raw, dtype, golden_root):
    spec, state, tensors = read(golden_root / name)
    options = {k: spec[k] for k in ("decoder_embed_dim", "decoder_num_heads", "decoder_depth")}
    norm = "batch" if spec["norm_pix_loss"] else "none"
    model = build(
        spec, state, "mae", dtype, pixel_norm=norm, stem_statistics="all", **options
    ).train(spec["train"])
    frames, kept = tensors["input"], tensors["visible"].flatten(1)
    ids = kept.nonzero()[:, 1].view(len(kept), -1)
    if raw:
        out = model(frames, visible_ids=ids, scale=1 / 255)
    else:
        out = model(frames.to(dtype) / 255, visible_ids=ids)
    limit = tolerance(dtype, "mae")
    pred = tensors["pred"].view(len(kept), -1, tensors["pred"].shape[-1])
    check(out.latent, tensors["latent"], limit, "latent")
    check(out.pred, torch.stack([p[~k] for p, k in zip(pred, kept)]), limit, "pred")
    check(out.loss.view(1), tensors["loss"], limit, "loss")
    out.loss.backward()
    for own, p in model.named_parameters():
        check(p.grad, tensors[f"grad.{published(own, '')}"], limit, own)
