"""Distill a student in your own Composer script: Composer's Trainer over Streaming's StreamingDataset.

    python recipes/stock.py
    composer -n 2 recipes/stock.py --remote s3://BUCKET/images --local /tmp/cache --save-folder s3://BUCKET/run

The same command resumes. recipes/guides/training.md compares this script with recipes/train.py.
"""

from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from io import BytesIO
from pathlib import Path

from composer import Trainer
from composer.algorithms import GradientClipping
from composer.callbacks import LRMonitor
from composer.loggers import TensorboardLogger
from composer.optim import CosineAnnealingWithWarmupScheduler
from composer.utils import dist, reproducibility
from PIL import Image
from streaming import StreamingDataset
from torch.optim import AdamW
from torch.utils.data import DataLoader
from torchvision.transforms import Compose, PILToTensor, RandomHorizontalFlip, RandomResizedCrop, Resize

from d2v_composer import DistillationModel, ZeroShotRetrieval, load_labeled_set, load_teacher
from d2v_composer.callbacks import AlignStudent, GradientNorm, Health, NanGuard, Throughput
from d2v_composer.checkpoints.load import save_student

parser = ArgumentParser(description=__doc__, formatter_class=ArgumentDefaultsHelpFormatter)
parser.add_argument("--teacher", default="yamls/quickstart/teacher.safetensors", help="data2vec 2.0 checkpoint")
parser.add_argument("--remote", help="images as MDS shards in a store; without it, they are in --local")
parser.add_argument("--local", default="yamls/quickstart/cifar10/train", help="the shards, or their cache")
parser.add_argument("--labeled", default="yamls/quickstart/cifar10", help="labeled images for retrieval")
parser.add_argument("--save-folder", default="runs/stock", help="checkpoints: a folder, or an address in a store")
parser.add_argument("--out", default="student.safetensors", help="the student, at the end")
parser.add_argument("--batch-size", type=int, default=32, help="images in a step, on all devices together")
parser.add_argument("--batches", type=int, default=600, help="length of the run")
parser.add_argument("--interval", type=int, default=200, help="batches between checkpoints, and between retrievals")


class Images(StreamingDataset):
    """MDS shards with a column ``image`` of encoded files."""

    def decoded(self, number: int) -> Image.Image:
        return Image.open(BytesIO(super().__getitem__(number)["image"])).convert("RGB")

    def __getitem__(self, number):
        return self.augment(self.decoded(number))


def main() -> Trainer:
    args = parser.parse_args()
    reproducibility.seed_all(17)
    teacher = load_teacher(args.teacher)
    model = DistillationModel(teacher, teacher.build_student(depth=5))
    side, device_batch_size = teacher.encoder.config.image_size, args.batch_size // dist.get_world_size()
    order = {"shuffle": True, "shuffle_seed": 17, "num_canonical_nodes": 1, "batch_size": device_batch_size}
    images = Images(remote=args.remote, local=args.local, **order)
    images.augment = Compose([RandomResizedCrop(side, (0.35, 1)), RandomHorizontalFlip(), PILToTensor()])
    whole = Compose([Resize((side, side)), PILToTensor()])
    # The student's map into its teacher's space is fitted to the first images, without augmentation.
    align = AlignStudent(model, [whole(images.decoded(number)) for number in range(min(1000, images.size))])
    labeled = {"cifar10": load_labeled_set("mds", args.labeled, image_size=side)}
    retrieval = ZeroShotRetrieval(labeled, f"{args.interval}ba", align=align)
    trainer = Trainer(
        model=model,
        train_dataloader=DataLoader(images, device_batch_size, num_workers=1),
        optimizers=AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=4e-3, betas=(0.9, 0.98)),
        schedulers=CosineAnnealingWithWarmupScheduler("0.1dur"),
        max_duration=f"{args.batches}ba",
        algorithms=[GradientClipping("norm", 2.0), GradientNorm()],
        callbacks=[Throughput(), NanGuard(), Health(), LRMonitor(), align, retrieval],
        loggers=[TensorboardLogger("runs/tensorboard")],
        run_name="stock",
        save_folder=args.save_folder,
        save_interval=f"{args.interval}ba",
        save_overwrite=True,  # what a killed run had half written
        autoresume=True,
        seed=17,
    )
    trainer.fit()
    if dist.get_global_rank() == 0:
        save_student(model.student, Path(args.out))
    trainer.close()
    return trainer


if __name__ == "__main__":  # Composer's uploads start processes that import this file
    main()
