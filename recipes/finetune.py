"""Fine-tune a student, a teacher or a timm model as a classifier of images. The same command resumes the run.
python recipes/finetune.py --model student.safetensors  # the quickstart's 4,480 images of CIFAR-10
composer -n 2 recipes/finetune.py --model student.safetensors --data photos --max-duration 20ep
composer recipes/finetune.py --model timm/resnet18 --remote s3://BUCKET/imagenet --data /tmp/cache --num-classes 1000
timm.create_model(NAME, checkpoint_path="OUT/classifier.safetensors", num_classes=N) loads the result (not a teacher's).
"""

from argparse import ArgumentParser, RawDescriptionHelpFormatter
from io import BytesIO
from pathlib import Path
from typing import Any

import timm
import torch
from composer import Trainer
from composer.algorithms import GradientClipping, LabelSmoothing
from composer.loggers import FileLogger
from composer.models import ComposerClassifier
from composer.optim import CosineAnnealingWithWarmupScheduler
from composer.utils import dist, reproducibility
from PIL import Image
from safetensors.torch import save_model
from streaming import StreamingDataset
from timm.data.config import resolve_data_config
from timm.data.transforms_factory import create_transform
from timm.optim._optim_factory import create_optimizer_v2
from torch import nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

import d2v_composer.timm_models  # noqa: F401  (registers d2v2_student)
from d2v_composer.checkpoints.load import load_models
from d2v_composer.checkpoints.timm_student import convert_to_timm, timm_arguments
from d2v_composer.models.backbone import Backbone, freeze_unused_parameters
from d2v_composer.models.encoder import Inputs
from d2v_composer.models.teacher import Teacher

parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
parser.add_argument("--model", required=True, help="file of a student, a teacher or a training checkpoint; timm/NAME")
parser.add_argument("--data", default="yamls/quickstart/cifar10", help="folder: {train,test}/{CLASS/IMAGES,MDS shards}")
parser.add_argument("--remote", help="address of {train,test}/MDS shards, which --data caches")
parser.add_argument("--num-classes", type=int, default=10, help="number of classes in MDS shards")
parser.add_argument("--batch-size", type=int, default=64, help="images in a batch, of all ranks")
parser.add_argument("--max-duration", default="10ep", help="duration in epochs (ep); each ends with a test")
parser.add_argument("--out", default="runs/finetune", help="folder for checkpoints, the log and the classifier")
parser.add_argument("--seed", type=int, default=17)


class Shards(StreamingDataset):
    transform: Any

    def __getitem__(self, index):
        row = super().__getitem__(index)
        return self.transform(Image.open(BytesIO(row["image"])).convert("RGB")), int(row["label"])


class Head(nn.Module):
    """A new head on a teacher's embedding; the shared encoder stays frozen."""

    def __init__(self, backbone: Backbone, num_classes: int) -> None:
        super().__init__()
        self.backbone, self.pretrained_cfg = backbone.requires_grad_(True), backbone.encoder.config.timm_preprocessing
        backbone.encoder.freeze()
        self.head = nn.Identity()
        embedding = self(backbone.encoder.example(1))
        freeze_unused_parameters(backbone, embedding)  # DDP would wait for their gradients
        self.head = nn.Linear(embedding.shape[1], num_classes)

    def forward(self, images):
        return self.head(self.backbone.read(self.backbone.features(self.backbone.encoder(Inputs(images)))))

    def group_matcher(self, coarse=False):
        return {"stem": r"backbone\.encoder", "blocks": r"backbone\.blocks\.(\d+)"}


def build(model: str, num_classes: int) -> Any:
    """Return a model with a new head; its attribute ``pretrained_cfg`` has timm's names of the preprocessing."""
    if model.startswith("timm/"):
        return timm.create_model(model[5:], pretrained=True, num_classes=num_classes)
    if isinstance(backbone := load_models(model)[0], Teacher):
        return Head(backbone, num_classes)
    (name, options), (_, weights) = timm_arguments(backbone), convert_to_timm(model, backbone)
    overlay = {"state_dict": weights, "num_classes": options.pop("num_classes")}
    return timm.create_model(name, True, pretrained_cfg_overlay=overlay, num_classes=num_classes, **options)


def main() -> None:
    args = parser.parse_args()
    is_mds = args.remote is not None or Path(args.data, "train", "index.json").exists()
    num_classes = args.num_classes if is_mds else len(ImageFolder(f"{args.data}/train").classes)
    reproducibility.seed_all(args.seed)  # the head's weights are drawn next
    net, size, loaders = build(args.model, num_classes), args.batch_size // dist.get_world_size(), []
    augmentation = {"is_training": True, "scale": (0.35, 1), "color_jitter": None}
    for name, is_train, augment in (("train", True, augmentation), ("test", False, {})):
        transform: Any = create_transform(**resolve_data_config(model=net), **augment)
        options: Any = {"batch_size": size, "num_workers": 1, "drop_last": is_train}
        if is_mds:
            remote, local = args.remote and f"{args.remote}/{name}", f"{args.data}/{name}"
            data = Shards(remote=remote, local=local, batch_size=size, shuffle=is_train, shuffle_seed=args.seed)
            data.transform = transform
        else:
            data = ImageFolder(f"{args.data}/{name}", transform)
            options["sampler"] = dist.get_sampler(data, shuffle=is_train)
        loaders.append(DataLoader(data, **options))
    trainer = Trainer(
        model=ComposerClassifier(net, num_classes=num_classes),
        train_dataloader=loaders[0],
        eval_dataloader=loaders[1],
        max_duration=args.max_duration,
        precision="amp_bf16" if torch.cuda.is_available() else "fp32",
        optimizers=create_optimizer_v2(net, "adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.75),
        schedulers=CosineAnnealingWithWarmupScheduler("0.1dur"),
        # composer.algorithms has MixUp(alpha=0.2) and CutMix(alpha=1.0), too.
        algorithms=[LabelSmoothing(0.1), GradientClipping("norm", 2.0)],
        loggers=[FileLogger(f"{args.out}/log{{rank}}.txt", overwrite=True)],
        run_name="finetune",
        save_folder=args.out,
        save_overwrite=True,
        autoresume=True,
        seed=args.seed,
    )
    if trainer.state.timestamp < args.max_duration:
        trainer.fit()
    print({name: round(float(value), 4) for name, value in trainer.state.eval_metric_values.items()})
    if dist.get_global_rank() == 0:
        save_model(net, f"{args.out}/classifier.safetensors")


if __name__ == "__main__":  # a process of Streaming may import this file
    main()
