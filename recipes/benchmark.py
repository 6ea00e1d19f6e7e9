"""Measure training, data loading or search beside other programs, which take turns in one process.

    python recipes/benchmark.py step --precision fp32
    python recipes/benchmark.py data --remote s3://BUCKET/benchmark
    python recipes/benchmark.py retrieval --repeats 9

step: images per second in training, compared with a naive program and with a matrix product alone.
data: images per second from a loader on one core, compared with ImageFolder and PIL, and with Streaming's data set.
retrieval: queries per second of exact search, compared with the matrix product alone, and with faiss on the CPU.

A program's speed is the median of its rounds, and a ratio is the median of the rounds' ratios. step and retrieval use
the GPU if there is one. The script needs Linux and `pip install -e '.[benchmark]'`; `step --help` lists its options.
"""

import os
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections import deque
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from timeit import timeit
from typing import Any
from unittest.mock import patch

from d2v_composer.system.machine import describe_machine  # isort: skip (before torch: sets how its threads wait)

import faiss
import numpy as np
import torch
from skimage import data as photographs
from streaming import MDSWriter, StreamingDataset
from torch import Tensor
from torch.nn.functional import instance_norm, layer_norm, mse_loss, normalize
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

from d2v_composer import DistillationModel, load_config, load_teacher
from d2v_composer.data.images import Images, RandomResizedCropFlip
from d2v_composer.evaluation.nearest_neighbors import exact_neighbors
from d2v_composer.evaluation.speed import interleave
from d2v_composer.models import attention
from d2v_composer.models.configs import RELEASED
from d2v_composer.models.data2vec2 import Data2Vec2
from d2v_composer.models.precision import PRECISIONS, name_precision
from d2v_composer.objectives.compilation import compile_model
from d2v_composer.training_data.loader import build_train_loader, read_train_index

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAIVE, OURS, PRODUCT, IMAGE_FOLDER = "naive", "ours", "matrix product alone", "ImageFolder and PIL"
IMAGE_SIZE, LOADED_AT_ONCE = 224, 64
DIM, NUM_QUERIES, NUM_NEIGHBORS, MULTIPLIED_AT_ONCE = 768, 10_000, 20, 2048

parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
parts = parser.add_subparsers(dest="part", required=True)
step, data, retrieval = (parts.add_parser(name) for name in ("step", "data", "retrieval"))
for part in (step, data, retrieval):
    part.add_argument("--repeats", type=int, default=5, help="number of measured rounds")
step.add_argument("--teacher", help="data2vec 2.0 for images; default: random weights, of the thesis's sizes")
step.add_argument("--precision", choices=[*PRECISIONS], default=name_precision("auto"))
step.add_argument("--batch-size", type=int, default=256 if DEVICE == "cuda" else 8, help="images in a step")
step.add_argument("--no-compile", action="store_true", help="measure our step without torch.compile")
data.add_argument("--num-images", type=int, default=1024, help="images in an epoch, at least 64")
data.add_argument("--remote", help="empty folder in a store; also measures shards that are cached from there")
retrieval.add_argument("--bank", type=int, default=50_000, help="number of vectors to search")


def measure_step(args: Namespace) -> None:
    """Measure steps of a forward pass, a backward pass, gradient clipping and AdamW, on a batch in memory."""
    torch.manual_seed(0)
    teacher: Any = load_teacher(args.teacher) if args.teacher else Data2Vec2(RELEASED["base"])
    model = DistillationModel(teacher, teacher.build_student(depth=5)).to(DEVICE)
    images, dtype = teacher.encoder.noise(args.batch_size).to(DEVICE), PRECISIONS[args.precision]
    programs = {NAIVE: naive_step(deepcopy(model.teacher), deepcopy(model.student), images, dtype)}
    teacher.cast_weights(dtype)
    if not args.no_compile:
        compile_model(model)
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], fused=True)
    programs[OURS] = partial(train_step, lambda: model.loss(model(images), images), optimizer, dtype)
    losses = [run().item() for run in programs.values()]
    if not abs(losses[1] - losses[0]) <= 1e-3 * losses[0]:  # NaN is not
        raise RuntimeError(f"the programs compute different losses: {losses}")
    # A product of an MLP layer's size. It is counted as the share of an image's operations that it computes.
    rows, dim = args.batch_size * teacher.encoder.num_tokens(), teacher.embed_dim
    x, weight = (torch.randn(size, dim, device=DEVICE, dtype=dtype) for size in (rows, 4 * dim))
    images_per_product = 2 * rows * weight.numel() / model.flops_per_batch(images[:1])
    steps, products = (20, 200) if DEVICE == "cuda" else (1, 40)
    passes = {name: (partial(timeit, run, number=steps), steps * args.batch_size) for name, run in programs.items()}
    passes[PRODUCT] = partial(timeit, lambda: x @ weight.T, number=products), products * images_per_product
    print_table(f"images/s, {args.precision}", passes, args.repeats, [NAIVE, PRODUCT])


def naive_step(teacher: Any, student: Any, images: Tensor, dtype: torch.dtype) -> Callable[[], Tensor]:
    """Return a step in which teacher and student each encode the images, without fused operations."""
    last = teacher.config.average_top_k_layers

    def norm_mean(layers: list[Tensor]) -> Tensor:
        mean: Any = sum(instance_norm(layer.transpose(1, 2).float()).transpose(1, 2) for layer in layers) / len(layers)
        return layer_norm(mean, mean.shape[-1:])

    @patch.object(attention, "attend", attend)
    def loss_of_images() -> Tensor:
        with torch.no_grad():
            target = norm_mean(teacher.forward_blocks(teacher.encode(images))[1][-last:])
        return mse_loss(norm_mean(student.forward_blocks(student.encode(images))[1]), target)

    return partial(train_step, loss_of_images, torch.optim.AdamW(student.parameters(), fused=False), dtype)


def attend(query_BHTK: Tensor, key_BHTK: Tensor, value_BHTK: Tensor, bias: Tensor | None) -> Tensor:
    scores_BHTT = (query_BHTK * query_BHTK.shape[-1] ** -0.5) @ key_BHTK.transpose(-2, -1)
    scores_BHTT = scores_BHTT if bias is None else scores_BHTT + bias.contiguous()
    return scores_BHTT.softmax(dim=-1, dtype=torch.float32).to(value_BHTK.dtype) @ value_BHTK


def train_step(loss_of_images: Callable, optimizer: torch.optim.Optimizer, dtype: torch.dtype) -> Tensor:
    with torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32):
        loss = loss_of_images()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 2.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def measure_data(args: Namespace) -> None:
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # also of the threads that start later
    torch.set_num_threads(1)
    crop = transforms.RandomResizedCrop(IMAGE_SIZE, interpolation=transforms.InterpolationMode.BICUBIC)
    normalization = transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    augment = transforms.Compose([crop, transforms.RandomHorizontalFlip(), transforms.ToTensor(), normalization])
    with TemporaryDirectory(ignore_cleanup_errors=True) as work:
        images = datasets.ImageFolder(make_photos(f"{work}/images", args.num_images), augment)
        files = [Path(path).read_bytes() for path, _ in images.samples]
        local = write_shards(files, f"{work}/shards")
        small = write_shards([Images.encode(file, "image", resize=256)[0] for file in files], f"{work}/small")
        streamed = StreamingDataset(local=local, batch_size=LOADED_AT_ONCE, shuffle=True)
        loaders = {
            IMAGE_FOLDER: DataLoader(images, LOADED_AT_ONCE, shuffle=True, drop_last=True),
            "StreamingDataset": DataLoader(streamed, LOADED_AT_ONCE, collate_fn=augment_ours, drop_last=True),
            OURS: our_loader(local),
            "ours, shards of 256 px": our_loader(small),
        }
        if args.remote:
            loaders["ours, S3 warm"] = our_loader(f"{work}/cache", write_shards(files, args.remote))
        units = len(files) // LOADED_AT_ONCE * LOADED_AT_ONCE
        passes = {name: (partial(deque, loader, maxlen=0), units) for name, loader in loaders.items()}
        print_table("images/s", passes, args.repeats, [IMAGE_FOLDER, OURS])


def augment_ours(samples: list[dict[str, bytes]]) -> Tensor:
    crop_and_flip, rng = RandomResizedCropFlip(IMAGE_SIZE), np.random.default_rng()
    return torch.stack([crop_and_flip(sample["image"], rng) for sample in samples])


def our_loader(local: str, remote: str | None = None) -> DataLoader:
    places = [f"train_loader.local={local}", f"train_loader.remote={remote or 'null'}"]
    settings = ["precision=fp32", f"global_train_batch_size={LOADED_AT_ONCE}", "train_loader.num_workers=0"]
    config = load_config(["yamls/distill.yaml", *places, *settings])
    index = read_train_index(config.train_loader, Images(IMAGE_SIZE), LOADED_AT_ONCE)
    return build_train_loader(config, config.train_loader, index)


def make_photos(folder: str, num_images: int) -> str:
    """Write JPEGs of ImageNet's most common size to a folder of one class; return ``folder``."""
    Path(folder, "photos").mkdir(parents=True)
    photos = photographs.astronaut(), photographs.coffee(), photographs.rocket(), photographs.stereo_motorcycle()[0]
    crop = transforms.RandomResizedCrop((375, 500), scale=(0.36, 1), ratio=(4 / 3, 4 / 3))
    for number in range(num_images):  # at this quality, sharp photos have about as many bytes as ImageNet's
        photo = crop(transforms.ToPILImage()(photos[number % len(photos)]))
        photo.save(f"{folder}/photos/{number}.jpg", quality=99, subsampling="4:2:0")
    return folder


def write_shards(files: list[bytes], out: str) -> str:
    """Write MDS shards of at most 16 MiB to ``out``; return ``out``."""
    with MDSWriter(
        out=out, columns={"image": "bytes"}, size_limit=1 << 24, hashes=["xxh64"], progress_bar=False
    ) as mds:
        for file in files:
            mds.write({"image": file})
    return out


def measure_retrieval(args: Namespace) -> None:
    bank_ND, queries_QD = torch.randn(args.bank, DIM).to(DEVICE), torch.randn(NUM_QUERIES, DIM).to(DEVICE)
    buffer = bank_ND.new_empty(NUM_QUERIES, MULTIPLIED_AT_ONCE)

    def multiply() -> None:
        for part in bank_ND.split(MULTIPLIED_AT_ONCE):
            torch.mm(queries_QD, part.T, out=buffer[:, : len(part)])

    def search_with_faiss() -> Tensor:
        index = faiss.IndexFlatIP(DIM)
        index.add(normalize(bank_ND, dim=1).cpu().numpy())
        return torch.from_numpy(index.search(normalize(queries_QD, dim=1).cpu().numpy(), NUM_NEIGHBORS)[1])

    search = partial(exact_neighbors, bank_ND, queries_QD, NUM_NEIGHBORS)
    if (search().indices.cpu() != search_with_faiss()).double().mean() > 1e-3:  # more than equal cosines explain
        raise RuntimeError("the programs find different neighbors")
    passes = {PRODUCT: (multiply, NUM_QUERIES), OURS: (search, NUM_QUERIES), "faiss": (search_with_faiss, NUM_QUERIES)}
    print_table("queries/s", passes, args.repeats, [PRODUCT], of_time=True)


def print_table(unit: str, passes: Any, repeats: int, baselines: list[str], of_time: bool = False) -> None:
    """Measure programs; print their speeds, and the ratio of each program's speed, or time, to each baseline's."""
    rates = interleave(passes, repeats)
    heads = [f"{'time' if of_time else 'speed'} ÷ {baseline}" for baseline in baselines]
    print(f"| program | {unit} | {' | '.join(heads)} |\n|---|---|{'---|' * len(heads)}")
    for name, rounds in rates.items():
        ratios = [np.median((rounds / rates[baseline]) ** (-1 if of_time else 1)) for baseline in baselines]
        print(f"| {name} | {np.median(rounds):,.2f} | {' | '.join(f'{ratio:.2f} ×' for ratio in ratios)} |")


if __name__ == "__main__":
    args = parser.parse_args()
    print(" ".join(["python", *sys.argv]), ", ".join(map(str, describe_machine().values())), "", sep="\n")
    {"step": measure_step, "data": measure_data, "retrieval": measure_retrieval}[args.part](args)
