"""A detector for Composer: torchvision's Faster R-CNN or RetinaNet on the feature maps of a student.

Shapes: B images of S pixels per side (or height and width), up to M boxes in each, C channels of a map.
"""

import math
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
from composer.models import ComposerModel
from composer.utils import dist
from timm.models import group_parameters
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchmetrics import Metric
from torchmetrics.detection import MeanAveragePrecision
from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7
from torchvision.ops.poolers import initLevelMapper

from d2v_composer.models.backbone import Backbone, check_tensors, freeze_unused_parameters
from d2v_composer.models.configs import height_and_width
from d2v_composer.models.encoder import Inputs
from d2v_composer.models.precision import cpu_autocast
from d2v_composer.models.timm_network import TimmStudent
from d2v_composer.system.errors import InputError

Kind = Literal["faster_rcnn", "retinanet"]
Batch = Sequence[Tensor]
# Stride of the first map, as in torchvision.
FIRST_STRIDE: dict[Kind, int] = {"faster_rcnn": 4, "retinanet": 8}
RATIOS = (0.5, 1.0, 2.0)
# Anchors for the only map of a ViT, in strides: what a pyramid's levels have together.
SIZES_OF_ONE_MAP = (2, 4, 8, 16)


class FeatureMaps(nn.Module):
    """What torchvision calls the backbone: a student's feature maps, and a feature pyramid on them.

    A timm model has a map for each stride; blocks, and a ViT, have one map.

    Args:
        student: The student.
        channels: Channels of the pyramid.
        kind: The detector.

    Attributes:
        strides: Pixels per cell of each map of the student.
        num_levels: Number of maps of the pyramid, which has one or two more than the student if this has several.

    Raises:
        InputError: The image size is not divisible by a stride.
    """

    def __init__(self, student: Backbone, channels: int, kind: Kind) -> None:
        super().__init__()
        self.student, self.out_channels = student, channels
        self.indices: list[int] | None = None
        shape = height_and_width(student.encoder.config.image_size)
        maps = self.maps(student.encoder.example(1))
        last_of_stride = {shape[0] // grid.shape[2]: index for index, grid in enumerate(maps)}
        first = min(FIRST_STRIDE[kind], max(last_of_stride))
        self.indices = sorted(index for stride, index in last_of_stride.items() if stride >= first)
        maps = [maps[index] for index in self.indices]
        self.strides = [shape[0] // grid.shape[2] for grid in maps]
        grids = [
            (stride * grid.shape[2], stride * grid.shape[3]) for stride, grid in zip(self.strides, maps, strict=True)
        ]
        if any(grid != shape for grid in grids):
            raise InputError(f"image_size: must be divisible by all strides of the backbone; got {shape[0]}x{shape[1]}")
        extra = LastLevelMaxPool() if kind == "faster_rcnn" else LastLevelP6P7(channels, channels)
        is_pyramid = len(maps) > 1
        self.pyramid = FeaturePyramidNetwork([grid.shape[1] for grid in maps], channels, extra if is_pyramid else None)
        self.num_levels = len(maps) + is_pyramid * (1 if kind == "faster_rcnn" else 2)

    def maps(self, images: Tensor) -> list[Tensor]:
        """Return the student's maps of normalized images, (B, C, rows, columns) each, as timm's features_only does."""
        student = self.student
        if isinstance(student, TimmStudent):
            return student.encoder.model.forward_intermediates(images, self.indices, intermediates_only=True)
        cells = student.features(student.encoder(Inputs(images))).output[:, student.num_extra_tokens :]
        return [cells.transpose(1, 2).unflatten(2, student.encoder.config.grid_size)]

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return self.pyramid(OrderedDict((str(level), grid) for level, grid in enumerate(self.maps(images))))


class Unchanged(GeneralizedRCNNTransform):
    """torchvision's preparation of images that have one size and are normalized."""

    def __init__(self) -> None:
        super().__init__(1, 1, [0.0] * 3, [1.0] * 3, size_divisible=1)

    def resize(self, image: Tensor, target: Any = None) -> tuple[Tensor, Any]:
        return image, target


class AveragePrecision(MeanAveragePrecision):
    """COCO's average precision, the mean over classes and ``iou_thresholds``; -1 without boxes."""

    def compute(self) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return super().compute()["map"]

    def _sync_dist(self, *_: Any, **__: Any) -> None:
        """Gather all ranks' images; torchmetrics would wait forever if a rank has more than another."""
        for name in self._reductions:
            of_ranks = dist.all_gather_object([tensor.cpu() for tensor in getattr(self, name)])
            setattr(self, name, [tensor for of_rank in of_ranks for tensor in of_rank])


class Detector(ComposerModel):
    """Train a detector on the feature maps of a student.

    A batch is images, (B, 3, S, S) uint8; boxes, (B, M, 4) float: left, top, right, bottom in pixels; classes, (B, M)
    int64, from 1, and 0 where there is no box; and crowds, (B, M) bool: regions in which a test image counts no errors.
    :meth:`prepare` normalizes the images on the device. In eval mode, the outputs are torchvision's: boxes, labels and
    scores of each image.

    Parameters on which the maps do not depend, such as a ViT's last norm, are frozen. A BatchNorm whose weights are
    frozen keeps its statistics.

    Args:
        student: The backbone; ``requires_grad`` of its parameters is changed.
        num_classes: Number of classes.
        kind: ``faster_rcnn`` or ``retinanet``.
        channels: Channels of the feature pyramid and of the heads.
        frozen_stages: Number of first parts of the backbone that are not trained: the stem, then stages or blocks.
        cpu_bf16: Compute in bfloat16 autocast on a CPU, where Composer's Trainer only accepts fp32.

    Attributes:
        depth_of_trained: Name of each trained parameter → 0 in the backbone, 1 in the rest.

    Raises:
        InputError: The image size is not divisible by a stride.
    """

    STUDENT = "net.backbone.student."
    """Prefix of the student's tensors in a checkpoint."""

    def __init__(
        self,
        student: Backbone,
        num_classes: int,
        kind: Kind = "faster_rcnn",
        channels: int = 256,
        frozen_stages: int = 0,
        cpu_bf16: bool = False,
    ) -> None:
        super().__init__()
        self.cpu_bf16 = cpu_bf16
        student.requires_grad_(True)
        if not isinstance(student, TimmStudent):
            student.encoder.freeze()
        features = FeatureMaps(student.eval(), channels, kind)
        freeze_unused_parameters(
            student, torch.stack([grid.sum() for grid in features.maps(student.encoder.example(1))])
        )
        for stage in stages_of(student)[:frozen_stages]:
            for parameter in stage:
                parameter.requires_grad_(False)
        self.net: Any = build_net(kind, features, channels, num_classes + 1)
        self.net.transform = Unchanged()
        self.depth_of_trained = {
            name: int(not name.startswith(self.STUDENT))
            for name, parameter in self.named_parameters()
            if parameter.requires_grad
        }
        self.metrics: dict[str, Metric] = {
            "map": AveragePrecision(backend="pycocotools"),
            "map_50": AveragePrecision(backend="pycocotools", iou_thresholds=[0.5]),
        }
        # Equal on all ranks: DDP would broadcast them before every forward pass.
        self._ddp_params_and_buffers_to_ignore = [name for name, _ in self.named_buffers()]
        self.register_load_state_dict_pre_hook(check_tensors)

    def train(self, mode: bool = True) -> "Detector":
        super().train(mode)
        for module in self.modules():
            if isinstance(module, _BatchNorm) and not (module.weight is not None and module.weight.requires_grad):
                module.eval()
        return self

    def forward(self, batch: Batch) -> Any:
        """Return the losses of a batch by name or, in eval mode, the boxes of each image."""
        images, boxes, classes, _ = batch
        targets = [
            {"boxes": places[labels > 0], "labels": labels[labels > 0]}
            for places, labels in zip(boxes, classes, strict=True)
        ]
        with cpu_autocast(self.cpu_bf16):
            return self.net(list(images), targets if self.training else None)

    @torch.no_grad()
    def prepare(self, batch: Batch) -> Batch:
        """Normalize the images of a batch, on their device."""
        images, *rest = batch
        return self.net.backbone.student.encoder.normalized(images), *rest

    def loss(self, outputs: dict[str, Tensor], batch: Batch) -> Any:
        """Return torchvision's losses, and their sum as ``total``."""
        return {**outputs, "total": torch.stack([*outputs.values()]).sum()}

    def get_metrics(self, is_train: bool) -> dict[str, Metric]:
        """Return an evaluation's metrics: COCO's mean average precision, and that at an IoU of 0.5."""
        return {} if is_train else self.metrics

    def update_metric(self, batch: Batch, outputs: Any, metric: Metric) -> None:
        expected = [
            {"boxes": boxes[labels > 0], "labels": labels[labels > 0], "iscrowd": crowds[labels > 0].long()}
            for boxes, labels, crowds in zip(*batch[1:], strict=True)
        ]
        metric.update(outputs, expected)


def stages_of(student: Backbone) -> list[list[nn.Parameter]]:
    """Return the parameters of a student's parts: stem and stages or, of a student of blocks, encoder and blocks."""
    if not isinstance(student, TimmStudent):
        return [list(part.parameters()) for part in (student.encoder, *student.block_list)]
    model: Any = student.encoder.model
    groups = group_parameters(model, model.group_matcher(coarse=True))
    return [[model.get_parameter(name) for name in groups[key]] for key in sorted(groups)]


def build_net(kind: Kind, features: FeatureMaps, channels: int, num_labels: int) -> nn.Module:
    """Build torchvision's detector; label 0 is the background.

    An anchor's size is in proportion to its map's stride, as torchvision's are for photographs of 800 px.
    """
    strides = list(features.strides)
    if len(strides) == 1:
        sizes: tuple[tuple[int, ...], ...] = (tuple(strides[0] * size for size in SIZES_OF_ONE_MAP),)
    else:
        while len(strides) < features.num_levels:
            strides.append(2 * strides[-1])
        octave = (8,) if kind == "faster_rcnn" else (4, 4 * 2 ** (1 / 3), 4 * 2 ** (2 / 3))
        sizes = tuple(tuple(round(stride * size) for size in octave) for stride in strides)
    anchors = AnchorGenerator(sizes, (RATIOS,) * len(sizes))
    if kind == "retinanet":
        # Norms, as in torchvision's second version: without them, narrow heads hardly learn.
        norm = partial(nn.GroupNorm, math.gcd(32, channels))
        head = RetinaNetHead(channels, anchors.num_anchors_per_location()[0], num_labels, norm)
        return RetinaNet(features, num_labels, anchor_generator=anchors, head=head, detections_per_img=100)
    names = [str(level) for level in range(len(features.strides))]
    pool = MultiScaleRoIAlign(names, output_size=7, sampling_ratio=2)
    # torchvision would round a stride of 14 to 16.
    pool.scales = [1 / stride for stride in features.strides]
    levels = [round(math.log2(stride)) for stride in features.strides]
    pool.map_levels = initLevelMapper(levels[0], levels[-1])
    width = 4 * channels
    return FasterRCNN(
        features,
        rpn_anchor_generator=anchors,
        box_roi_pool=pool,
        box_head=TwoMLPHead(channels * 7**2, width),
        box_predictor=FastRCNNPredictor(width, num_labels),
    )
