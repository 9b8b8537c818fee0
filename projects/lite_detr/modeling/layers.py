"""The small parts that detectors are built from, and stacks of layers."""

import copy
import math

import torch
from torch import Tensor, nn

from ..errors import ConfigError


class FeedForward(nn.Module):
    """``norm(x + linear2(relu(linear1(x))))``, with dropout after both linear layers.

    Args:
        embed_dim: channels ``C``.
        hidden_dim: width of the hidden layer.
        dropout: probability of zeroing an activation in training.
    """

    def __init__(self, embed_dim: int = 256, hidden_dim: int = 1024, dropout: float = 0.1):
        super().__init__()
        self.linear1 = nn.Linear(embed_dim, hidden_dim)
        self.linear2 = nn.Linear(hidden_dim, embed_dim)
        self.norm = nn.LayerNorm(embed_dim)
        self.activation = nn.ReLU()
        self.dropout = nn.Dropout(dropout)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for linear in (self.linear1, self.linear2):
            nn.init.xavier_uniform_(linear.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        """``[B, N, C]`` -> ``[B, N, C]``"""
        hidden = self.dropout(self.activation(self.linear1(tokens)))
        return self.norm(tokens + self.dropout(self.linear2(hidden)))


class MLP(nn.Sequential):
    """``num_layers`` linear layers with ReLUs between them."""

    def __init__(self, in_dim: int, hidden_dim: int, out_dim: int, num_layers: int):
        dims = [in_dim] + [hidden_dim] * (num_layers - 1) + [out_dim]
        layers: list[nn.Module] = []
        for index in range(num_layers):
            layers += [nn.Linear(dims[index], dims[index + 1]), nn.ReLU()]
        super().__init__(*layers[:-1])


class SinePositionEncoding(nn.Module):
    """Encode each cell of a map by its place in the part that is not padding.

    Args:
        embed_dim: channels ``C``, half of them for y, half for x.
        temperature: ratio of the longest to the shortest wavelength.
        offset: added to the 1-based cell index; -0.5 encodes the cell's centre.

    Raises:
        ConfigError: ``embed_dim`` is not a multiple of 4.
    """

    def __init__(self, embed_dim: int, temperature: float = 10000.0, offset: float = -0.5):
        super().__init__()
        if embed_dim % 4:
            raise ConfigError(f"embed_dim must be a multiple of 4, got {embed_dim}")
        self.embed_dim = embed_dim
        self.temperature = temperature
        self.offset = offset

    def forward(self, mask: Tensor) -> Tensor:
        """``[B, H, W]`` bool, True on padding -> ``[B, H * W, C]`` in float32."""
        y = (~mask).cumsum(1, dtype=torch.float32)
        x = (~mask).cumsum(2, dtype=torch.float32)
        eps = 1e-6  # for rows and columns that are all padding
        y = (y + self.offset) / (y[:, -1:, :] + eps) * 2 * math.pi
        x = (x + self.offset) / (x[:, :, -1:] + eps) * 2 * math.pi
        feats = self.embed_dim // 2
        encoding = torch.cat(
            [sine_embedding(axis, feats, self.temperature) for axis in (y, x)], dim=-1
        )
        return encoding.flatten(1, 2)


def sine_embedding(positions: Tensor, num_feats: int, temperature: float) -> Tensor:
    """Return interleaved sines and cosines (Attention is all you need, section 3.5).

    Args:
        positions: ``[...]``, in radians of the longest wave.
        num_feats: values per position, an even number.
        temperature: ratio of the longest to the shortest wavelength.

    Returns:
        ``[..., num_feats]``
    """
    exponents = torch.arange(0, num_feats, 2, dtype=positions.dtype, device=positions.device)
    angles = positions[..., None] / temperature ** (exponents / num_feats)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2)


def clone_layers(layer: nn.Module, num_layers: int) -> nn.ModuleList:
    """Return ``num_layers`` copies of a layer, each with freshly drawn weights.

    Configs describe a layer once; plain copies would all start from the same weights. Children are
    reset before their parents, so a module's own initialisation overrides PyTorch's defaults for
    its parts.
    """
    layers = nn.ModuleList(copy.deepcopy(layer) for _ in range(num_layers))
    for module in reversed(list(layers.modules())):
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return layers
