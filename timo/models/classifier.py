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
        return self.head(mean_of_valid(maps[-1], valids[-1], self.per_frame))


def mean_of_valid(x: Tensor, valid: Tensor | None, per_frame: bool) -> Tensor:
    """Mean of a feature map over the valid tokens of a series, or of each frame; 0 without any.

    Args:
        x: (B, T, D, h, w), 0 at invalid tokens.
        valid: None, (B, T) or (B, T, h, w) bool.
        per_frame: a mean for every frame.

    Returns:
        (B, D), or (B, T, D) per frame.
    """
    x = x.flatten(3)  # [B, T, D, h·w]
    dims = (3,) if per_frame else (1, 3)
    if valid is None:
        return x.mean(dims)
    valid = (valid if valid.ndim == 4 else valid[:, :, None, None]).flatten(2)
    count = valid.expand(*x.shape[:2], x.shape[3]).sum([d - (d == 3) for d in dims])
    return x.sum(dims) / count.clamp_min(1).unsqueeze(-1)
