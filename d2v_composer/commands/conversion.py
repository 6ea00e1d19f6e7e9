"""The base class of ``d2v convert-images`` and ``d2v convert-audio``."""

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import ByteSize, Field

from d2v_composer.commands.command import CORES, Column, Command, PartOfWork, Place, Positional, whole
from d2v_composer.sources import LABEL_COLUMN
from d2v_composer.system.command_line import d2v, print_next, print_skipped, training_on
from d2v_composer.system.processes import ALL

if TYPE_CHECKING:
    from d2v_composer.data.modality import Modality


class Convert(Command):
    """A command that converts samples to MDS shards."""

    source: Positional[str]
    out: Positional[Place]
    """Folder or address (s3://bucket/prefix, gs://, …) to write the MDS data set to."""
    split: str | None = None
    """The split to convert, or none for all samples; default: train, or all samples if SOURCE has no splits."""
    labels: str | None = None
    """A CSV file with lines 'sample,class', or none for no labels."""
    column: Column = None
    label_column: str | None = Field(
        None, description=f"Where the labels are: in MDS, a column's name; {LABEL_COLUMN}."
    )
    workers: Annotated[int, whole(1, 1024)] = CORES
    """Number of worker processes; default: one per core."""
    seed: Annotated[int, whole(0, 0x100000000)] = 0
    """Seed for the order of the samples."""
    shard_size: ByteSize = ByteSize(64_000_000)
    """Approximate size of a shard; default: 64mb."""
    part: PartOfWork = None
    skip_unreadable: bool = False
    """Skip and list samples that cannot be read."""

    def convert(self, modality: "Modality", yaml: str, **options: Any) -> Any:
        """Convert the samples or, with ``--part``, a part of the samples, and print a report and the next commands.

        Returns:
            The conversion; ``None`` if the part exists already.
        """
        from d2v_composer.conversion.convert import convert, open_samples
        from d2v_composer.conversion.parts import Parts, plan_of
        from d2v_composer.models.configs import SAMPLE_RATE
        from d2v_composer.sources.source import hash_of, name_counts

        part, out, start, plan = self.part, self.out, time.monotonic(), None
        opened = self.model_dump(include={"source", "split", "labels", "column", "label_column"})
        source = open_samples(modality=modality, part=part or ALL, **opened)
        if part:
            settings = self.model_dump(include={"seed", "shard_size", "label_column"}) | options
            listed = os.path.isfile(labels := self.labels or "") and Path(labels).read_bytes()
            labels = hash_of(source.label is None, source.class_names, listed)
            parts, plan = Parts(out), plan_of(source, part, labels=labels, **settings)
            if parts.has(part, plan):
                print(f"part {part.number}/{part.total} exists already")
                return None
            out = parts.path(part)
        print("other files:", name_counts(source.left_out))
        conversion = convert(
            source,
            out,
            plan=plan,
            seed=self.seed,
            workers=self.workers,
            shard_bytes=self.shard_size,
            skip_unreadable=self.skip_unreadable,
            **options,
        )
        if conversion.resumed:
            print(f"resumed an interrupted conversion; shards written before: {conversion.resumed}")
        hours = f" ({sum(conversion.lengths) / SAMPLE_RATE / 3600:,.2f} hours)" if conversion.lengths else ""
        classes = f"{len(source.class_names)} classes" if source.class_names else "labels without names"
        classes = "no labels" if source.label is None else classes
        print(
            f"wrote {out}: {conversion.samples} {source.modality.unit}{hours}, {classes}, "
            f"{conversion.bytes / 1e6:.1f} MB in {conversion.shards} shards, in {time.monotonic() - start:.0f} s"
        )
        print_skipped(conversion.skipped)
        print_next(*((d2v("merge", self.out),) if part else training_on(out, yaml)))
        return conversion
