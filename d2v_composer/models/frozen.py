"""Modules that do not train."""

import torch
from torch import nn
from typing_extensions import Self

__all__ = ["Frozen"]


class Frozen(nn.Module):
    """A module that stays in eval mode and takes no gradient. Call :meth:`freeze` once the parameters exist.

    ``Trainer.fit`` and ``model_eval_mode`` call ``model.train(mode=True)`` on the whole model; here it has no effect.
    """

    def freeze(self) -> Self:
        self.requires_grad_(False)
        return self.eval()

    def train(self, mode: bool = True) -> Self:
        return super().train(False)

    def cast_weights(self, dtype: torch.dtype) -> Self:
        """Cast the weights of linear and convolution layers to autocast's dtype once, instead of in every step.

        LayerNorms, positions and extra tokens keep float32, in which autocast computes with them.
        """
        for layer in self.modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                layer.to(dtype)
        return self
