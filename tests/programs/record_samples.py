"""recipes/train.py, with a record of the samples it trains on: ``record_samples.py FOLDER`` and the run's arguments.

Each process writes lines ``batch sample_id CRC-of-the-pixels`` to its own file in FOLDER. If KILL_AT is set, the first
rank kills itself when the batch of that number starts.
"""

import os
import signal
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path

from composer import Callback, Logger, State
from composer.utils import dist

sys.path.insert(0, str(Path(__file__).parents[2]))
from d2v_composer.system import command_line
from recipes import train


class RecordSamples(Callback):
    def __init__(self, folder: Path, kill_at: int | None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"{dist.get_global_rank()}-{os.getpid()}"
        self.kill_at = kill_at

    def batch_start(self, state: State, logger: Logger) -> None:
        batch = state.timestamp.batch.value
        if batch == self.kill_at and dist.get_global_rank() == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        with self.path.open("a") as file:
            for sample_id, pixels in zip(state.batch["sample_id"].tolist(), state.batch["image"], strict=True):
                file.write(f"{batch} {sample_id} {zlib.crc32(pixels.contiguous().numpy())}\n")


def main(argv: Sequence[str]) -> None:
    kill_at = os.environ.get("KILL_AT")
    train.main(argv[1:], [RecordSamples(Path(argv[0]), None if kill_at is None else int(kill_at))])


if __name__ == "__main__":
    command_line.run(main)
