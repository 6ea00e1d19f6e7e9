"""Embed a collection of images.

    d2v embed student.safetensors photos photos.npy
    d2v embed runs/quickstart/latest-rank0.pt photos photos.npy --normalize --dtype float16
    d2v embed base_imagenet.pt s3://bucket/imagenet/train imagenet.parquet --local /mnt/nvme/imagenet
    d2v embed timm/vit_small_patch14_dinov2 photos photos.npy --checkpoint dinov2.safetensors --image-size 112

NAME.npy is (N, D), to be read by np.load(…, mmap_mode="r"); the ids are in NAME.ids.npy. NAME.parquet has the columns
id and embedding. An id is the image's path relative to SOURCE, its number in an MDS data set, or train/00000, …,
test/00000, … of CIFAR. Images are resized to the model's square without cropping.
An interrupted run leaves no OUT; run the same command again to resume it.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from d2v_composer.models.names import Pooling, PrecisionChoice, Representation, Weights
from d2v_composer.system.command_line import make_parser, print_next, size
from d2v_composer.system.errors import InputError

if TYPE_CHECKING:
    from d2v_composer.checkpoints.student_file import ChosenEmbedding
    from d2v_composer.embedding import Embedding
    from d2v_composer.models.transformer import Transformer


HOW_TO_READ = {
    ".npy": "import numpy; embeddings = numpy.load({!r}, mmap_mode='r')",
    ".parquet": "import pyarrow.parquet; table = pyarrow.parquet.read_table({!r})",
}


def main(argv: Sequence[str]) -> "Embedding":
    """Embed, and print a report."""
    arguments = parse(argv)

    import torch

    from d2v_composer.embedding import EmbeddingFile, EmbeddingOptions, embed_collection, open_collection
    from d2v_composer.models.execution import name_precision

    device = "cuda" if torch.cuda.is_available() else "cpu"
    arguments.precision = name_precision(arguments.precision)
    if arguments.precision == "amp_fp16" and device == "cpu":
        raise InputError("--precision: amp_fp16 needs a GPU; on a CPU: fp32 or amp_bf16, or auto")
    file = EmbeddingFile(arguments.out, overwrite=arguments.overwrite)
    model, chosen = load_model(arguments)
    arguments.representation, arguments.pooling = chosen.primary
    sizes = model.encoder.config
    collection = open_collection(
        arguments.source,
        sizes.image_size,
        sizes.interpolation,
        local=arguments.local,
        cache_limit=arguments.cache_limit,
        column=arguments.column,
    )
    print(f"embedding: {chosen}")
    embedding = embed_collection(
        model.to(device),
        collection,
        file,
        EmbeddingOptions(**{name: getattr(arguments, name) for name in EmbeddingOptions._fields}),
        device=device,
        workers=arguments.workers,
        skip_unreadable=arguments.skip_unreadable,
    )
    print_report(embedding)
    print_next(HOW_TO_READ[embedding.out.suffix].format(str(embedding.out)))
    return embedding


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a checkpoint, an exported student, or a teacher: a path, s3://, …; or timm/NAME, a ViT of timm's",
    )
    parser.add_argument("source", metavar="SOURCE", help="a folder of images, MDS or CIFAR; or MDS at s3://, …")
    parser.add_argument("out", metavar="OUT", type=Path, help="a file: .npy or .parquet")
    parser.add_argument("--teacher", help="the checkpoint's teacher, if it was moved since the training")
    parser.add_argument(
        "--weights", choices=get_args(Weights), default="model", help="the weights of a teacher; default: model"
    )
    timm = parser.add_argument_group("of a model timm/NAME")
    timm.add_argument("--checkpoint", metavar="FILE", help="its weights; default: timm's pretrained ones")
    timm.add_argument(
        "--first-blocks", type=int, metavar="N", help="blocks without a part in layer_mean; default: a sixth of all"
    )
    timm.add_argument("--image-size", metavar="SIZE", help="pixels a side, or HEIGHTxWIDTH; default: timm's")
    parser.add_argument(
        "--pooling", choices=get_args(Pooling), help="default: the primary embedding of the model's run"
    )
    parser.add_argument(
        "--representation", choices=get_args(Representation), help="default: the primary embedding of the model's run"
    )
    parser.add_argument(
        "--precision", choices=get_args(PrecisionChoice), default="fp32", help="default: fp32; auto is faster"
    )
    parser.add_argument("--normalize", action="store_true", help="scale embeddings to length 1")
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16"),
        default="float32",
        help="of the stored numbers; default: float32",
    )
    parser.add_argument("--batch-size", type=int, default=256, help="images embedded at once; default: 256")
    parser.add_argument(
        "--part-size", type=int, default=4096, help="images between two records of the progress; default: 4096"
    )
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="processes that decode; default: one per core"
    )
    parser.add_argument("--local", type=Path, metavar="FOLDER", help="the folder for the shards of a remote SOURCE")
    parser.add_argument(
        "--cache-limit",
        type=size,
        metavar="SIZE",
        help="most bytes of shards in --local, such as 60gb; default: no limit",
    )
    parser.add_argument("--column", metavar="NAME", help="the column of MDS that holds the images; default: image")
    parser.add_argument("--skip-unreadable", action="store_true", help="skip and list unreadable images")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace OUT if it exists, once the new one is complete"
    )
    arguments = parser.parse_args(argv)
    for name, smallest, largest in (("batch_size", 1, 1 << 16), ("part_size", 1, 1 << 20), ("workers", 0, 1024)):
        value = getattr(arguments, name)
        if not smallest <= value <= largest:
            raise InputError(f"{option(name)}: must be {smallest} to {largest}, got {value}")
    return arguments


def load_model(arguments: argparse.Namespace) -> "tuple[Transformer, ChosenEmbedding]":
    """Load the student, or a teacher from its own file, and choose the embedding."""
    from d2v_composer.checkpoints.load import TimmWeights, load_any
    from d2v_composer.checkpoints.student_file import choose_embedding

    timm_weights = TimmWeights(arguments.checkpoint, arguments.first_blocks, arguments.image_size)
    student, teacher = load_any(
        arguments.model, arguments.weights, arguments.teacher, timm_weights=timm_weights, option=option
    )
    model = teacher if student is None else student
    assert model is not None  # load_any gives one of them
    chosen = choose_embedding(model, model.provenance, arguments.pooling, arguments.representation)
    return model.eval(), chosen


def option(name: str) -> str:
    """Return the option for an argument of :func:`~d2v_composer.checkpoints.load.load_teacher`."""
    return f"--{name.replace('_', '-')}"


def print_report(embedding: "Embedding") -> None:
    num_now = embedding.images + len(embedding.skipped) - embedding.resumed
    if embedding.resumed:
        print(f"resumed an interrupted run after {embedding.resumed} images")
    print(f"skipped as unreadable: {len(embedding.skipped) or 'none'}")
    for line in embedding.skipped:
        print(f"  {line}")
    rate = f", {num_now / embedding.seconds:.0f} images/s" if num_now else ""
    print(f"wrote {embedding.out}: {embedding.images} embeddings of {embedding.channels} channels{rate}")
