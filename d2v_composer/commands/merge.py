"""Merge the parts of a conversion or of embeddings that commands with --part I/N wrote.

    d2v convert-images photos s3://bucket/photos --part 0/16      # and 1/16, …, in any order, on any machine
    d2v merge s3://bucket/photos
    d2v embed student.safetensors photos photos.npy --part 0/16
    d2v merge photos.npy

All parts must exist and have the same settings. The shards of a conversion stay in OUT/parts. The parts of embeddings,
in OUT.parts, are not needed after the merge.
"""

from d2v_composer.commands.command import Command, Place, Positional
from d2v_composer.system.command_line import print_next, print_skipped, reading_of, training_on


class Merge(Command):
    out: Positional[Place]
    """OUT of the commands with --part: the path or address of a folder, NAME.npy or NAME.parquet."""
    overwrite: bool = False
    """Replace the embeddings in OUT if they exist."""

    def run(self) -> None:
        out = self.out

        from d2v_composer.conversion.parts import TABLE_SUFFIXES

        if out.endswith(TABLE_SUFFIXES):
            from d2v_composer.embedding.embed_source import merge_embeddings

            merged = merge_embeddings(out, overwrite=self.overwrite)
            wrote, following = f"{merged.images} embeddings of {merged.channels} dimensions", (reading_of(out),)
        else:
            from d2v_composer.conversion import convert

            merged = convert.merge_shards(out)
            wrote = f"{merged.samples} samples in {merged.shards} shards"
            following = training_on(out, "distill_audio" if merged.lengths else "distill")
        print(f"wrote {out}: {wrote}")
        print_skipped(merged.skipped)
        print_next(*following)


main = Merge.main
