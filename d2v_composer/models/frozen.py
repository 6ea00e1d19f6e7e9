"""Modules that nobody may train."""

import torch
from torch import nn
from typing_extensions import Self

__all__ = ["Frozen"]


class Frozen(nn.Module):
    """A module that stays in eval mode and takes no gradient, whatever its parents are told.

    ``Trainer.fit`` and ``model_eval_mode`` call ``model.train(mode=True)`` on the whole tree; here the call is
    answered, not obeyed. Call :meth:`freeze` once the parameters exist.
    """

    def freeze(self) -> Self:
        self.requires_grad_(False)
        return self.eval()

    def train(self, mode: bool = True) -> Self:
        return super().train(False)

    def cast_weights(self, dtype: torch.dtype) -> Self:
        """Keep the weights of linear and convolution layers in the dtype that autocast computes in.

        It casts them to the same values in every step otherwise. LayerNorms, positions and extra tokens, which it
        computes with in float32, stay as they are.
        """
        for layer in self.modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                layer.to(dtype)
        return self
