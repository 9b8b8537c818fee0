"""Encoder layers that are computed twice in training, to need less memory."""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .encoder import EncoderLayer


class CheckpointedEncoderLayer(EncoderLayer):
    """An encoder layer that keeps only its input for the backward pass.

    What lies between input and output is computed once more when the backward pass comes to it,
    with the same dropout and in the same precision, so that the gradients are the same. Names of
    parameters are those of :class:`EncoderLayer`. Hooks of the parts within see each training pass
    twice. Without gradients it is an :class:`EncoderLayer`.
    """

    def forward(self, *args, **options) -> Tensor:
        """See :meth:`EncoderLayer.forward`."""
        if not torch.is_grad_enabled():
            return super().forward(*args, **options)
        return checkpoint(super().forward, *args, use_reentrant=False, **options)
