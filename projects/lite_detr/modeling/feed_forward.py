"""The feed-forward network of encoder and decoder layers."""

from torch import Tensor, nn


class FeedForward(nn.Module):
    """``norm(x + linear2(relu(linear1(x))))``, with dropout behind both linear layers.

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
