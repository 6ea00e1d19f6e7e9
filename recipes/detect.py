"""Train a detector on a student's feature maps: torchvision's FCOS, with boxes in COCO's format.
python recipes/detect.py --student student.safetensors  # after: python tests/makers/scenes.py datasets/scenes
composer -n 2 recipes/detect.py --student student.safetensors --data photos --image-size 640
Install '.[detect]' first. The same command resumes the run. OUT/backbone.safetensors will have timm's names.
"""

from argparse import ArgumentParser, RawDescriptionHelpFormatter
from typing import Any

import timm
import torch
from composer import ComposerModel, DataSpec, Trainer
from composer.algorithms import GradientClipping
from composer.loggers import FileLogger
from composer.optim import CosineAnnealingWithWarmupScheduler
from composer.utils import dist, reproducibility
from safetensors.torch import save_model
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics.detection import MeanAveragePrecision
from torchvision.datasets import CocoDetection
from torchvision.models.detection import FCOS
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork
from torchvision.transforms import v2
from torchvision.tv_tensors import BoundingBoxes

import d2v_composer.timm_models  # noqa: F401  (registers d2v2_student)
from d2v_composer import load_student
from d2v_composer.checkpoints.timm_student import timm_arguments

parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
parser.add_argument("--student", required=True, help="a file that d2v export wrote")
parser.add_argument("--data", default="datasets/scenes", help="folder: {train,test}/{IMAGES,annotations.json}")
parser.add_argument("--image-size", type=int, default=192, help="side in pixels; only a timm student can be resized")
parser.add_argument("--batch-size", type=int, default=8, help="images in a batch, of all ranks")
parser.add_argument("--max-duration", default="10ep", help="duration in epochs (ep); each ends with a test")
parser.add_argument("--out", default="runs/detect", help="folder for checkpoints, the log and the backbone")


class Boxes(CocoDetection):
    """Images, (3, H, W) in [0, 1], and their boxes, (N, 4): left, top, right, bottom in pixels. Crowds are left out."""

    def loader(self, batch_size: int, side: int, *augment: nn.Module) -> DataSpec:
        to_image = [v2.ToImage(), v2.Resize((side, side)), v2.ToDtype(torch.float32, scale=True)]
        to_boxes = [v2.ConvertBoundingBoxFormat("XYXY"), v2.ClampBoundingBoxes(), v2.SanitizeBoundingBoxes()]
        self.augment = v2.Compose([*to_image, *augment, *to_boxes])
        options: Any = {"sampler": dist.get_sampler(self, shuffle=bool(augment)), "drop_last": True, "num_workers": 1}
        loader = DataLoader(self, batch_size, collate_fn=lambda rows: [*zip(*rows, strict=True)], **options)
        return DataSpec(loader, get_num_samples_in_batch=lambda batch: len(batch[0]))

    def __getitem__(self, index):
        image, rows = super().__getitem__(index)
        rows = [row for row in rows if not row.get("iscrowd")]
        corners, labels = (torch.tensor([row[key] for row in rows]) for key in ("bbox", "category_id"))
        boxes: Any = BoundingBoxes(corners.reshape(-1, 4), format="XYWH", canvas_size=image.size[::-1])  # pyright: ignore
        return self.augment(image, {"boxes": boxes, "labels": labels.long()})


class Pyramid(nn.Module):
    """The student's feature maps from stride 8 on, or its last one, then torchvision's feature pyramid."""

    def __init__(self, file: str, side: int, channels: int = 64) -> None:
        super().__init__()
        student = load_student(file)
        self.moments = student.encoder.config.image_mean, student.encoder.config.image_std
        name, options = timm_arguments(student)
        options |= {"img_size": (side, side)} if "img_size" in options else {}
        options |= {"pretrained_cfg_overlay": {"file": file, "num_classes": options.pop("num_classes")}}
        self.body: Any = timm.create_model(name, pretrained=True, features_only=True, feature_cls="getter", **options)
        strides, widths = self.body.feature_info.reduction(), self.body.feature_info.channels()
        self.first = next(level for level, stride in enumerate(strides) if stride >= min(8, strides[-1]))
        self.strides, self.out_channels = strides[self.first :], channels
        self.fpn = FeaturePyramidNetwork(widths[self.first :], channels)

    def forward(self, images):
        return self.fpn({str(level): grid for level, grid in enumerate(self.body(images)[self.first :])})


class Detector(ComposerModel):
    def __init__(self, pyramid: Pyramid, num_classes: int, side: int) -> None:
        super().__init__()
        anchors = AnchorGenerator(tuple((stride,) for stride in pyramid.strides), ((1.0,),) * len(pyramid.strides))
        self.net = FCOS(pyramid, num_classes, side, side, *pyramid.moments, anchor_generator=anchors, size_divisible=1)
        self.metrics: Any = {name: MeanAveragePrecision()[name] for name in ("map", "map_50")}  # pyright: ignore

    def forward(self, batch):
        return self.net(*batch)  # the losses in training, the detections otherwise

    def loss(self, outputs, batch):
        return outputs

    def get_metrics(self, is_train):
        return {} if is_train else self.metrics

    def update_metric(self, batch, outputs, metric):
        metric.update(outputs, batch[1])


def main() -> None:
    args, seed = parser.parse_args(), 17
    train, test = (Boxes(f"{args.data}/{name}", f"{args.data}/{name}/annotations.json") for name in ("train", "test"))
    reproducibility.seed_all(seed)  # the detector's weights are drawn next
    pyramid = Pyramid(args.student, side := args.image_size)
    model = Detector(pyramid, max(train.coco.getCatIds()) + 1, side)
    trainer = Trainer(
        model=model,
        train_dataloader=train.loader(args.batch_size // dist.get_world_size(), side, v2.RandomHorizontalFlip()),
        eval_dataloader=test.loader(1, side),  # the metric waits forever if ranks have different numbers of images
        max_duration=args.max_duration,
        precision="amp_bf16" if torch.cuda.is_available() else "fp32",
        optimizers=torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05),
        schedulers=CosineAnnealingWithWarmupScheduler("0.1dur"),
        algorithms=[GradientClipping("norm", 5.0)],
        loggers=[FileLogger(f"{args.out}/log{{rank}}.txt", overwrite=True)],
        run_name="detect",
        save_folder=args.out,
        save_overwrite=True,
        autoresume=True,
        seed=seed,
    )
    if trainer.state.timestamp < args.max_duration:
        trainer.fit()
    print({name: round(float(value), 4) for name, value in trainer.state.eval_metric_values.items()})
    if dist.get_global_rank() == 0:
        save_model(pyramid.body.model, f"{args.out}/backbone.safetensors")


if __name__ == "__main__":
    main()
