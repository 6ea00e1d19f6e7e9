"""Convert a collection of audio clips to MDS shards.

    d2v convert-audio /data/LibriSpeech s3://bucket/librispeech/train --labels none
    d2v convert-audio speech_commands datasets/speech_commands/test --split test
    d2v convert-audio recordings datasets/recordings --labels none --skip-unreadable

A 16 kHz mono FLAC, WAV or OGG file keeps its bytes; any other file becomes 16 kHz mono FLAC of 16 bits. Silent
files, and files shorter than 45 ms or longer than an hour, count as unreadable.
Run the same command again to resume an interrupted conversion.
SPLIT is the name of a folder, which may be inside a zip or a tar. For Parquet files, zips and tars, SPLIT may also be a
word in the path of the file, such as train in train-00000.parquet. Labels come from class folders, from the CSV file of
--labels, or from --label-column.
"""

from typing import Any

from pydantic import Field

from d2v_composer.commands.command import Samples
from d2v_composer.commands.conversion import Convert
from d2v_composer.sources import SOURCES


class ConvertAudio(Convert):
    source: Samples = Field(description=f"A folder of audio files, {SOURCES}.")

    def run(self) -> Any:
        """Convert the clips, and return the conversion; ``None`` if the part exists already."""
        from d2v_composer.data.audio import Audio

        return self.convert(Audio(), "distill_audio")


main = ConvertAudio.main
