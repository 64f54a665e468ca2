"""The masked autoencoder in its dense published form, for comparison with the fast path.

Written from the specification (model.md §2): the whole masked image goes through the stem, tokens
are unfolded into units and picked by boolean indexing, every token of the decoder goes to the
pixel head, and the target is a tensor of all units.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timo.layers import JointAttention
from timo.layers.position import grid_code
from timo.models import MaskedAutoencoder
from timo.models.inputs import UNIT


class DenseAutoencoder(nn.Module):
    """The dense form with the parameters of `model`, which it shares.

    Args:
        model: the autoencoder whose weights it uses and trains.
        fused: attention through `scaled_dot_product_attention`, not by a table of weights.
    """

    def __init__(self, model: MaskedAutoencoder, fused: bool = False):
        super().__init__()
        self.model, self.fused = model, fused

    def forward(self, frames: Tensor, visible_ids: Tensor) -> Tensor:
        """Loss of (B, T, C, H, W) normalised frames, of which units `visible_ids` are shown."""
        encoder, decoder = self.model.encoder, self.model.decoder
        B, T, C, H, W = frames.shape
        rows, columns = H // UNIT, W // UNIT
        visible = torch.zeros((B, T * rows * columns), dtype=torch.bool, device=frames.device)
        visible = visible.scatter(1, visible_ids, True)
        pixels = visible.view(B, T, 1, rows, columns)
        pixels = pixels.repeat_interleave(UNIT, 3).repeat_interleave(UNIT, 4)
        x = encoder.stem((frames * pixels).flatten(0, 1)).unflatten(0, (B, T))
        time = torch.arange(T, device=frames.device)
        h, w, dim = x.shape[2:]
        x = x + grid_code(time, h, w, dim, x.dtype)
        x = unfold(x.permute(0, 1, 4, 2, 3), rows, columns)  # [B, units, D·8·8]
        x = x[visible].view(-1, encoder.embed_dims[0], 8, 8).permute(0, 2, 3, 1)
        for stage in (encoder.stage1, encoder.stage2, encoder.stage3, encoder.stage4):
            if stage is not encoder.stage1:
                x = stage.embed(x)
            shape = x.shape  # [B·K, s, s, D]
            x = x.reshape(B, -1, shape[-1])
            for block in stage.blocks:
                x = self._block(block, x)
            x = stage.norm(x).view(shape)
        latent = plain(decoder.embed, x.reshape(B, -1, x.shape[-1]))  # [B, K, D]
        token = decoder.mask_token.to(latent.dtype)
        tokens = token.expand(B, visible.shape[1], -1).clone()
        tokens[visible] = latent.flatten(0, 1)
        code = grid_code(time, rows, columns, latent.shape[-1]).flatten(0, 2)
        tokens = tokens + code.to(tokens.dtype)
        for block in decoder.blocks:
            tokens = self._block(block, tokens)
        pred = plain(decoder.pred, decoder.norm(tokens))  # [B, units, C·32·32]
        target = unfold(frames, rows, columns)
        hidden = ~visible
        target = target[hidden]
        if self.model.pixel_norm == "patch":
            spread = target.var(1, keepdim=True) + 1e-6
            target = (target - target.mean(1, keepdim=True)) / spread.sqrt()
        elif self.model.pixel_norm == "batch":
            target = (target - target.mean()) / (target.var() + 1e-6).sqrt()
        return (pred[hidden] - target).square().mean()

    def _block(self, block: Any, x: Tensor) -> Tensor:
        """A `timo.layers.Block`, of whose type its list does not know."""
        x = x + self._attention(block.attn, block.norm1(x))
        hidden = F.gelu(plain(block.mlp.fc1, block.norm2(x)))
        return x + plain(block.mlp.fc2, hidden)

    def _attention(self, attention: JointAttention, x: Tensor) -> Tensor:
        heads = (attention.num_heads, -1)
        q = plain(attention.q, x).unflatten(-1, heads).transpose(1, 2)  # [B, H, L, D]
        k, v = plain(attention.kv, x).unflatten(-1, (2, *heads)).permute(2, 0, 3, 1, 4)
        if self.fused:
            out = F.scaled_dot_product_attention(q, k, v)
        else:
            out = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v
        return plain(attention.proj, out.transpose(1, 2).flatten(2))


def plain(layer: nn.Linear, x: Tensor) -> Tensor:
    """The layer as PyTorch computes it."""
    return F.linear(x, layer.weight, layer.bias)


def unfold(x: Tensor, rows: int, columns: int) -> Tensor:
    """Maps (B, T, C, h, w) as their units, (B, T·rows·columns, C·s·s), channel-major."""
    x = x.unflatten(4, (columns, -1)).unflatten(3, (rows, -1))  # [B, T, C, rows, s, columns, s]
    return x.permute(0, 1, 3, 5, 2, 4, 6).flatten(4).flatten(1, 3)
