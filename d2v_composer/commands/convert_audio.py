"""Convert LibriSpeech, any folder of audio files, or an audio data set in MDS to MDS shards.

    d2v convert-audio /data/LibriSpeech s3://bucket/librispeech/train --labels none
    d2v convert-audio speech_commands datasets/speech_commands/test --split test
    d2v convert-audio recordings datasets/recordings --labels none --skip-unreadable

A 16 kHz mono FLAC, WAV or OGG file keeps its bytes; any other file becomes 16 kHz mono FLAC of 16 bits. Files that are
silent, shorter than 45 ms or longer than an hour are errors, like corrupt ones.
OUT/conversion.json lists the length of every clip, so that training can put clips of similar length into a batch.
An interrupted conversion leaves no index.json, so nothing reads it as a data set. The same command resumes the
conversion; with other settings, it starts over.
The clips are in SOURCE/SPLIT or SOURCE. In zips and in tars with folders, SPLIT is a folder; for Parquet files and
other tars, it is a word in the file's name, or else in its folders' names. Labels come from class folders, a CSV file
with lines 'clip,class', or --label-column.
"""

from typing import Any

from pydantic import Field

from d2v_composer.commands.command import Samples
from d2v_composer.commands.conversion import Convert
from d2v_composer.sources import SOURCES


class ConvertAudio(Convert):
    source: Samples = Field(description=f"A folder of audio files, or {SOURCES}.")

    def run(self) -> Any:
        """Convert the clips, print a report, and return the result; ``None`` if the part exists already."""
        from d2v_composer.data.audio import Audio

        return self.convert(Audio(), "distill_audio")


main = ConvertAudio.main
