"""Layers: thin modules over `timo.ops`."""

from timo.layers.attention import GyroscopeAttention, JointAttention
from timo.layers.block import Block, DropPath, Mlp
from timo.layers.embedding import PatchMerging, Stem
from timo.layers.linear import Linear
from timo.layers.norm import MaskedBatchNorm

__all__ = [
    "Block",
    "DropPath",
    "GyroscopeAttention",
    "JointAttention",
    "Linear",
    "MaskedBatchNorm",
    "Mlp",
    "PatchMerging",
    "Stem",
]
