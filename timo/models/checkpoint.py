"""Checkpoints: our own in safetensors, and those of the published code."""

import argparse
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from timo.models.create import create_model
from timo.models.names import canonical, published

GATE = re.compile(r"(.*\.attn\.|^)gate(_norm)?\.")
# Parts of a model beside the encoder, by canonical names.
PARTS = {
    "pretraining decoder": ("decoder.",),
    "segmentation head": ("upernet.", "classifier."),
    "classification head": ("head.",),
}
# Options of `create_model` that decide which weights a model has.
SHAPING = (
    "in_chans", "embed_dims", "num_heads", "depths", "layer_scale", "attention",
    "decoder_embed_dim", "decoder_num_heads", "decoder_depth", "head",
)  # fmt: skip


@dataclass
class LoadReport:
    """What `load_checkpoint` did; names in the checkpoint are as they stand there.

    Attributes:
        mapped: name in the checkpoint -> name in the model, of all that was loaded.
        renamed: those of `mapped` whose two names differ.
        left_out: name in the checkpoint -> why it was not loaded.
        missing_expected: name in the model -> why the checkpoint has nothing for it.
    """

    mapped: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    missing_expected: dict[str, str] = field(default_factory=dict)

    @property
    def renamed(self) -> dict[str, str]:
        return {old: new for old, new in self.mapped.items() if old != new}

    def __str__(self) -> str:
        lines = [f"loaded {len(self.mapped)} tensors, {len(self.renamed)} of them renamed"]
        for title, names in (("left out", self.left_out), ("kept fresh", self.missing_expected)):
            reasons: dict[str, list[str]] = {}
            for name, reason in names.items():
                reasons.setdefault(reason, []).append(name)
            for reason, group in reasons.items():
                more = f" and {len(group) - 3} more" if len(group) > 3 else ""
                lines.append(f"{title} ({reason}): {', '.join(group[:3])}{more}")
        return "\n".join(lines)


def load_checkpoint(
    model: nn.Module,
    path_or_mapping: str | os.PathLike | Mapping,
    fresh: Sequence[str] = (),
) -> LoadReport:
    """Load weights, every one accounted for, or change nothing.

    Args:
        model: what `create_model` returns, or a bare `timo.layers.GyroscopeAttention`; also within
            `torch.compile`, data parallelism or `torch.optim.swa_utils.AveragedModel`.
        path_or_mapping: a .safetensors file; a published .pth; a run's .ckpt, of which the task's
            model is taken; or a mapping, {"model": state} or the state itself. Names are ours or
            the published ones. A checkpoint of one task loads into a model of another: the encoder
            is what they share.
        fresh: modules or weights that stay as the model has them, by its names, with "encoder." or
            without: "stage1.embed.conv" for other bands, "head" (of a segmenter "classifier") for
            other classes.

    Returns:
        What was mapped, left out, and not found though that was expected.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the model is on the meta device or has nothing of a name in `fresh`; the file
            cannot be read or holds more than tensors and plain values; or keys
            are unexpected, missing, ambiguous or of the wrong shape or kind: names five of them,
            after the options of `create_model` that differ, where the file states them.
    """
    metadata: dict = {}
    if isinstance(path_or_mapping, Mapping):
        source, state = "the mapping", path_or_mapping
    else:
        source = str(path_or_mapping)
        state = read_checkpoint(Path(path_or_mapping), metadata)
    return _load(_unwrapped(model), source, state, metadata, fresh)


def _load(
    model: nn.Module, source: str, state: Mapping, metadata: Mapping, fresh: Sequence[str] = ()
) -> LoadReport:
    """`load_checkpoint` of what `source` holds."""
    if isinstance(state.get("model"), Mapping):
        state = state["model"]
    elif isinstance(state.get("state_dict"), Mapping):  # of a task, which holds the model as one
        held = state["state_dict"].items()
        state = {k.removeprefix("model."): x for k, x in held if k.startswith("model.")}
    target = {canonical(name): (name, x) for name, x in model.state_dict().items()}
    if any(x.is_meta for _, x in target.values()):
        raise ValueError(
            "model is on the meta device, where weights have no values; call "
            'model.to_empty(device="cpu") first, or create it on the device that it is to be on'
        )
    kept: set[str] = set()
    for part in fresh:
        inside = {
            name for name, (own_name, _) in target.items()
            if f"{name}.".startswith(f"{part}.") or f"{own_name}.".startswith(f"{part}.")
        }  # fmt: skip
        if not inside:
            raise ValueError(
                f"fresh has {part!r}, of which the model has no weight; it must hold beginnings of "
                f"names, up to a dot, as {next(iter(model.state_dict())).rpartition('.')[0]!r}; "
                f"the model's parts are {', '.join(dict(model.named_children()))}"
            )
        kept |= inside
    report, pairs, errors = _match(state, target, kept)
    if errors:
        more = [f"and {len(errors) - 5} more"] if len(errors) > 5 else []
        raise ValueError(
            f"{source} does not fit {type(model).__name__}; nothing was loaded:\n  "
            + "\n  ".join(_differing_options(metadata, model) + errors[:5] + more)
        )
    with torch.no_grad():
        for own, x in pairs:
            own.copy_(x)
    return report


def _differing_options(metadata: Mapping, model: nn.Module) -> list[str]:
    """Options that decide which weights there are and that a file and a model state otherwise."""
    config = json.loads(metadata.get("config", "null")) or {}
    own = json.loads(json.dumps(getattr(model, "config", {})))
    differing = [k for k in SHAPING if k in config and k in own and config[k] != own[k]]
    if not differing:
        return []
    its, ours = (", ".join(f"{k}={held[k]}" for k in differing) for held in (config, own))
    return [
        f"it was built with {its}, this model with {ours}; build it with the former, in commands "
        "by task.model and task.model_options"
    ]


def _match(
    state: Mapping, target: dict[str, tuple[str, Tensor]], fresh: set[str]
) -> tuple[LoadReport, list[tuple[Tensor, Tensor]], list[str]]:
    """Pair the tensors of a checkpoint with those of a model; what does not fit, in words."""
    report, pairs, errors = LoadReport(), [], []
    names = {key: canonical(key) for key in state}
    # A pretraining or segmentation checkpoint may carry a classification head that it never uses.
    pretraining = any(_part(name) == "pretraining decoder" for name in names.values())
    found: dict[str, str] = {}
    for key, name in names.items():
        x, unused = state[key], key.startswith("encoder.head.") or pretraining
        if not isinstance(x, Tensor):
            errors.append(f"{key} is {type(x).__name__}, not a tensor")
        elif unused and _part(name) == "classification head":
            report.left_out[key] = "unused linear head"
        elif name in fresh:
            report.left_out[key] = "named in fresh"
        elif name not in target:
            reason = _why_left_out(name, target)
            if reason:
                report.left_out[key] = reason
            else:
                errors.append(f"unexpected: {key}")
        elif name in found:
            errors.append(f"ambiguous: {found[name]} and {key} are the same parameter")
        else:
            found[name] = key
            own_name, own = target[name]
            if x.shape != own.shape:
                errors.append(
                    f"{key} has shape {tuple(x.shape)}; the model's {own_name} has "
                    f"{tuple(own.shape)}, which load_checkpoint keeps with fresh="
                    f"[{own_name.rpartition('.')[0]!r}]"
                )
            elif x.is_floating_point() != own.is_floating_point():
                errors.append(f"{key} is {x.dtype}; the model's {own_name} is {own.dtype}")
            report.mapped[key] = own_name
            pairs.append((own, x))
    parts = {_part(name) for name in found}
    gates = any(GATE.match(name) for name in names.values())
    for name, (own_name, _) in target.items():
        if name in found:
            continue
        part = _part(name)
        if name in fresh:
            report.missing_expected[own_name] = "named in fresh"
        elif GATE.match(name) and not gates:
            report.missing_expected[own_name] = "a pretraining checkpoint has no gates"
        elif part in ("classification head", "segmentation head") and part not in parts:
            report.missing_expected[own_name] = f"the checkpoint has no {part}"
        else:
            errors.append(f"missing: {own_name}")
    return report, pairs, errors


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model inside `torch.compile`, data parallelism and averages of weights."""
    children = dict(model.named_children())
    inner = children.get("_orig_mod", children.get("module"))
    return model if inner is None else _unwrapped(inner)


def _part(name: str) -> str | None:
    """Which part a canonical name belongs to; None for the encoder."""
    return next((part for part, starts in PARTS.items() if name.startswith(starts)), None)


def _why_left_out(name: str, target: dict) -> str | None:
    """Why a model may do without the parameter; None if it is simply unknown."""
    if (gate := GATE.match(name)) and f"{gate[1]}q.weight" in target:
        return "gate of a block with joint attention"
    part = _part(name)
    if part and not any(_part(own) == part for own in target):
        return f"the model has no {part}"
    if name.startswith("upernet.") and not any(own.startswith("upernet.") for own in target):
        return "the model has a linear head"
    return None


def save_checkpoint(model: nn.Module, path: str | os.PathLike, format: str = "native") -> None:
    """Save the weights; a file of that name is replaced only once the new one is complete.

    Args:
        model: what `create_model` returns, or one of its layers; wrapped as in `load_checkpoint`.
        path: where to; its folder must exist. Name native files `.safetensors`.
        format: "native" for safetensors with our names and the arguments of `create_model`;
            "published" for the authors' layout, {"model": state} with their names.

    Raises:
        ValueError: unknown format, a native name without .safetensors, or layer scale or a linear
            segmentation head, which published checkpoints do not know.
    """
    path, model = Path(path), _unwrapped(model)
    if format not in ("native", "published"):
        raise ValueError(f"format is {format!r}; it must be native or published")
    if (format == "native") != (path.suffix == ".safetensors"):
        raise ValueError(
            f"path is {path}; the native format needs the suffix .safetensors, the published one "
            "another, as .pth"
        )
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent} does not exist; create the folder first")
    state = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    if format == "published":
        if scales := [k for k in state if k.endswith((".scale1", ".scale2"))]:
            raise ValueError(
                f"{scales[0]} has no published name, for published models have no layer scale; "
                'save with format="native"'
            )
        if "classifier.weight" in state and "upernet.fuse.conv.weight" not in state:
            raise ValueError(
                "the model has a linear segmentation head, for which there are no published names; "
                'save with format="native"'
            )
        prefix = "encoder." if any(_part(k) == "segmentation head" for k in state) else ""
        state = {published(k, prefix): v for k, v in state.items()}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        readers = temporary.stat().st_mode  # as for any file; safetensors lets only the owner read
        if format == "published":
            torch.save({"model": state}, temporary)
        else:
            config = json.dumps(getattr(model, "config", None))
            save_file(state, temporary, metadata={"format": "timo", "config": config})
        temporary.chmod(readers)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def model_from_checkpoint(path: str | os.PathLike) -> nn.Module:
    """Build the model that a native checkpoint was saved from, in float32, and load its weights.

    Raises:
        FileNotFoundError, ValueError: as `load_checkpoint`; or the file does not say how its
            model was built.
    """
    path = Path(path)
    metadata: dict = {}
    state = read_checkpoint(path, metadata)
    config = json.loads(metadata.get("config", "null"))
    if config is None:
        raise ValueError(
            f"{path} does not say how its model was built; call create_model and load_checkpoint, "
            "and save native checkpoints from models that create_model made"
        )
    model = create_model(**config)
    _load(model, str(path), state, metadata)
    return model


def read_checkpoint(path: Path, metadata: dict | None = None) -> Mapping:
    """The content of a checkpoint file; `metadata` is filled from a safetensors header."""
    if not path.is_file():
        file = f"; give a file in it, as {path / 'model.safetensors'}" if path.is_dir() else ""
        raise FileNotFoundError(f"{path} is not a file{file}")
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, "pt") as file:
                if metadata is not None:
                    metadata.update(file.metadata() or {})
                return {name: file.get_tensor(name) for name in file.keys()}
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged or not a safetensors file: {error}") from error
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load has no exception of its own for a damaged file
        raise ValueError(
            f"{path} is damaged or holds more than tensors and plain values, which is not "
            f"executed; re-save it as {{'model': state_dict}} where you trust it: {error}"
        ) from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}; it must hold a dict")
    return content
