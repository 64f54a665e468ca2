"""Models by name."""

from typing import Any, Literal, overload

from torch import nn

from timo.layers import MaskedBatchNorm
from timo.models.classifier import Classifier
from timo.models.config import OPTIONS, resolve
from timo.models.encoder import Encoder
from timo.models.mae import MaskedAutoencoder
from timo.models.segmenter import Segmenter

HEADS = {"classification": Classifier, "segmentation": Segmenter}
ENCODER_OPTIONS = {*OPTIONS["encoder"]}


@overload
def create_model(
    name: str,
    task: Literal["mae"],
    in_chans: int = 3,
    num_classes: int | None = None,
    **overrides: Any,
) -> MaskedAutoencoder: ...


@overload
def create_model(
    name: str,
    task: str = "encoder",
    in_chans: int = 3,
    num_classes: int | None = None,
    **overrides: Any,
) -> nn.Module: ...


def create_model(
    name: str,
    task: str = "encoder",
    in_chans: int = 3,
    num_classes: int | None = None,
    **overrides: Any,
) -> nn.Module:
    """Build a model with fresh weights.

    Args:
        name: "timo_tiny", "timo_base", "timo_large" or "timo_huge".
        task: "encoder", "mae", "classification" or "segmentation".
        in_chans: bands of the frames.
        num_classes: classes; needed by the last two tasks, without effect on the others.
        overrides: options of the task, with their defaults in `timo.models.config.OPTIONS`:
            embed_dims, num_heads, depths (four values each), drop_path_rate, layer_scale,
            temporal_position ("index", "days"), checkpoint_blocks (run each block again in the
            backward, to save memory), sync_batchnorm (statistics over all processes); but for
            "mae" attention ("gyroscope" or "joint" for each stage); "mae" decoder_embed_dim,
            decoder_num_heads, decoder_depth, pixel_norm ("none", "patch", "batch"),
            stem_statistics ("visible", "all"); "classification" and "segmentation" per_frame;
            "segmentation" temporal_pool ("decoder", "encoder") and head ("upernet", "linear").

    Returns:
        `Encoder`, `MaskedAutoencoder`, `Classifier` or `Segmenter`, with the arguments that would
        build it again under `.config`.

    Raises:
        ValueError: unknown name, task or option, or a value that cannot be met; says what can.
    """
    options = resolve(name, task, in_chans, num_classes, overrides)
    config = {k: v for k, v in options.items() if k in OPTIONS[task]}
    synchronised = options.pop("sync_batchnorm")
    shape = {k: options.pop(k) for k in [*options] if k in ENCODER_OPTIONS}
    model: Any = Encoder(in_chans, **shape)
    if task == "mae":
        model = MaskedAutoencoder(model, **options)
    elif task in HEADS:
        model = HEADS[task](model, num_classes, **options)
    for module in model.modules():
        if isinstance(module, MaskedBatchNorm):
            module.synchronised = synchronised
    model.config = dict(name=name, task=task, in_chans=in_chans, num_classes=num_classes, **config)
    return model
