"""Embed a collection of images or audio clips.

    d2v embed student.safetensors photos photos.npy
    d2v embed runs/quickstart/latest-rank0.pt photos photos.npy --normalize --dtype float16
    d2v embed base_imagenet.pt s3://bucket/imagenet/train imagenet.npy --local /mnt/nvme/imagenet
    d2v embed base_libri.pt speech speech.npy
    d2v embed timm/vit_small_patch14_dinov2 photos photos.npy --checkpoint dinov2.safetensors --image-size 112
    d2v embed student.safetensors 's3://bucket/laion/*.tar' s3://bucket/laion.parquet --part 3/16
    composer -n 2 -m d2v_composer.commands embed student.safetensors photos photos.npy

NAME.npy has the embeddings, (N, D), and NAME.ids.npy the ids, (N,); NAME.parquet has the columns id and embedding. The
model is named in NAME.model.json, or in the metadata of NAME.parquet. Images are resized without cropping.
If Composer is installed, the command uses all GPUs of this machine. Run the same command again to resume an interrupted
run.
"""

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import fields
from typing import Annotated, Any, Literal

from pydantic import ByteSize, Field

from d2v_composer.commands.command import (
    Column,
    Command,
    Decoders,
    PartOfWork,
    Place,
    PlaceHere,
    Positional,
    Samples,
    choose_workers,
    whole,
)
from d2v_composer.config.reference import ModelReference
from d2v_composer.config.types import PathText
from d2v_composer.models.names import PrecisionChoice
from d2v_composer.sources import IDS
from d2v_composer.system.addresses import hide_secrets
from d2v_composer.system.command_line import d2v, print_next, print_skipped, reading_of
from d2v_composer.system.errors import InputError
from d2v_composer.system.processes import ALL, local_rank, relaunch_on_gpus


class Embed(ModelReference, Command):
    model: Positional[PathText]
    """Path or address of a training checkpoint, an exported student or a teacher's file; or timm/NAME."""
    source: Samples
    out: Positional[Place] = Field(
        description=f"Path or address of NAME.npy or NAME.parquet. The samples' ids depend on SOURCE: {IDS}, a file's "
        "path below SOURCE or, in MDS, the sample's index."
    )
    precision: PrecisionChoice = "fp32"
    """Precision in which the model computes; auto: on a GPU amp_bf16, or amp_fp16 without bfloat16; on a CPU amp_bf16
    with AVX512-BF16, else fp32."""
    normalize: bool = False
    """Scale embeddings to length 1."""
    dtype: Literal["float32", "float16"] = "float32"
    """Type of the stored numbers."""
    batch_size: Annotated[int, whole(1, 0x100000)] | None = None
    """Number of samples that the model takes at once; default: 256 images, or 4 clips."""
    workers: Decoders = None
    local: PlaceHere | None = None
    """Folder that caches the shards of a remote MDS data set."""
    cache_limit: ByteSize | None = None
    """Maximum size of --local, such as 60gb; default: no limit."""
    column: Column = None
    part: PartOfWork = None
    skip_unreadable: bool = False
    """Skip and list samples that cannot be read."""
    overwrite: bool = False
    """Replace OUT if it exists."""

    def run(self) -> Any:
        """Embed the samples, and return the result; ``None`` if the part exists already."""
        out, part, plan = self.out, self.part, None

        import torch

        from d2v_composer.conversion.parts import Parts
        from d2v_composer.embedding.embed_source import check_ids, check_out, embed_source, record_of
        from d2v_composer.embedding.embedder import Embedder
        from d2v_composer.sources.open import open_source
        from d2v_composer.sources.source import name_counts

        if torch.cuda.is_available():
            torch.cuda.set_device(local_rank())
        parts = Parts(out)
        if part:
            out = parts.path(part)
        check_out(out, overwrite=self.overwrite or bool(part))
        names = {argument.name for argument in fields(Embedder)}
        model, modality, options, device = Embedder(**self.model_dump(include=names)).load()
        source = open_source(
            self.source,
            modality,
            column=self.column,
            cache=self.local,
            cache_limit=self.cache_limit,
            part=part or ALL,
        )
        files = (f"{source.root}/{name[:-2]}" for name in map(str, source.ids) if name.endswith("#0"))
        if self.overwrite and os.path.realpath(out) in map(os.path.realpath, files):
            raise InputError(f"{out} is among the source's files; choose another OUT")
        if out.endswith(".parquet"):
            check_ids(source.ids)
        print(f"embedding: {model.describe(options.embedding)}")
        place = self.source if "://" in self.source else os.path.abspath(self.source)
        if part:
            plan = record_of(model, source, part, options, device)
            if parts.has(part, plan):
                print(f"part {part.number}/{part.total} exists already")
                return None
        print("other files:", name_counts(source.left_out))
        embedding = embed_source(
            model,
            source,
            out,
            options,
            device=device,
            workers=choose_workers(self.workers, device),
            skip_unreadable=self.skip_unreadable,
            overwrite=self.overwrite,
            part=plan,
            made_from={"reference": self.describe(), "source": hide_secrets(place), "column": self.column},
        )
        if embedding.resumed:
            print(f"resumed an interrupted run after {embedding.resumed} {modality.unit}")
        print_skipped(embedding.skipped)
        num_now = embedding.images + len(embedding.skipped) - embedding.resumed
        rate = f", {num_now / embedding.seconds:.0f} {modality.unit}/s" if num_now else ""
        print(f"wrote {out}: {embedding.images} embeddings of {embedding.channels} dimensions{rate}")
        print_next(d2v("merge", self.out) if part else reading_of(out))
        return embedding


def main(argv: Sequence[str]) -> Any:
    """Parse a command line, and run the command: with Composer, in a process for each GPU of this machine."""
    command = Embed.parse(argv)
    with suppress(ModuleNotFoundError):  # without Composer, one GPU
        relaunch_on_gpus("embed", *argv)
    return command.run()
