"""Segmentation of series or of frames."""

import torch
from torch import Tensor, nn

from timo import ops
from timo.layers.validity import per_map
from timo.models.encoder import STRIDES, Encoder
from timo.models.inputs import check_series, pad_frames, pad_valid
from timo.models.upernet import UPerNet, resize
from timo.models.weights import initialise
from timo.ops.temporal_maximum import enlarge


class Segmenter(nn.Module):
    """Encoder, head, maximum over valid dates, 1×1 classifier (specification: model.md §4).

    Args:
        encoder: the encoder.
        num_classes: classes.
        temporal_pool: "decoder" takes the maximum over dates of the head's upsampled output, as
            the published code; "encoder" that of the feature pyramid, T times cheaper.
        per_frame: no maximum, one map per frame.
        head: "upernet", as the published code; "linear" puts the pyramid's maps side by side, at
            the size of the finest: with a frozen encoder the usual probe of what its features tell.
    """

    def __init__(
        self,
        encoder: Encoder,
        num_classes: int,
        temporal_pool: str = "decoder",
        per_frame: bool = False,
        head: str = "upernet",
    ):
        super().__init__()
        self.encoder = encoder
        self.temporal_pool, self.per_frame, self.head = temporal_pool, per_frame, head
        dims = encoder.embed_dims
        dim = dims[-1] if head == "upernet" else sum(dims)
        self.upernet = UPerNet(dims, dim) if head == "upernet" else None
        self.dropout = nn.Dropout2d(0.1)
        self.classifier = nn.Conv2d(dim, num_classes, 1)
        self.classifier.apply(initialise)

    def extra_repr(self) -> str:
        options = f"temporal_pool={self.temporal_pool!r}, per_frame={self.per_frame}"
        return f"{options}, head={self.head!r}"

    def forward(
        self, frames: Tensor, dates: Tensor | None = None, valid: Tensor | None = None
    ) -> Tensor:
        """Logits (B, classes, H, W), or (B, T, classes, H, W) per frame.

        Arguments and errors as `Encoder.forward`. The maximum is over valid dates of a token; it
        is 0 where there is none.
        """
        encoder = self.encoder
        check_series(frames, dates, valid, encoder.stem.conv.weight, encoder.temporal_position)
        B, T, _, H, W = frames.shape
        # Padded here, so that all maps are whole and cover the same pixels.
        frames, valid = pad_frames(frames), pad_valid(valid, frames)
        maps, valids = encoder.features(frames, dates, valid)
        if self.temporal_pool == "encoder":
            maps = [ops.temporal_maximum(x, v)[0].unsqueeze(1) for x, v in zip(maps, valids)]
            valids = [None if v is None else v.any(1, keepdim=True) for v in valids]
        x = self._fused([x.flatten(0, 1) for x in maps], [per_map(v) for v in valids])
        if self.per_frame or self.temporal_pool == "encoder":
            # Weighted means of positions and of channels, in either order: the classes are fewer.
            logits = enlarge(self.classifier(self.dropout(x)), STRIDES[0])
        else:
            x, _ = ops.temporal_maximum(x.unflatten(0, (B, T)), valids[0], STRIDES[0])
            logits = self.classifier(self.dropout(x))
        logits = logits[..., :H, :W]
        return logits.unflatten(0, (B, T)) if self.per_frame else logits

    def _fused(self, maps: list[Tensor], valids: list[Tensor | None]) -> Tensor:
        """The pyramid (M, D_i, h_i, w_i) as one map (M, D, h_1, w_1)."""
        if self.upernet is None:
            return torch.cat([resize(x, maps[0]) for x in maps], 1)
        return self.upernet(maps, valids)
