"""Run a recipe with a callback of the tests': ``traced.py RECIPE.py ARGUMENTS``. Variables say what the callback does.

SAMPLES=FOLDER: each process writes lines ``batch sample_id CRC-of-the-sample`` to its own file in FOLDER; of a clip,
without padding.
AT="EVENT BATCH ACTION": rank 0 does this once, at Composer's event in the batch of that number: ``kill`` (SIGKILL to
itself), ``hang`` (say so, and sleep for ever), ``pause`` (for 3 s), ``retrieval_int`` (SIGINT when the model is next
evaluated).
SLOW=SECONDS: each batch waits, which leaves the cores to others.
GRAPHS=FOLDER: each process writes torch.compile's counts of graphs and breaks after each batch and its retrieval.
BACKEND: torch.compile's; ``static`` refuses a graph with a symbolic size, and runs the others as they are.
HANG="MODULE CLASS FUNCTION": another library's function hangs.
"""

import importlib
import os
import runpy
import signal
import sys
import time
import zlib
from functools import partial
from pathlib import Path
from typing import Any

import torch
from composer import Callback, Event, Logger, State, Trainer
from composer.utils import dist


class Trace(Callback):
    def __init__(self) -> None:
        self.event, self.batch, self.action = os.environ.get("AT", "none -1 none").split(" ")

    def run_event(self, event: Event, state: State, logger: Logger) -> None:
        batch = int(state.timestamp.batch)
        if event.value == self.event and batch == int(self.batch) and dist.get_global_rank() == 0:
            self.event = "none"
            self.act(state)
        if event is Event.BATCH_START:
            time.sleep(float(os.environ.get("SLOW", 0)))
        if event is Event.BATCH_START and "SAMPLES" in os.environ:
            sample_ids = state.batch["sample_id"].tolist()
            samples = state.batch["image" if "image" in state.batch else "audio"]
            lengths = state.batch.get("lengths", torch.full((len(samples),), samples.shape[-1])).tolist()
            for sample_id, sample, length in zip(sample_ids, samples, lengths, strict=True):
                write("SAMPLES", f"{batch} {sample_id} {zlib.crc32(sample[..., :length].contiguous().numpy())}")
        if event is Event.BATCH_CHECKPOINT and "GRAPHS" in os.environ:
            from torch._dynamo.utils import counters

            write("GRAPHS", f"{counters['stats']['unique_graphs']} {sum(counters['graph_break'].values())}")

    def act(self, state: State) -> None:
        if self.action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.action == "hang":
            hang()
        elif self.action == "pause":
            print("pauses", flush=True)
            time.sleep(3)
        elif self.action == "retrieval_int":
            evaluate = state.model.eval

            def eval() -> Any:
                state.model.eval = evaluate
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.3)
                return evaluate()

            state.model.eval = eval  # pyright: ignore[reportAttributeAccessIssue]


def write(variable: str, line: str) -> None:
    folder = Path(os.environ[variable])
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{dist.get_global_rank()}-{os.getpid()}").open("a") as file:
        file.write(f"{line}\n")


def hang(*_: Any, **__: Any) -> None:
    print("hangs", flush=True)
    time.sleep(600)


def run_static(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
    assert not any(isinstance(value, torch.SymInt) for value in inputs), "a graph with a symbolic size"
    return graph.forward


initialize = Trainer.__init__


def initialize_with_trace(self: Trainer, *args: Any, callbacks: Any = (), **options: Any) -> None:
    initialize(self, *args, callbacks=[*callbacks, Trace()], **options)


if __name__ == "__main__":
    if "HANG" in os.environ:
        module, owner, name = os.environ["HANG"].split(" ")
        setattr(getattr(importlib.import_module(module), owner), name, hang)
    if "BACKEND" in os.environ:
        backend: Any = run_static if os.environ["BACKEND"] == "static" else os.environ["BACKEND"]
        torch.compile = partial(torch.compile, backend=backend)
    Trainer.__init__ = initialize_with_trace
    sys.argv.pop(0)
    sys.path[0] = str(Path(sys.argv[0]).parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
