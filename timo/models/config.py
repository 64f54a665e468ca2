"""Variants, tasks and options of the models, and their checks."""

from collections.abc import Sequence

from timo.layers.block import ATTENTION

# Widths, heads and depths of the four stages (specification: model.md §1).
VARIANTS = {
    "timo_tiny": dict(embed_dims=(64, 128, 192, 256), num_heads=(2, 4, 6, 8), depths=(1, 1, 6, 2)),
    "timo_base": dict(
        embed_dims=(128, 256, 512, 1024), num_heads=(4, 8, 16, 32), depths=(2, 2, 18, 2)
    ),
    "timo_large": dict(
        embed_dims=(384, 768, 960, 1536), num_heads=(6, 12, 24, 48), depths=(2, 2, 18, 2)
    ),
    "timo_huge": dict(
        embed_dims=(512, 1024, 1280, 2048), num_heads=(8, 16, 32, 64), depths=(3, 3, 22, 3)
    ),
}

_ENCODER = dict(
    embed_dims=None,
    num_heads=None,
    depths=None,
    attention=("gyroscope", "gyroscope", "joint", "joint"),
    drop_path_rate=0.0,
    layer_scale=None,
    temporal_position="index",
    checkpoint_blocks=False,
    sync_batchnorm=False,
)
# Options of each task with their defaults; the variant fills in the Nones of the first three.
OPTIONS = {
    "encoder": _ENCODER,
    "mae": {k: v for k, v in _ENCODER.items() if k != "attention"}
    | dict(
        decoder_embed_dim=512,
        decoder_num_heads=16,
        decoder_depth=8,
        pixel_norm="none",
        stem_statistics="visible",
    ),
    "classification": _ENCODER | dict(drop_path_rate=0.1, per_frame=False),
    "segmentation": _ENCODER
    | dict(drop_path_rate=0.2, temporal_pool="decoder", per_frame=False, head="upernet"),
}

CHOICES = dict(
    temporal_position=("index", "days"),
    pixel_norm=("none", "patch", "batch"),
    stem_statistics=("visible", "all"),
    temporal_pool=("decoder", "encoder"),
    head=("upernet", "linear"),
    per_frame=(False, True),
    checkpoint_blocks=(False, True),
    sync_batchnorm=(False, True),
)


def resolve(name: str, task: str, in_chans: int, num_classes: int | None, overrides: dict) -> dict:
    """All options of a model, checked.

    Raises:
        ValueError: unknown name, task or option, or a value that cannot be met; says what can.
    """
    if name not in VARIANTS:
        raise ValueError(f"name is {name!r}; it must be one of {', '.join(VARIANTS)}")
    if task not in OPTIONS:
        raise ValueError(f"task is {task!r}; it must be one of {', '.join(OPTIONS)}")
    if unknown := sorted(set(overrides) - set(OPTIONS[task])):
        raise ValueError(
            f"{task} has no option {', '.join(map(repr, unknown))}; "
            f"its options are {', '.join(OPTIONS[task])}"
        )
    _positive("in_chans", in_chans)
    if task in ("classification", "segmentation"):
        if num_classes is None:
            raise ValueError(f"num_classes is missing; {task} needs the number of classes")
        _positive("num_classes", num_classes)
    options = OPTIONS[task] | VARIANTS[name] | overrides
    for key, known in CHOICES.items():
        if key in options and options[key] not in known:
            shown = " or ".join(map(repr, known))
            raise ValueError(f"{key} is {options[key]!r}; it must be {shown}")
    _check_stages(options)
    scale = options["layer_scale"]
    number = isinstance(scale, int | float) and not isinstance(scale, bool)
    if scale is not None and not (number and 0 < scale < float("inf")):
        raise ValueError(f"layer_scale is {scale!r}; it must be None or a positive number")
    if task == "mae":
        for key in ("decoder_embed_dim", "decoder_num_heads", "decoder_depth"):
            _positive(key, options[key])
        _check_width("decoder_embed_dim", options["decoder_embed_dim"])
        _check_heads("decoder_", options["decoder_embed_dim"], options["decoder_num_heads"])
    if options.get("per_frame") and options.get("temporal_pool") == "encoder":
        raise ValueError(
            'temporal_pool is "encoder" with per_frame=True; there is nothing to pool when every '
            'frame gets its own map: leave temporal_pool at "decoder"'
        )
    return options


def _check_stages(options: dict) -> None:
    for key in ("embed_dims", "num_heads", "depths", "attention"):
        values = options.get(key, ("joint",) * 4)
        if not isinstance(values, Sequence) or isinstance(values, str) or len(values) != 4:
            raise ValueError(f"{key} is {values!r}; it must hold four values, one per stage")
        options[key] = tuple(values)
    for kind in options["attention"]:
        if kind not in ATTENTION:
            raise ValueError(
                f"attention is {options['attention']}; each stage must be {' or '.join(ATTENTION)}"
            )
    for key in ("embed_dims", "num_heads", "depths"):
        for value in options[key]:
            _positive(key, value)
    for dim, heads in zip(options["embed_dims"], options["num_heads"]):
        _check_heads("", dim, heads)
    _check_width("embed_dims[0]", options["embed_dims"][0])
    rate = options["drop_path_rate"]
    if not 0 <= rate < 1:
        raise ValueError(f"drop_path_rate is {rate}; it must be at least 0 and less than 1")


def _check_width(key: str, dim: int) -> None:
    if dim % 8:
        raise ValueError(
            f"{key} is {dim}; it must be a multiple of 8, for the positional code has sines and "
            "cosines of date, row and column"
        )


def _check_heads(prefix: str, dim: int, heads: int) -> None:
    if dim % heads:
        raise ValueError(f"{prefix}num_heads is {heads}; it must divide the width {dim}")


def _positive(key: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{key} is {value!r}; it must be an integer of at least 1")
