"""Segmentation of series or of frames."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timo.layers.validity import per_map
from timo.models.encoder import STRIDES, Encoder
from timo.models.inputs import check_series, pad_frames, pad_valid
from timo.models.upernet import UPerNet, resize
from timo.models.weights import initialise


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
            maps = [greatest(x, v).unsqueeze(1) for x, v in zip(maps, valids)]
            valids = [None if v is None else v.any(1, keepdim=True) for v in valids]
        x = self._fused([x.flatten(0, 1) for x in maps], [per_map(v) for v in valids])
        if self.per_frame or self.temporal_pool == "encoder":
            # Weighted means of positions and of channels, in either order: the classes are fewer.
            logits = enlarge(self.classifier(self.dropout(x)), STRIDES[0])
        else:
            x = greatest(x.unflatten(0, (B, T)), valids[0], STRIDES[0])
            logits = self.classifier(self.dropout(x))
        logits = logits[..., :H, :W]
        return logits.unflatten(0, (B, T)) if self.per_frame else logits

    def _fused(self, maps: list[Tensor], valids: list[Tensor | None]) -> Tensor:
        """The pyramid (M, D_i, h_i, w_i) as one map (M, D, h_1, w_1)."""
        if self.upernet is None:
            return torch.cat([resize(x, maps[0]) for x in maps], 1)
        return self.upernet(maps, valids)


def enlarge(x: Tensor, factor: int) -> Tensor:
    """Bilinear upsampling of (M, C, h, w)."""
    if factor == 1:
        return x
    return F.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=False)


def greatest(x: Tensor, valid: Tensor | None, factor: int = 1) -> Tensor:
    """Maximum over valid dates of enlarged maps; 0 where there is none.

    One date after the other, for at full resolution a map has up to 2048 channels; all at once
    where a graph is exported, which is for any number of dates.

    Args:
        x: (B, T, C, h, w).
        valid: None, (B, T) or (B, T, h, w) bool.
        factor: of the enlargement, ahead of the maximum.

    Returns:
        (B, C, factor·h, factor·w).
    """
    usable = None
    if valid is not None:
        usable = valid[:, :, None] if valid.ndim == 4 else valid[:, :, None, None, None]
        if valid.ndim == 4:
            usable = usable.repeat_interleave(factor, 3).repeat_interleave(factor, 4)

    def date(t: int) -> Tensor:
        map_ = enlarge(x[:, t], factor)
        return map_ if usable is None else torch.where(usable[:, t], map_, -torch.inf)

    if torch.compiler.is_exporting():
        maps = enlarge(x.flatten(0, 1), factor).unflatten(0, x.shape[:2])
        best = (maps if usable is None else torch.where(usable, maps, -torch.inf)).amax(1)
    else:
        best = date(0)
        for t in range(1, x.shape[1]):
            best = torch.maximum(best, date(t))
    return best if usable is None else torch.where(usable.any(1), best, 0)
