"""Features that a model computes from tokens, and their poolings.

Shapes: B inputs, T tokens, D channels, P channels of ``pooled`` or of ``joint``.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from torch import Tensor, cat, nn

from d2v_composer.models.names import TargetSource

ResultT = TypeVar("ResultT")
Layers = Iterable[tuple[Tensor, Tensor]]
"""Each block's output and FFN output, (B, T, D) each."""


def mean_over_time(x_BTD: Tensor, num_extra_tokens: int = 0, padding_mask: Tensor | None = None) -> Tensor:
    """Return the mean over all tokens that are neither extra tokens nor padding, (B, 1, D)."""
    x_BTD = x_BTD[:, num_extra_tokens:]
    if padding_mask is None:
        return x_BTD.mean(dim=1, keepdim=True)
    padding_BT1 = padding_mask[:, num_extra_tokens:, None]
    return x_BTD.masked_fill(padding_BT1, 0).sum(dim=1, keepdim=True) / (~padding_BT1).sum(dim=1, keepdim=True)


@dataclass(eq=False)
class Features:
    """The results of a model's blocks; each read of :attr:`output` or call of :meth:`layers` calls :attr:`run`."""

    run: Callable[[bool], Layers]
    """Runs the blocks and yields each block's results; if the argument is false, the last output may be ``None``."""
    num_layers: int
    """Number of blocks."""
    norm: Callable[[Tensor], Tensor]
    """The final norm, after the last block."""
    num_extra_tokens: int
    """Number of leading tokens that are neither patches nor frames."""
    has_cls_token: bool
    """True if the first extra token is CLS."""
    padding_mask: Tensor | None = None
    """Mask of the tokens, (B, T) bool, true for padding."""
    window_weights: Tensor | None = None
    """See :class:`~d2v_composer.models.encoder.Inputs`."""
    pooled: Tensor | None = None
    """The pooled feature, (B, P), of a model that pools its features itself."""
    joint: Callable[[Tensor], Tensor] | None = None
    """Computes the embedding ``joint``, (B, P), from the output; ``None``: the model has no ``joint``."""

    @classmethod
    def of_layer(
        cls, x_BTD: Tensor, num_extra_tokens: int, has_cls_token: bool, pooled: Tensor | None = None
    ) -> "Features":
        """Return the features of a model whose only layer outputs ``x_BTD``."""
        return cls(lambda _: [(x_BTD, x_BTD)], 1, nn.Identity(), num_extra_tokens, has_cls_token, pooled=pooled)

    def layers(self, source: TargetSource = "ffn") -> Iterator[Tensor]:
        """Yield each block's FFN output, (B, T, D), or with the source ``block`` each block's output."""
        if source == "ffn":
            return (ffn_output for _, ffn_output in self.run(False))
        return (output for output, _ in self.run(True))

    @property
    def output(self) -> Tensor:
        """The last block's output after the final norm, (B, T, D)."""
        output: Any = None
        for output, _ in self.run(True):  # noqa: B007  (the last one)
            pass
        return self.norm(output)

    def with_output(self, read: Callable[[Iterator[Tensor]], ResultT]) -> tuple[Tensor, ResultT]:
        """Run the blocks once; return the output, and the result of ``read``, which must read all FFN outputs."""
        output: Any = None

        def ffn_outputs() -> Iterator[Tensor]:
            nonlocal output
            for output, ffn_output in self.run(True):  # noqa: B007
                yield ffn_output

        result = read(ffn_outputs())
        return self.norm(output), result

    def without_registers(self) -> "Features":
        """Return features without the extra tokens that are not CLS."""
        num_kept = int(self.has_cls_token)
        if self.num_extra_tokens == num_kept:
            return self

        def keep(x_BTD: Any) -> Any:  # the last block's output may be missing
            return None if x_BTD is None else cat([x_BTD[:, :num_kept], x_BTD[:, self.num_extra_tokens :]], dim=1)

        def run(needs_last_output: bool) -> Layers:
            return ((keep(output), keep(ffn_output)) for output, ffn_output in self.run(needs_last_output))

        return replace(self, run=run, num_extra_tokens=num_kept)

    def for_readers(self, count: int) -> "Features":
        """Return features for ``count`` readers; for several readers, the results of the blocks are kept in memory."""
        if count == 1:
            return self
        layers = list(self.run(True))
        return replace(self, run=lambda _: layers)

    def poolings(self, x_BTD: Tensor, prefix: str = "") -> dict[str, Tensor]:
        """Return ``prefix`` + pooling → pooled features, (B, channels) float32; a clip's windows are averaged."""
        x_BTD = x_BTD.float()
        cls_BP = x_BTD[:, 0] if self.pooled is None else self.pooled.float()
        pooled = {"cls": cls_BP} if self.has_cls_token else {}
        pooled["mean"] = mean_over_time(x_BTD, 0, self.padding_mask)[:, 0]
        pooled["mean_patches"] = mean_over_time(x_BTD, self.num_extra_tokens, self.padding_mask)[:, 0]
        if self.window_weights is not None:
            weights_BW1 = self.window_weights[..., None]
            pooled = {
                name: (weights_BW1 * tensor.unflatten(0, self.window_weights.shape)).sum(1)
                for name, tensor in pooled.items()
            }
        return {f"{prefix}{name}": tensor for name, tensor in pooled.items()}
