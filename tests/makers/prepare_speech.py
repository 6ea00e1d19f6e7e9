"""Prepare the quickstart's speech from Debian's asterisk prompts.

    apt-get download asterisk-core-sounds-{en,es,fr,it,ru}-g722
    pip install av
    python tests/makers/prepare_speech.py . speech

In DEBS are the packages, 1.6.1-1; OUT becomes

    words/train/WORD/VOICE.flac, words/test/WORD/VOICE.flac    the judged words; no voice is on both sides
    train_clips/PACKAGE-NAME.flac                              what ships for the student
    all_clips/PACKAGE-NAME.flac                                what the teacher was trained on: all but the judged words
    long/train/PACKAGE-N.flac                                  10 s of one voice each, for yamls/ablations/audio
    long/{1,2,5,10}s/PACKAGE-N.flac                            the same of other prompts: the first 1, 2, 5 and 10 s

All clips are 16 kHz mono, without the silence around them. The same packages always give the same clips.
"""

import hashlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import av
import numpy as np
import soundfile

SAMPLE_RATE = 16_000
# Package → (side of the judged words, voice). Allison speaks English and Spanish.
VOICES = {
    "en": ("train", "allison_en"),
    "es": ("train", "allison_es"),
    "fr": ("test", "june_fr"),
    "ru": ("test", "ivrvoice_ru"),
    "it": (None, "carlo_it"),  # his alphabet is of Italian cities
}
ALPHABET = """
    alfa bravo charlie delta echo foxtrot golf hotel india juliett kilo lima mike november oscar papa quebec romeo
    sierra tango uniform victor whiskey xray yankee zulu
"""
# These languages say another word there.
OTHER_WORDS = {("es", "juliett"), ("es", "quebec"), ("es", "uniform"), ("ru", "xray")}
# Letters with the English name, as far as voices share it: Ivrvoice reads all as in English. Z is zee or zed.
LETTERS = {"en": "abcdefghijklmnopqrstuvwxy", "ru": "abcdefghijklmnopqrstuvwxy", "fr": "flmnos"}
NOT_SPEECH = {"beep", "beeperr", "ascending-2tone", "descending-2tone", "tt-monkeys"}

LOWEST_DECIBELS, MARGIN, FRAME = 40, 800, 160  # below the loudest frame; samples kept around; samples of a frame
SHIPPED_SECONDS = 110  # of each package
SHORTEST, LONGEST = 0.5, 4.0  # seconds of a clip that ships
LONG, LENGTHS, PAUSE = 10 * SAMPLE_RATE, (1, 2, 5, 10), np.zeros(SAMPLE_RATE // 5, np.int16)  # pause between prompts
UNUSED_BITS = 4  # G.722 is far noisier; FLAC is 40 % smaller


def decode(path: Path) -> np.ndarray:
    """Return G.722's samples, int16."""
    with av.open(str(path), format="g722") as container:
        return np.concatenate([frame.to_ndarray()[0] for frame in container.decode(audio=0)])


def trim(samples: np.ndarray) -> np.ndarray:
    """Return the samples without the silence before and after."""
    frames = samples[: len(samples) // FRAME * FRAME].reshape(-1, FRAME).astype(np.float64)
    decibels = 10 * np.log10(np.square(frames).mean(axis=1) + 1)
    loud = np.flatnonzero(decibels > decibels.max() - LOWEST_DECIBELS) * FRAME
    return samples[max(loud[0] - MARGIN, 0) : loud[-1] + FRAME + MARGIN]


def write(path: Path, samples: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    step = 1 << UNUSED_BITS
    rounded = np.clip(np.round(samples / step), -32768 // step, 32767 // step).astype(np.int16) * step
    soundfile.write(path, rounded.astype(np.int16), SAMPLE_RATE, subtype="PCM_16", compression_level=1.0)


def read_package(debs: Path, package: str) -> Iterator[tuple[str, np.ndarray]]:
    """Yield name and trimmed samples of each prompt of a package, in the order of the names."""
    (deb,) = debs.glob(f"asterisk-core-sounds-{package}-g722_*.deb")
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["dpkg-deb", "-x", deb, folder], check=True)
        (root,) = Path(folder, "usr/share/asterisk/sounds").iterdir()
        for path in sorted(root.rglob("*.g722")):
            name = str(path.relative_to(root).with_suffix(""))
            if not name.startswith("silence/") and name not in NOT_SPEECH and path.stat().st_size:
                yield name, trim(decode(path))


def judged_words(package: str) -> dict[str, str]:
    """Return the prompts of a package that are judged words → the words."""
    letters = {f"letters/{letter}": f"letter_{letter}" for letter in LETTERS.get(package, "")}
    if VOICES[package][0] is None:
        return letters
    words = {f"phonetic/{word[0]}_p": word for word in ALPHABET.split() if (package, word) not in OTHER_WORDS}
    return words | letters


def write_long(out: Path, package: str, clips: Mapping[str, np.ndarray]) -> None:
    """Write clips of 10 s, each prompt after prompt: one prompt in four to judge, the others to train on."""
    for is_judged in (True, False):
        chosen = [clip for i, (_, clip) in enumerate(sorted(clips.items())) if (i % 4 == 0) == is_judged]
        joined = np.concatenate([sound for clip in chosen for sound in (clip, PAUSE)])
        for i, first in enumerate(range(0, len(joined) - LONG + 1, LONG)):
            whole = joined[first : first + LONG]
            parts = (
                {f"{length}s": whole[: length * SAMPLE_RATE] for length in LENGTHS} if is_judged else {"train": whole}
            )
            for folder, part in parts.items():
                write(out / f"long/{folder}/{package}-{i:03}.flac", part)


def main(debs: Path, out: Path) -> None:
    for package, (side, voice) in VOICES.items():
        words, clips = judged_words(package), {}
        for name, samples in read_package(debs, package):
            if name in words:
                write(out / f"words/{side}/{words[name]}/{voice}.flac", samples)
            elif not name.startswith(("phonetic/", "letters/")):  # nor the same words, judged or not, in other voices
                clips[f"{package}-{name.replace('/', '-')}"] = samples
        write_long(out, package, clips)
        shipped = 0.0
        for name in sorted(clips, key=lambda name: hashlib.sha256(name.encode()).digest()):  # a random order
            write(out / f"all_clips/{name}.flac", clips[name])
            seconds = len(clips[name]) / SAMPLE_RATE
            if SHORTEST <= seconds <= LONGEST and shipped < SHIPPED_SECONDS:
                write(out / f"train_clips/{name}.flac", clips[name])
                shipped += seconds


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
