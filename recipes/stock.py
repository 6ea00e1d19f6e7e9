"""Distill a student in a plain Composer script with a StreamingDataset. The same command resumes the run.
python recipes/stock.py  # after: pip install -e '.[train,tensorboard]'; --max-duration 20ba: 4 CPU minutes (Intel Xeon)
composer -n 2 recipes/stock.py --remote s3://BUCKET/images --local /tmp/cache --save-folder s3://BUCKET/run
"""

import shutil
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from io import BytesIO
from pathlib import Path

import torch
from composer import Trainer
from composer.algorithms import GradientClipping
from composer.callbacks import LRMonitor
from composer.loggers import TensorboardLogger
from composer.optim import CosineAnnealingWithWarmupScheduler
from composer.utils import dist, reproducibility
from PIL import Image
from streaming import StreamingDataset
from torch.utils.data import DataLoader
from torchvision.transforms import Compose, PILToTensor, RandomHorizontalFlip, RandomResizedCrop, Resize

from d2v_composer import DistillationModel, ZeroShotRetrieval, load_labeled_set, load_teacher
from d2v_composer.callbacks import AlignStudent, GradientNorm, Health, NanGuard, Throughput
from d2v_composer.checkpoints.load import save_student

parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
parser.add_argument("--teacher", default="yamls/quickstart/teacher.safetensors", help="a data2vec 2.0 checkpoint")
parser.add_argument("--remote", help="address of MDS shards of images; default: the shards are in --local")
parser.add_argument("--local", default="yamls/quickstart/cifar10/train", help="folder of shards; a cache with --remote")
parser.add_argument("--labeled", default="yamls/quickstart/cifar10", help="folder of labeled images")
parser.add_argument("--save-folder", default="runs/stock", help="folder or address for checkpoints")
parser.add_argument("--out", default="runs/stock_results", help="folder for TensorBoard and the student")
parser.add_argument("--max-duration", default="600ba", help="duration in batches (ba) of 32 images, or epochs (ep)")
parser.add_argument("--interval", default="200ba", help="time between checkpoints and between retrievals, in ba or ep")


class Images(StreamingDataset):
    def __getitem__(self, number):
        return Image.open(BytesIO(super().__getitem__(number)["image"])).convert("RGB")


def main() -> None:
    args, seed, batch_size = parser.parse_args(), 17, 32 // dist.get_world_size()
    teacher = load_teacher(args.teacher)
    reproducibility.seed_all(seed)  # the student's weights are drawn next
    model, side = DistillationModel(teacher, teacher.build_student(depth=5)), teacher.encoder.config.image_size
    images = Images(remote=args.remote, local=args.local, batch_size=batch_size, shuffle=True, shuffle_seed=seed)
    augment = Compose([RandomResizedCrop(side, (0.35, 1)), RandomHorizontalFlip(), PILToTensor()])
    loader = DataLoader(images, batch_size, num_workers=1, collate_fn=lambda batch: torch.stack([*map(augment, batch)]))
    resize = Compose([Resize((side, side)), PILToTensor()])
    align = AlignStudent(model, [resize(images[number]) for number in range(min(1000, images.size))])
    labeled = {"cifar10": load_labeled_set("mds", args.labeled, image_size=side)}
    retrieval = ZeroShotRetrieval(labeled, args.interval, align=align)
    if "://" in args.save_folder and dist.get_local_rank() == 0:
        shutil.rmtree(args.save_folder, ignore_errors=True)  # ./s3:/…, where Composer would find an older checkpoint
    trainer = Trainer(
        model=model,
        train_dataloader=loader,
        max_duration=args.max_duration,
        optimizers=torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.98), eps=1e-6),
        schedulers=CosineAnnealingWithWarmupScheduler("0.1dur"),
        algorithms=[GradientClipping("norm", 2.0), GradientNorm()],  # the last runs first: before the clipping
        callbacks=[Throughput(), NanGuard(), Health(args.interval), LRMonitor(), align, retrieval],
        loggers=[TensorboardLogger(args.out)],
        run_name="stock",
        save_folder=args.save_folder,
        save_interval=args.interval,
        save_overwrite=True,
        autoresume=True,
        seed=seed,
    )
    if trainer.state.timestamp < args.max_duration:
        trainer.fit()
    if dist.get_global_rank() == 0:
        save_student(model.student, Path(args.out, "student.safetensors"))


if __name__ == "__main__":  # Composer's uploads start processes that import this file
    main()
