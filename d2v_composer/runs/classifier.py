"""A classifier for Composer: a linear head on the embedding of a student or a teacher.

Shapes: B images, or clips of L audio samples; D channels, C classes.
"""

from collections.abc import Sequence

import torch
from composer.models import ComposerModel
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MulticlassAccuracy

from d2v_composer.models.backbone import Backbone, check_tensors, freeze_unused_parameters
from d2v_composer.models.encoder import Inputs
from d2v_composer.models.precision import cpu_autocast

Batch = Sequence[Tensor]
# data2vec's positions are a fixed table of sines, not weights.
FIXED = "fixed_positional_encoder."


class Classifier(ComposerModel):
    """Train a student or a teacher with a linear head to classify samples.

    A batch has images, (B, 3, height, width) uint8 or normalized float, or waveforms, (B, L) float; then labels, (B,)
    int64, or class probabilities, (B, C) float; then, if waveforms are padded, the number of audio samples in each
    waveform, (B,) int64.

    Parameters on which the embedding does not depend are frozen.

    Args:
        backbone: Student or teacher; ``requires_grad`` of its parameters is changed.
        num_classes: Number of classes, C.
        train_encoder: Also train the encoder, except fixed positions.
        cpu_bf16: Compute in bfloat16 autocast on a CPU, where Composer's Trainer only accepts fp32.

    Attributes:
        head: Linear layer from D channels to C classes, initially zeros.
        depth_of_trained: Name of each trained parameter → its depth: in a block, the block's number, from 1, where the
            encoder's blocks come first; in ``input_proj``, the number of the first block after the encoder; in the
            encoder's other layers, 0; after the last block, the number of blocks + 1.
    """

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        train_encoder: bool = False,
        cpu_bf16: bool = False,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.cpu_bf16 = cpu_bf16
        if not train_encoder:
            backbone.encoder.freeze()  # a BatchNorm's statistics, too
        backbone.requires_grad_(True)
        for name, parameter in backbone.encoder.named_parameters():
            parameter.requires_grad_(train_encoder and not name.startswith(FIXED))
        embedded = self.embed(Inputs(backbone.encoder.example(1)))
        freeze_unused_parameters(backbone, embedded)
        self.head = nn.Linear(embedded.shape[-1], num_classes)
        for parameter in self.head.parameters():
            nn.init.zeros_(parameter)
        self.depth_of_trained = {
            name: self._depth(name) for name, parameter in self.named_parameters() if parameter.requires_grad
        }
        self.metrics: dict[str, Metric] = {
            f"top{k}": MulticlassAccuracy(num_classes, top_k=k, average="micro") for k in (1, 5) if k < num_classes
        }
        self.metrics["loss"] = MeanMetric()
        # Constants, and equal on all ranks: DDP would broadcast them before every forward pass.
        self._ddp_params_and_buffers_to_ignore = [name for name, _ in self.named_buffers()]
        self.register_load_state_dict_pre_hook(check_tensors)

    def forward(self, batch: Batch) -> Tensor:
        """Compute the logits of a batch, (B, C) float32."""
        with cpu_autocast(self.cpu_bf16):
            values, _, *lengths = batch
            return self.head(self.embed(Inputs(values, *lengths))).float()

    def embed(self, inputs: Inputs) -> Tensor:
        """Compute the embeddings of images or waveforms, (B, D), with gradient."""
        return self.backbone.read(self.backbone.features(self.backbone.encoder(inputs)))

    @torch.no_grad()
    def prepare(self, batch: Batch) -> Batch:
        """Return the batch with resized and normalized images, or with unchanged waveforms."""
        values, *rest = batch
        return self.backbone.encoder.normalized(values), *rest

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Return the cross entropy, a scalar."""
        return cross_entropy(outputs, batch[1])

    def get_metrics(self, is_train: bool) -> dict[str, Metric]:
        """Return the metrics of an evaluation: top-1, top-5 if there are more than five classes, and the loss."""
        return {} if is_train else self.metrics

    def update_metric(self, batch: Batch, outputs: Tensor, metric: Metric) -> None:
        if isinstance(metric, MeanMetric):
            metric.update(self.loss(outputs, batch), weight=len(outputs))
        else:
            metric.update(outputs, batch[1])

    def _depth(self, name: str) -> int:
        blocks = [*self.backbone.encoder.block_list, *self.backbone.block_list]
        weight = self.get_parameter(name)
        for number, block in enumerate(blocks, 1):
            if any(weight is parameter for parameter in block.parameters()):
                return number
        if name.startswith("backbone.input_proj."):  # a narrow student's; trains with its first block
            return len(self.backbone.encoder.block_list) + 1
        return 0 if name.startswith("backbone.encoder.") else len(blocks) + 1
