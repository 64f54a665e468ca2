"""Checkpoints: round trips, names, what is left out, and what is refused."""

import argparse
import pickle

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import timo
from tests.models.build import build, series
from timo.models import model_from_checkpoint

TASKS = ["encoder", "mae", "classification", "segmentation"]


def model_of(task, seed=0, **options):
    return build(task, seed, num_classes=4, **options)


def state_of(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("format, name", [("native", "a.safetensors"), ("published", "a.pth")])
def test_round_trip(task, format, name, tmp_path):
    model, other = model_of(task), model_of(task, seed=1)
    timo.save_checkpoint(model, tmp_path / name, format)
    report = timo.load_checkpoint(other, tmp_path / name)
    assert equal(other.state_dict(), model.state_dict())
    assert len(report.mapped) == len(model.state_dict())
    assert not report.left_out and not report.missing_expected
    assert bool(report.renamed) == (format == "published")
    assert [p.name for p in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("task", TASKS)
def test_a_native_checkpoint_knows_its_model(task, tmp_path):
    model = model_of(task, layer_scale=0.1, temporal_position="days", drop_path_rate=0.3).float()
    timo.save_checkpoint(model, tmp_path / "a.safetensors")
    again = model_from_checkpoint(tmp_path / "a.safetensors")
    assert type(again) is type(model)
    assert str(again) == str(model)
    assert equal(again.state_dict(), model.state_dict())
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata()["format"] == "timo"


def test_building_a_model_reads_its_file_once(tmp_path, monkeypatch):
    timo.save_checkpoint(model_of("encoder"), tmp_path / "a.safetensors")
    opened = []
    monkeypatch.setattr(
        "timo.models.checkpoint.safe_open", lambda *args: (opened.append(args), safe_open(*args))[1]
    )
    model_from_checkpoint(tmp_path / "a.safetensors")
    assert len(opened) == 1


def test_published_names(tmp_path):
    """Names as model.md §6 lists them."""
    files = {}
    for task in TASKS:
        timo.save_checkpoint(model_of(task), tmp_path / f"{task}.pth", "published")
        files[task] = torch.load(tmp_path / f"{task}.pth", weights_only=True)["model"]
    encoder = {
        *("patch_embed1.conv.0.weight", "patch_embed1.conv.1.running_var"),
        *("patch_embed1.conv.3.bias", "patch_embed1.norm.weight"),
        *("patch_embed2.proj.weight", "patch_embed4.norm.bias", "norm4.weight"),
        *("block3.1.norm1.weight", "block1.0.mlp.fc1.weight", "block1.0.mlp.fc2.bias"),
        *("block1.0.attn.q.weight", "block3.1.attn.kv.bias", "block1.0.attn.proj.weight"),
        *("block2.0.attn.cheap_operation.0.weight", "block2.0.attn.cheap_operation.1.bias"),
    }
    assert encoder < files["encoder"].keys()
    assert encoder | {"head.weight", "head.bias"} < files["classification"].keys()
    assert {k for k in encoder if "cheap" not in k} < files["mae"].keys()
    assert {
        *("mask_token", "decoder_embed.weight", "decoder_blocks.1.attn.kv.weight"),
        *("decoder_norm.bias", "decoder_pred.weight"),
    } < files["mae"].keys()
    assert {f"encoder.{k}" for k in encoder} < files["segmentation"].keys()
    assert {
        *("decoder.psp_modules.3.1.conv.weight", "decoder.psp_modules.0.1.bn.running_mean"),
        *("decoder.bottleneck.bn.weight", "decoder.lateral_convs.2.conv.bias"),
        *("decoder.fpn_convs.1.bn.bias", "decoder.fpn_bottleneck.conv.weight"),
        *("semseghead.1.weight", "semseghead.1.bias"),
    } < files["segmentation"].keys()
    # No name is one of ours only.
    for state in files.values():
        assert not any("stage" in k or "upernet" in k or ".gate" in k for k in state)


@pytest.mark.parametrize("format, name", [("native", "a.safetensors"), ("published", "a.pth")])
@pytest.mark.parametrize("source", ["mae", "encoder", "classification", "segmentation"])
@pytest.mark.parametrize("target", ["encoder", "classification", "segmentation"])
def test_the_encoder_moves_between_tasks(source, target, format, name, tmp_path):
    old, new = model_of(source), model_of(target, seed=1)
    timo.save_checkpoint(old, tmp_path / name, format)
    report = timo.load_checkpoint(new, tmp_path / name)
    encoder = new if target == "encoder" else new.encoder
    expected = state_of(old if source == "encoder" else old.encoder)
    got = encoder.state_dict()
    assert all(torch.equal(got[k], expected[k]) for k in expected)
    gates = {k for k in new.state_dict() if ".gate" in k}
    fresh = gates if source == "mae" else set()
    if target != source:
        fresh = fresh | {k for k in new.state_dict() if k.startswith(("head", "upernet", "class"))}
    assert set(report.missing_expected) == fresh
    assert len(report.mapped) + len(report.missing_expected) == len(new.state_dict())
    assert bool(report.left_out) == (source not in ("encoder", target))


def test_a_pretrained_encoder_gives_the_same_features(tmp_path):
    """All-joint, an encoder with the autoencoder's weights sees what the autoencoder sees."""
    mae = model_of("mae")
    encoder = build(seed=1, attention=("joint",) * 4)
    timo.load_checkpoint(encoder, mae.state_dict())
    frames = series()
    for a, b in zip(encoder(frames), mae.encoder(frames)):
        assert torch.equal(a, b)


def test_unused_parts_are_left_out_and_reported():
    """As in published files: 1000-class heads, gates in joint blocks."""
    model = model_of("encoder")
    head = {"head.weight": torch.zeros(1000, 32), "head.bias": torch.zeros(1000)}
    gate = {
        "block3.0.attn.cheap_operation.0.weight": torch.zeros(1, 8),
        "block4.0.attn.cheap_operation.1.running_mean": torch.zeros(1),
    }
    report = timo.load_checkpoint(model, {"model": {**state_of(model), **head, **gate}})
    assert set(report.left_out) == {*head, *gate}
    assert "no classification head" in str(report) and "joint attention" in str(report)
    mae, classifier = model_of("mae"), model_of("classification")
    report = timo.load_checkpoint(classifier, {**state_of(mae), **head})
    assert set(head) < set(report.left_out)
    assert {"head.weight", "head.bias"} < set(report.missing_expected)
    segmenter = model_of("segmentation")
    extra = {f"encoder.{k}": v for k, v in head.items()}
    report = timo.load_checkpoint(segmenter, {**state_of(segmenter), **extra})
    assert set(report.left_out) == set(extra)


def wrapped(kind, model):
    if kind == "compiled":
        return torch.compile(model)
    if kind == "parallel":
        return torch.nn.DataParallel(torch.compile(model))
    return torch.optim.swa_utils.AveragedModel(model)


@pytest.mark.parametrize("kind", ["compiled", "parallel", "averaged"])
def test_wrapped_models_are_those_inside(kind, tmp_path):
    model, other = model_of("classification"), model_of("classification", seed=1)
    timo.save_checkpoint(wrapped(kind, model), tmp_path / "a.safetensors")
    assert equal(load_file(tmp_path / "a.safetensors"), model.state_dict())
    assert model_from_checkpoint(tmp_path / "a.safetensors").config == model.config
    outer = wrapped(kind, other)
    timo.load_checkpoint(outer, tmp_path / "a.safetensors")
    inner = outer.module if kind == "averaged" else other
    assert equal(inner.state_dict(), model.state_dict())


def test_named_parts_stay_fresh():
    """Other bands and other classes."""
    old, new = model_of("classification"), build("classification", 1, in_chans=5, num_classes=7)
    before, state = state_of(new), old.state_dict()
    with pytest.raises(ValueError, match=r"keeps with fresh=\['encoder.stage1.embed.conv'\]"):
        timo.load_checkpoint(new, state, fresh=["head"])
    with pytest.raises(ValueError, match="fresh has 'hea', of which the model has no weight"):
        timo.load_checkpoint(new, state, fresh=["hea"])
    assert equal(new.state_dict(), before)
    report = timo.load_checkpoint(new, state, fresh=["encoder.stage1.embed.conv", "head"])
    kept = {"encoder.stage1.embed.conv.weight", "head.weight", "head.bias"}
    assert set(report.left_out) == set(report.missing_expected) == kept
    assert "kept fresh (named in fresh): " in str(report)
    for name, x in new.state_dict().items():
        assert torch.equal(x, before[name] if name in kept else state[name])
    timo.load_checkpoint(new, state, fresh=["stage1.embed.conv.weight", "head"])


def test_a_model_without_values_is_refused():
    with torch.device("meta"):
        model = timo.create_model("timo_tiny")
    with pytest.raises(ValueError, match=r"model is on the meta device.*to_empty"):
        timo.load_checkpoint(model, timo.create_model("timo_tiny").state_dict())


def test_a_bare_attention_layer():
    layer = timo.layers.GyroscopeAttention(16, 2)
    state = {
        k.replace("gate_norm", "cheap_operation.1").replace("gate", "cheap_operation.0"): (
            torch.randn_like(v) if v.is_floating_point() else v + 5
        )
        for k, v in layer.state_dict().items()
    }
    report = timo.load_checkpoint(layer, state)
    assert torch.equal(layer.gate.weight, state["cheap_operation.0.weight"])
    assert torch.equal(layer.gate_norm.running_var, state["cheap_operation.1.running_var"])
    assert torch.equal(layer.kv.weight, state["kv.weight"])
    assert len(report.mapped) == len(state) and not report.missing_expected
    joint = timo.layers.JointAttention(16, 2)
    report = timo.load_checkpoint(joint, state)
    assert set(report.left_out) == {k for k in state if k.startswith("cheap")}
    del state["kv.bias"]
    with pytest.raises(ValueError, match="missing: kv.bias"):
        timo.load_checkpoint(layer, state)


def tampered(kind, state):
    """Two faults of a kind, and what the error must name."""
    first, second = "stage2.embed.proj.weight", "stage4.norm.bias"
    if kind == "missing":
        del state[first], state[second]
    elif kind == "unexpected":
        first, second = "stage9.norm.bias", "stage1.blocks.0.attn.temperature"
        state[first] = state[second] = torch.zeros(3)
    elif kind == "shape":
        state[first], state[second] = state[first][:3], state[second][:3]
    elif kind == "kind":
        state[first], state[second] = state[first].long(), "a string"
    elif kind == "ambiguous":
        first, second = "norm4.bias", "patch_embed2.proj.weight"
        state[first], state[second] = torch.zeros(32), torch.zeros(16, 16, 3, 3)
    elif kind == "part of a gate":
        first = second = "stage1.blocks.0.attn.gate_norm.running_mean"
        del state[first]
    elif kind == "part of a head":
        first = second = "head.bias"
        del state[first]
    return first, second


@pytest.mark.parametrize(
    "kind",
    ["missing", "unexpected", "shape", "kind", "ambiguous", "part of a gate", "part of a head"],
)
def test_one_error_names_all_faults_and_nothing_is_loaded(kind):
    model, source = model_of("classification"), model_of("classification", seed=1)
    before = state_of(model)
    state = {k.removeprefix("encoder."): v for k, v in state_of(source).items()}
    names = tampered(kind, state)
    with pytest.raises(ValueError) as error:
        timo.load_checkpoint(model, {"model": state})
    assert all(name in str(error.value) for name in names), error.value
    assert equal(model.state_dict(), before)


def test_an_encoder_does_not_make_an_autoencoder():
    with pytest.raises(ValueError, match=r"missing: decoder\.mask_token"):
        timo.load_checkpoint(model_of("mae"), model_of("encoder").state_dict())


def test_published_files_with_their_training_state(tmp_path):
    model = model_of("encoder")
    timo.save_checkpoint(model, tmp_path / "plain.pth", "published")
    state = torch.load(tmp_path / "plain.pth", weights_only=True)["model"]
    args = argparse.Namespace(epochs=100, lr=None, output_dir="out")
    content = dict(model=state, optimizer={"state": {}}, epoch=3, scaler={}, args=args)
    torch.save(content, tmp_path / "a.pth")
    other = model_of("encoder", seed=1)
    timo.load_checkpoint(other, tmp_path / "a.pth")
    assert equal(other.state_dict(), model.state_dict())


class Exploit:
    executed = False

    def __reduce__(self):
        return setattr, (Exploit, "executed", True)


def test_nothing_is_executed(tmp_path):
    torch.save({"model": state_of(model_of("encoder")), "args": Exploit()}, tmp_path / "a.pth")
    with open(tmp_path / "b.pth", "wb") as file:
        pickle.dump(Exploit(), file, protocol=2)
    for name in "ab":
        with pytest.raises(ValueError, match=f"{name}.pth is damaged or holds more than tensors"):
            timo.load_checkpoint(model_of("encoder"), tmp_path / f"{name}.pth")
    assert not Exploit.executed


@pytest.mark.parametrize("format, name", [("native", "a.safetensors"), ("published", "a.pth")])
@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.99])
def test_truncated_files_are_named(format, name, share, tmp_path):
    model = model_of("encoder")
    before, path = state_of(model), tmp_path / name
    timo.save_checkpoint(model_of("encoder", seed=1), path, format)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ValueError, match=f"{name} is damaged"):
        timo.load_checkpoint(model, path)
    assert equal(model.state_dict(), before)


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    model = model_of("encoder")
    timo.save_checkpoint(model, path)
    content = path.read_bytes()

    def fail(state, file, metadata):
        file.write_bytes(b"half")
        raise OSError("disk full")

    def refuse(source, target):
        raise OSError("no rename")

    for name, function, message in (
        ("save_file", fail, "disk full"),
        ("os.replace", refuse, "no rename"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(f"timo.models.checkpoint.{name}", function)
            with pytest.raises(OSError, match=message):
                timo.save_checkpoint(model_of("encoder", seed=1), path)
        assert path.read_bytes() == content and [*tmp_path.iterdir()] == [path]


def test_bad_paths_are_named(tmp_path):
    model = model_of("encoder")
    with pytest.raises(FileNotFoundError, match="nowhere.pth"):
        timo.load_checkpoint(model, tmp_path / "nowhere.pth")
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        timo.save_checkpoint(model, tmp_path / "nowhere" / "a.safetensors")
    with pytest.raises(ValueError, match="suffix .safetensors"):
        timo.save_checkpoint(model, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="native or published"):
        timo.save_checkpoint(model, tmp_path / "a.pth", "onnx")
    with pytest.raises(ValueError, match="no published name"):
        timo.save_checkpoint(build(layer_scale=1.0), tmp_path / "a.pth", "published")
    linear = build("segmentation", num_classes=2, head="linear")
    with pytest.raises(ValueError, match="linear segmentation head.*native"):
        timo.save_checkpoint(linear, tmp_path / "a.pth", "published")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="list.pth holds a list"):
        timo.load_checkpoint(model, tmp_path / "list.pth")
    timo.save_checkpoint(timo.layers.GyroscopeAttention(16, 2), tmp_path / "layer.safetensors")
    with pytest.raises(ValueError, match="does not say how its model was built"):
        model_from_checkpoint(tmp_path / "layer.safetensors")


@pytest.mark.parametrize("format, suffix", [("native", ".safetensors"), ("published", ".pth")])
def test_who_may_read_a_checkpoint_is_who_may_read_any_file(tmp_path, format, suffix):
    (tmp_path / "any").touch()
    timo.save_checkpoint(model_of("encoder"), tmp_path / f"a{suffix}", format)
    assert (tmp_path / f"a{suffix}").stat().st_mode == (tmp_path / "any").stat().st_mode
    with pytest.raises(FileNotFoundError, match="is not a file; give a file in it, as .*model.saf"):
        timo.load_checkpoint(model_of("encoder"), tmp_path)


def test_segmentation_heads_of_two_kinds(tmp_path):
    """The encoder goes from one to the other; the classifier is of another width."""
    options = {"num_classes": 3}
    models = [build("segmentation", head=head, **options) for head in ("upernet", "linear")]
    for model, other in (models, models[::-1]):
        timo.save_checkpoint(model, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match="it was built with head=.*\n.*(shape|upernet)"):
            timo.load_checkpoint(other, tmp_path / "model.safetensors")
        report = timo.load_checkpoint(other, tmp_path / "model.safetensors", ["classifier"])
        assert all(name.startswith("encoder.") for name in report.mapped.values())
        left = {name.split(".")[0] for name in report.left_out}
        assert left == ({"upernet", "classifier"} if other is models[1] else {"classifier"})
        assert all("linear head" in r for k, r in report.left_out.items() if "upernet" in k)


def test_safetensors_with_published_names(tmp_path):
    model = model_of("encoder")
    timo.save_checkpoint(model, tmp_path / "a.pth", "published")
    state = torch.load(tmp_path / "a.pth", weights_only=True)["model"]
    save_file(state, tmp_path / "a.safetensors")
    other = model_of("encoder", seed=1)
    timo.load_checkpoint(other, tmp_path / "a.safetensors")
    assert equal(other.state_dict(), model.state_dict())
    assert load_file(tmp_path / "a.safetensors").keys() == state.keys()


def test_another_variant_is_told_by_its_options(tmp_path):
    path = tmp_path / "model.safetensors"
    small = {"embed_dims": [8, 8, 16, 16], "num_heads": [1, 1, 2, 2], "depths": [1, 1, 1, 1]}
    timo.save_checkpoint(timo.create_model("timo_tiny", "mae", layer_scale=0.1, **small), path)
    other = timo.create_model(
        "timo_tiny", "segmentation", num_classes=2, **small | {"depths": [1] * 3 + [2]}
    )
    with pytest.raises(ValueError) as caught:
        timo.load_checkpoint(other, path)
    lines = str(caught.value).splitlines()
    assert lines[1] == (
        "  it was built with depths=[1, 1, 1, 1], layer_scale=0.1, this model with depths="
        "[1, 1, 1, 2], layer_scale=None; build it with the former, in commands by task.model and "
        "task.model_options"
    )
    assert len(lines) == 8 and lines[7].startswith("  and ") and lines[7].endswith(" more")
    same = timo.create_model("timo_tiny", "mae", layer_scale=0.1, **small, drop_path_rate=0.3)
    timo.load_checkpoint(same, path)
