"""Merge the parts that commands with --part I/N made: of a conversion, or of embeddings.

    d2v convert-images photos s3://bucket/photos --part 0/16      # and 1/16, …, in any order, on any machine
    d2v merge s3://bucket/photos
    d2v embed student.safetensors photos photos.npy --part 0/16
    d2v merge photos.npy

OUT becomes what one command would have made, if all parts are there and were made alike. The shards of a conversion
stay in OUT/parts. The parts of embeddings, in OUT.parts, are no longer needed.
"""

from collections.abc import Sequence

from d2v_composer.system.command_line import make_parser


def main(argv: Sequence[str]) -> None:
    """Merge, and print a report."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("out", metavar="OUT", help="the OUT of the parts: a folder, NAME.npy or NAME.parquet, here or in a store")
    add("--overwrite", action="store_true", help="replace embeddings in OUT")
    arguments = parser.parse_args(argv)

    from d2v_composer.data.parts import TABLES

    if arguments.out.endswith(TABLES):
        from d2v_composer.embedding import merge

        embedding = merge(arguments.out, overwrite=arguments.overwrite)
        wrote, skipped = f"{embedding.images} embeddings of {embedding.channels} channels", embedding.skipped
    else:
        from d2v_composer.data import convert

        conversion = convert.merge(arguments.out)
        wrote, skipped = f"{conversion.samples} samples in {conversion.shards} shards", conversion.skipped
    print(f"wrote {arguments.out}: {wrote}")
    print("\n  ".join([f"skipped as unreadable: {len(skipped) or 'none'}", *skipped]))
