"""Parameter names: ours, and those of published checkpoints (specification: model.md §6)."""

import re
from collections.abc import Callable

# Ours, published. {} stands for a number, the rest of a name is the same on both sides.
RULES = (
    ("stage1.embed.conv.", "patch_embed1.conv.0."),
    ("stage1.embed.bn.", "patch_embed1.conv.1."),
    ("stage1.embed.proj.", "patch_embed1.conv.3."),
    ("stage{}.embed.", "patch_embed{}."),
    ("stage{}.blocks.{}.", "block{}.{}."),
    ("stage{}.norm.", "norm{}."),
    ("decoder.mask_token", "mask_token"),
    ("decoder.embed.", "decoder_embed."),
    ("decoder.blocks.{}.", "decoder_blocks.{}."),
    ("decoder.norm.", "decoder_norm."),
    ("decoder.pred.", "decoder_pred."),
    ("upernet.pyramid.{}.", "decoder.psp_modules.{}.1."),
    ("upernet.bottleneck.", "decoder.bottleneck."),
    ("upernet.laterals.{}.", "decoder.lateral_convs.{}."),
    ("upernet.smooth.{}.", "decoder.fpn_convs.{}."),
    ("upernet.fuse.", "decoder.fpn_bottleneck."),
    ("classifier.", "semseghead.1."),
)
# The gate, within a block or at the root of a bare attention layer.
GATE_RULES = (("gate.", "cheap_operation.0."), ("gate_norm.", "cheap_operation.1."))


def _renamer(rules: list[tuple[str, str]]) -> Callable[[str], str]:
    """A function that rewrites a name by the first rule whose first side it starts with."""
    table = [
        (re.compile(re.escape(old).replace(r"\{\}", r"(\d+)")), new.replace("{}", "%s"))
        for old, new in rules
    ]

    def rename(name: str) -> str:
        for pattern, new in table:
            if match := pattern.match(name):
                return new % match.groups() + name[match.end() :]
        return name

    return rename


def _gate_renamer(rules: list[tuple[str, str]]) -> Callable[[str], str]:
    table = [(re.compile(rf"(^|\.attn\.){re.escape(old)}"), rf"\g<1>{new}") for old, new in rules]

    def rename(name: str) -> str:
        for pattern, new in table:
            name = pattern.sub(new, name)
        return name

    return rename


_to_published = _renamer([*RULES])
_to_own = _renamer([(published, own) for own, published in RULES])
_gate_to_published = _gate_renamer([*GATE_RULES])
_gate_to_own = _gate_renamer([(published, own) for own, published in GATE_RULES])


def canonical(name: str) -> str:
    """Our name of a parameter, from ours or a published one, without the encoder's prefix.

    The parameters of an encoder are those of the encoder inside any other model.
    """
    return _gate_to_own(_to_own(name.removeprefix("encoder.")))


def published(name: str, prefix: str) -> str:
    """The published name of one of our parameters.

    Args:
        prefix: what the encoder's names start with: "encoder." in segmentation checkpoints.
    """
    inner = name.removeprefix("encoder.")
    renamed = _gate_to_published(_to_published(inner))
    return prefix + renamed if inner != name else renamed
