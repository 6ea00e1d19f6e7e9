"""Convert LibriSpeech, any folder of sound, or an MDS data set of sound to MDS shards.

    d2v convert-audio /data/LibriSpeech s3://bucket/librispeech/train --labels none
    d2v convert-audio speech_commands datasets/speech_commands/test --split test
    d2v convert-audio recordings datasets/recordings --labels none --skip-unreadable

A 16 kHz mono FLAC, WAV or OGG file keeps its bytes; all else becomes 16 kHz mono FLAC of 16 bits. Files that are
silent, shorter than 45 ms or longer than an hour are errors, like corrupt ones.
OUT/conversion.json lists the length of every clip: training puts clips of similar length into a batch.
An interrupted conversion leaves no index.json, so no reader takes it for a data set. Run the same command again to
resume it; with other settings it starts over.
The clips are in SOURCE/SPLIT or SOURCE. Labels come from class folders, or a CSV file with lines 'clip,class'; those of
an MDS data set are not kept.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from d2v_composer.commands.convert_images import add_options, convert_and_report
from d2v_composer.system.command_line import make_parser

if TYPE_CHECKING:
    from d2v_composer.data.convert import Conversion


def main(argv: Sequence[str]) -> "Conversion":
    """Convert, and print a report."""
    parser = make_parser(__doc__)
    add_options(parser, "clip", source="a folder of sound or of MDS shards")
    parser.add_argument("--column", default="audio", metavar="NAME", help="the MDS column of sound; default: audio")
    arguments = parser.parse_args(argv)

    from d2v_composer.data.audio import Audio
    from d2v_composer.data.convert import find_samples
    from d2v_composer.data.mds import is_mds
    from d2v_composer.data.source import open_source

    if is_mds(Path(arguments.source)):
        source = open_source(arguments.source, Audio(), column=arguments.column)
    else:
        source = find_samples(arguments.source, arguments.split, arguments.labels, Audio())
    return convert_and_report(arguments, source, "distill_audio")
