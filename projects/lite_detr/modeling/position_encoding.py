"""Sine position encoding of maps and boxes."""

import math

import torch
from torch import Tensor, nn


def sine_embedding(positions: Tensor, num_feats: int, temperature: float) -> Tensor:
    """Interleaved sines and cosines of positions (Attention is all you need, section 3.5).

    Args:
        positions: ``[...]``, in radians of the longest wave.
        num_feats: the number of values for a position, even.

    Returns:
        ``[..., num_feats]``
    """
    exponents = torch.arange(0, num_feats, 2, dtype=positions.dtype, device=positions.device)
    angles = positions[..., None] / temperature ** (exponents / num_feats)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2)


class SinePositionEncoding(nn.Module):
    """Encodes each cell of a map by its place in the part that is no padding.

    Args:
        embed_dim: channels ``C``, half of them for y, half for x.
        temperature: ratio of the longest to the shortest wavelength.
        offset: added to the 1-based cell index; -0.5 encodes the cell's centre.
    """

    def __init__(self, embed_dim: int, temperature: float = 10000.0, offset: float = -0.5):
        super().__init__()
        if embed_dim % 4:
            raise ValueError(f"embed_dim must be a multiple of 4, got {embed_dim}")
        self.embed_dim = embed_dim
        self.temperature = temperature
        self.offset = offset

    def forward(self, mask: Tensor) -> Tensor:
        """``[B, H, W]`` bool, True on padding -> ``[B, H * W, C]`` in float32."""
        y = (~mask).cumsum(1, dtype=torch.float32)
        x = (~mask).cumsum(2, dtype=torch.float32)
        eps = 1e-6  # cells of padding have whole rows or columns that count nothing
        y = (y + self.offset) / (y[:, -1:, :] + eps) * 2 * math.pi
        x = (x + self.offset) / (x[:, :, -1:] + eps) * 2 * math.pi
        feats = self.embed_dim // 2
        encoding = torch.cat(
            [sine_embedding(axis, feats, self.temperature) for axis in (y, x)], dim=-1
        )
        return encoding.flatten(1, 2)
