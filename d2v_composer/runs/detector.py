"""A detector for Composer: torchvision's RetinaNet on the feature maps of a student.

Shapes: B images, up to M boxes in each, C channels of a map.
"""

import math
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from composer.models import ComposerModel
from composer.utils import dist
from timm.models import group_parameters
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchmetrics import Metric
from torchmetrics.detection import MeanAveragePrecision
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from d2v_composer.models.backbone import Backbone, freeze_unused_parameters
from d2v_composer.models.configs import height_and_width
from d2v_composer.models.encoder import Inputs
from d2v_composer.models.precision import cpu_autocast
from d2v_composer.models.timm_network import TimmStudent

Batch = Sequence[Tensor]
# Stride of the first map, and sizes of the anchors in strides, as in torchvision.
FIRST_STRIDE = 8
SIZES, RATIOS = (4, 4 * 2 ** (1 / 3), 4 * 2 ** (2 / 3)), (0.5, 1.0, 2.0)


class Norm(nn.GroupNorm):
    """GroupNorm that also takes groups of a single value."""

    def forward(self, input: Tensor) -> Tensor:
        return torch.group_norm(input, self.num_groups, self.weight, self.bias, self.eps)


class FeatureMaps(nn.Module):
    """A student with a feature pyramid, as the backbone of torchvision's detector.

    Args:
        student: The student whose feature maps are used.
        channels: Number of channels of the pyramid's maps.

    Attributes:
        strides: Stride of each of the pyramid's maps, in pixels.
    """

    def __init__(self, student: Backbone, channels: int) -> None:
        super().__init__()
        self.student, self.out_channels = student, channels
        self.indices: list[int] | None = None
        maps, (height, _) = self.maps(student.encoder.example(1)), height_and_width(student.encoder.config.image_size)
        last_of_stride = {height // grid.shape[2]: index for index, grid in enumerate(maps)}
        self.strides = [stride for stride in last_of_stride if stride >= min(FIRST_STRIDE, max(last_of_stride))]
        self.indices = [last_of_stride[stride] for stride in self.strides]
        self.strides += [2 * self.strides[-1], 4 * self.strides[-1]]
        widths = [maps[index].shape[1] for index in self.indices]
        self.pyramid = FeaturePyramidNetwork(widths, channels, LastLevelP6P7(channels, channels))

    def maps(self, images: Tensor) -> list[Tensor]:
        """Return the feature maps, each (B, C, rows, columns), of normalized images, (B, 3, height, width) float."""
        student = self.student
        if isinstance(student, TimmStudent):
            return student.encoder.model.forward_intermediates(images, self.indices, intermediates_only=True)
        cells = student.features(student.encoder(Inputs(images))).output[:, student.num_extra_tokens :]
        return [cells.transpose(1, 2).unflatten(2, student.encoder.config.grid_size)]

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return self.pyramid(OrderedDict((str(level), grid) for level, grid in enumerate(self.maps(images))))


class AveragePrecision(MeanAveragePrecision):
    """COCO's average precision, 0 to 1: a mean over classes and ``iou_thresholds``; -1 if there are no annotations."""

    def compute(self) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return super().compute()["map"]

    def _sync_dist(self, *_: Any, **__: Any) -> None:
        # torchmetrics would wait forever if one rank has more images than another.
        for name in self._reductions:
            of_ranks = dist.all_gather_object([tensor.cpu() for tensor in getattr(self, name)])
            setattr(self, name, [tensor for of_rank in of_ranks for tensor in of_rank])


class Detector(ComposerModel):
    """Train a detector on the feature maps of a student.

    A batch is images, (B, 3, height, width) uint8; boxes, (B, M, 4) float: left, top, right, bottom in pixels; classes,
    (B, M) int64, from 1, and 0 where there is no box; and crowds, (B, M) bool: True for regions of a test image in
    which detections are not errors.

    The encoder of a student that is not a timm model is frozen, and so is each parameter on which the feature maps do
    not depend. A BatchNorm without trained weights keeps its statistics.

    Args:
        student: The student; ``requires_grad`` of its parameters is changed.
        num_classes: Number of classes.
        channels: Number of channels of the feature pyramid and of the heads.
        frozen_stages: Number of parts of the student that are not trained, counted from its input; see
            :func:`stages_of`.
        cpu_bf16: Compute in bfloat16 autocast on a CPU, where Composer's Trainer only accepts fp32.

    Attributes:
        depth_of_trained: Name of each trained parameter → 0 in the student, 1 in the detector's other parts.
    """

    STUDENT = "net.backbone.student."
    """Prefix of the student's tensors in a checkpoint."""

    def __init__(
        self,
        student: Backbone,
        num_classes: int,
        channels: int = 256,
        frozen_stages: int = 0,
        cpu_bf16: bool = False,
    ) -> None:
        super().__init__()
        self.cpu_bf16 = cpu_bf16
        sizes, features = student.encoder.config, FeatureMaps(student.eval(), channels)
        student.requires_grad_(True)
        if not isinstance(student, TimmStudent):
            student.encoder.freeze()
        maps = features.maps(student.encoder.example(1))
        freeze_unused_parameters(student, torch.stack([grid.sum() for grid in maps]))
        for stage in stages_of(student)[:frozen_stages]:
            for parameter in stage:
                parameter.requires_grad_(False)
        anchors = tuple(tuple(round(stride * size) for size in SIZES) for stride in features.strides)
        # Norms, as in torchvision's second version: without them, narrow heads hardly learn. 32 channels in 4 groups
        # learned half as much as in 32: an AP50 of 3.8 % instead of 9.3 % (detect.md's ResNet-18, random, seed 1).
        norm = partial(Norm, math.gcd(32, channels))
        shape = height_and_width(sizes.image_size)
        self.net = RetinaNet(
            features,
            num_classes + 1,  # no box has class 0
            min(shape),  # so torchvision does not resize
            max(shape),
            sizes.image_mean,
            sizes.image_std,
            AnchorGenerator(anchors, (RATIOS,) * len(anchors)),
            RetinaNetHead(channels, len(SIZES) * len(RATIOS), num_classes + 1, norm),
            detections_per_img=100,  # as many as COCO counts
            size_divisible=1,
        )
        self.depth_of_trained = {
            name: int(not name.startswith(self.STUDENT))
            for name, parameter in self.named_parameters()
            if parameter.requires_grad
        }
        self.metrics: dict[str, Metric] = {
            "map": AveragePrecision(backend="pycocotools"),
            "map_50": AveragePrecision(backend="pycocotools", iou_thresholds=[0.5]),
        }

    def train(self, mode: bool = True) -> "Detector":
        super().train(mode)
        for module in self.modules():
            if isinstance(module, _BatchNorm) and not (module.weight is not None and module.weight.requires_grad):
                module.eval()
        return self

    def forward(self, batch: Batch) -> Any:
        """Return the losses of a batch by name or, in eval mode, each image's detected boxes, labels and scores."""
        with cpu_autocast(self.cpu_bf16):
            return self.net(list(batch[0] / 255), targets_of(batch) if self.training else None)

    def loss(self, outputs: dict[str, Tensor], batch: Batch) -> Any:
        """Return torchvision's losses, and their sum as ``total``."""
        return {**outputs, "total": torch.stack([*outputs.values()]).sum()}

    def get_metrics(self, is_train: bool) -> dict[str, Metric]:
        """Return the metrics of an evaluation: COCO's average precision, and the average precision at an IoU of 0.5."""
        return {} if is_train else self.metrics

    def update_metric(self, batch: Batch, outputs: Any, metric: Metric) -> None:
        metric.update(outputs, targets_of(batch))


def targets_of(batch: Batch) -> list[dict[str, Tensor]]:
    """Return the boxes, classes and crowds of each image, in the form that torchvision and torchmetrics take."""
    return [
        {"boxes": boxes[labels > 0], "labels": labels[labels > 0], "iscrowd": crowds[labels > 0].long()}
        for boxes, labels, crowds in zip(*batch[1:], strict=True)
    ]


def stages_of(student: Backbone) -> list[list[nn.Parameter]]:
    """Return the parameters of each part: of timm's groups or, for other students, of the encoder and of each block."""
    if not isinstance(student, TimmStudent):
        return [list(part.parameters()) for part in (student.encoder, *student.block_list)]
    model: Any = student.encoder.model
    groups = group_parameters(model, model.group_matcher(coarse=True))
    return [[model.get_parameter(name) for name in groups[key]] for key in sorted(groups)]
