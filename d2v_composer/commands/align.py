"""Align a student: map its embeddings to the space of an existing index or of another model.

    d2v align student.safetensors photos aligned.safetensors --index photos.npy
    d2v align student.safetensors photos aligned.safetensors --to teacher.safetensors --pooling mean
    d2v embed aligned.safetensors queries queries.npy

OUT is the student with a linear map, fitted to samples of SOURCE; with --index, to samples whose ids are in the index.
With --to, the map leads to the other model's embedding or, with --pooling or --representation, to its pooled features.
To measure the alignment, the command fits a second map to nine tenths of the samples, and tests this map on the other
tenth. R² is the share of the target embeddings' variance that the map explains. Recall is the share of a target
embedding's nearest neighbors that the mapped embedding finds, too.
"""

from typing import Annotated

from d2v_composer.commands.command import (
    Column,
    Command,
    Decoders,
    PlaceHere,
    Positional,
    Samples,
    choose_workers,
    whole,
)
from d2v_composer.models.names import Pooling, Representation
from d2v_composer.system.command_line import d2v, print_next, print_skipped
from d2v_composer.system.errors import InputError
from d2v_composer.system.files import check_out_file


class Align(Command):
    model: Positional[str]
    """Path or address of a student's training checkpoint or .safetensors file."""
    source: Samples
    out: Positional[PlaceHere]
    """File to write the aligned student to, NAME.safetensors."""
    index: str | None = None
    """Index to align with: NAME.npy, with the ids in NAME.ids.npy, or NAME.parquet."""
    to: str | None = None
    """Model to align with, instead of an index: a path, an address or timm/NAME."""
    pooling: Pooling | None = None
    """Only with --to: pooling of the features to align with, instead of the model's embedding."""
    representation: Representation | None = None
    """Only with --to: features that are pooled and aligned with, instead of the model's embedding."""
    max_samples: Annotated[int, whole(20, 0x100000)] = 20_000
    """Maximum number of samples to which the map is fitted."""
    workers: Decoders = None
    column: Column = None
    overwrite: bool = False
    """Replace OUT if it exists."""

    def run(self) -> None:
        """Fit the alignment, print R² and recall, and write the student."""
        out, path = self.out, self.index
        if (path is None) == (self.to is None):
            raise InputError(f"expected either --index or --to, got {'neither' if path is None else 'both'}")
        if path is not None and (self.pooling or self.representation):
            raise InputError("--pooling and --representation can be used only with --to")
        if out.suffix != ".safetensors":
            raise InputError(f"{out} must end in .safetensors")
        check_out_file(out, overwrite=self.overwrite)

        import torch

        from d2v_composer.checkpoints.load import save_student
        from d2v_composer.config.reference import load_any
        from d2v_composer.data import modality_of
        from d2v_composer.embedding.align import align, pairs_of_index, pairs_of_model
        from d2v_composer.embedding.index import read_index
        from d2v_composer.export.model_card import size_of
        from d2v_composer.models.provenance import distillation_of, value_at
        from d2v_composer.models.teacher import Teacher
        from d2v_composer.sources.open import open_source
        from d2v_composer.sources.source import name_counts

        device = "cuda" if torch.cuda.is_available() else "cpu"
        student, _ = load_any(self.model)
        if isinstance(student, Teacher):
            raise InputError(f"{self.model} is a teacher; expected a student")
        student.head = None  # a classifier's weights give a student, too
        student.eval().to(device)
        source = open_source(self.source, modality_of(student.encoder.config), column=self.column)
        if path is not None:
            index = read_index(path)
            pairs, num_repeated = pairs_of_index(source, index, path, self.max_samples)
            print(
                f"{len(pairs.numbers):,} pairs of a sample and a row with the same id, from {len(source):,} samples "
                f"and {len(index.ids):,} rows of the index; rows left out because of repeated ids: {num_repeated:,}"
            )
        else:
            assert self.to is not None  # because there is no index
            teacher, _ = load_any(self.to)
            unit, own = (modality_of(model.encoder.config).unit for model in (teacher, student))
            if unit != own:
                raise InputError(f"--to: {self.to} takes {unit}, but {self.model} takes {own}")
            teacher.use_embedding(self.pooling, self.representation)
            pairs = pairs_of_model(source, teacher.eval().to(device), self.max_samples)
        if pairs.of.space.partition(" ")[0] != value_at(distillation_of(student.provenance), "teacher.sha256"):
            pairs = pairs._replace(of=pairs.of._replace(of=f"{path or self.to}, {pairs.of.of}"))
        print("other files:", name_counts(source.left_out))
        workers = choose_workers(self.workers, device)
        aligned = align(student, source, pairs, device, workers)
        about = {"of": pairs.of.of, "space": pairs.of.space} | aligned.statistics
        student.provenance = student.provenance | {"alignment": about}
        print_skipped(aligned.skipped)
        print(f"R² of the alignment, on a held-out tenth of the samples: {aligned.statistics['r2']:.3f}")
        recall = ", ".join(f"@{k} {share:.3f}" for k, share in aligned.recall.items())
        print(f"recall of the nearest neighbors, on {aligned.queries} held-out samples: {recall}")
        save_student(student, out)
        print(size_of(student, out))
        print_next(d2v("embed", out, "QUERIES", "queries.npy"))


main = Align.main
