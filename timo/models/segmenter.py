"""Segmentation of series or of frames."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timo.layers.validity import per_map
from timo.models.encoder import STRIDES, Encoder
from timo.models.inputs import check_series
from timo.models.upernet import UPerNet
from timo.models.weights import initialise


class Segmenter(nn.Module):
    """Encoder, UPerNet head, maximum over valid dates, 1×1 classifier (specification: model.md §4).

    Args:
        encoder: the encoder.
        num_classes: classes.
        temporal_pool: "decoder" takes the maximum over dates of the head's upsampled output, as
            the published code; "encoder" that of the feature pyramid, T times cheaper.
        per_frame: no maximum, one map per frame.
    """

    def __init__(
        self,
        encoder: Encoder,
        num_classes: int,
        temporal_pool: str = "decoder",
        per_frame: bool = False,
    ):
        super().__init__()
        self.encoder = encoder
        self.temporal_pool, self.per_frame = temporal_pool, per_frame
        dim = encoder.embed_dims[-1]
        self.upernet = UPerNet(encoder.embed_dims, dim)
        self.dropout = nn.Dropout2d(0.1)
        self.classifier = nn.Conv2d(dim, num_classes, 1)
        self.classifier.apply(initialise)

    def extra_repr(self) -> str:
        return f"temporal_pool={self.temporal_pool!r}, per_frame={self.per_frame}"

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
        maps, valids = encoder.features(frames, dates, valid)
        if self.temporal_pool == "encoder":
            maps = [greatest(x, v).unsqueeze(1) for x, v in zip(maps, valids)]
            valids = [None if v is None else v.any(1, keepdim=True) for v in valids]
        x = self.upernet([x.flatten(0, 1) for x in maps], [per_map(v) for v in valids])
        if self.per_frame or self.temporal_pool == "encoder":
            x = enlarge(x)
        else:
            x = self._greatest_enlarged(x.unflatten(0, (B, T)), valids[0])
        logits = self.classifier(self.dropout(x))[..., :H, :W]
        return logits.unflatten(0, (B, T)) if self.per_frame else logits

    def _greatest_enlarged(self, x: Tensor, valid: Tensor | None) -> Tensor:
        """Maximum over valid dates of the enlarged maps: (B, T, C, h, w) -> (B, C, 4h, 4w).

        One date after the other, for at full resolution a map has up to 2048 channels.
        """
        lowest, best, known = torch.finfo(x.dtype).min, None, None
        for t in range(x.shape[1]):
            map_ = enlarge(x[:, t])
            if valid is not None:
                usable = valid[:, t, None, None, None] if valid.ndim == 2 else valid[:, t, None]
                if valid.ndim == 4:
                    usable = usable.repeat_interleave(4, 2).repeat_interleave(4, 3)
                map_ = torch.where(usable, map_, lowest)
                known = usable if known is None else known | usable
            best = map_ if best is None else torch.maximum(best, map_)
        return best if known is None else torch.where(known, best, 0)


def enlarge(x: Tensor) -> Tensor:
    """Bilinear upsampling of (M, C, h, w) from stride 4 to pixels."""
    return F.interpolate(x, scale_factor=STRIDES[0], mode="bilinear", align_corners=False)


def greatest(x: Tensor, valid: Tensor | None) -> Tensor:
    """Maximum over valid dates, (B, T, C, h, w) -> (B, C, h, w); 0 where there is none."""
    if valid is None:
        return x.amax(1)
    valid = valid[:, :, None] if valid.ndim == 4 else valid[:, :, None, None, None]
    best = torch.where(valid, x, torch.finfo(x.dtype).min).amax(1)
    return torch.where(valid.any(1), best, 0)
