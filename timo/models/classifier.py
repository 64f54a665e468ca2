"""Classification of series or of frames."""

from torch import Tensor, nn

from timo.models.encoder import Encoder
from timo.models.inputs import check_series
from timo.models.weights import initialise


class Classifier(nn.Module):
    """Mean of the last feature map over valid tokens, then linear (specification: model.md §4).

    Args:
        encoder: the encoder.
        num_classes: classes.
        per_frame: predict every frame by itself, not the series.
    """

    def __init__(self, encoder: Encoder, num_classes: int, per_frame: bool = False):
        super().__init__()
        self.encoder = encoder
        self.per_frame = per_frame
        self.head = nn.Linear(encoder.embed_dims[-1], num_classes)
        self.head.apply(initialise)

    def extra_repr(self) -> str:
        return f"per_frame={self.per_frame}"

    def forward(
        self, frames: Tensor, dates: Tensor | None = None, valid: Tensor | None = None
    ) -> Tensor:
        """Logits (B, classes), or (B, T, classes) per frame.

        Arguments and errors as `Encoder.forward`. Where nothing is valid the mean is 0.
        """
        encoder = self.encoder
        check_series(frames, dates, valid, encoder.stem.conv.weight, encoder.temporal_position)
        maps, valids = encoder.features(frames, dates, valid)
        x, usable = maps[-1].flatten(3), valids[-1]  # [B, T, D, h·w]
        dims = (3,) if self.per_frame else (1, 3)
        if usable is None:
            return self.head(x.mean(dims))
        usable = (usable if usable.ndim == 4 else usable[:, :, None, None]).flatten(2)
        count = usable.expand(*x.shape[:2], x.shape[3]).sum([d - (d == 3) for d in dims])
        return self.head(x.sum(dims) / count.clamp_min(1).unsqueeze(-1))  # invalid tokens are 0
