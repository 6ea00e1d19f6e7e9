"""Patches to Composer 0.32.1's internals, with the reason for each.

- A callback whose ``close`` or ``post_close`` fails is one line. Composer logs a traceback, after which nobody would
  find why the run ended.

While :func:`patched_composer` is active:

- ``dist.get_node_signal_file_name``: the name of a signal file includes the node. Composer gives all nodes the same
  name, and in a shared folder each node deletes the others' file.
- ``checkpoint._torch_load_with_validation`` returns the contents that the caller has read and checked. Composer 0.32.1
  would unpickle whatever a file names.

While :func:`lean_engine` is active, because the GPU waits for what the host does in each batch:

- ``Engine._run_callbacks`` calls a callback only for the events that it handles, and Composer's monitors only in every
  tenth batch. Composer calls all callbacks for each of 13 events, and formats a line for each that it does not log.
- ``State.fsdp_enabled`` is looked up once. Composer would walk over all modules each time.

Other modules also use internals of packages:

- ``objectives/compilation.py`` sets options of torch 2.7's Dynamo and Inductor.
- ``training_data/order.py`` calls Streaming 0.13.0's ``get_sampling`` and ``get_shuffle``, which order the samples.
- ``system/ranks.py`` uses the default store of torch 2.7's process group; ``system/fetch.py`` botocore's
  ``_raw_stream``, because botocore's own reads block until full.
"""

import logging
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from composer import Callback, Event, State, Trainer
from composer.callbacks import LRMonitor, MemoryMonitor, RuntimeEstimator
from composer.utils import checkpoint, dist

from d2v_composer.system.errors import reason

MONITORS = (LRMonitor, MemoryMonitor, RuntimeEstimator)
MONITORED = (Event.AFTER_TRAIN_BATCH, Event.BATCH_END)


def _shorten(record: logging.LogRecord) -> bool:
    if record.exc_info and record.exc_info[1]:
        record.msg, record.args = "%s: %s", (record.getMessage(), reason(record.exc_info[1]))
        record.exc_info = record.stack_info = None
    return True


logging.getLogger("composer.core.engine").addFilter(_shorten)


@contextmanager
def patched_composer(loaded: Any) -> Iterator[None]:
    """Patch Composer while a Trainer is constructed in the ``with`` block.

    Args:
        loaded: Contents of the checkpoint at the Trainer's ``load_path``.
    """
    common_name = dist.get_node_signal_file_name

    def name_of_this_node(rng: random.Random | None = None) -> str:
        return f"{common_name(rng)}_{dist.get_node_rank()}"

    with (
        patch.object(dist, "get_node_signal_file_name", name_of_this_node),
        patch.object(checkpoint, "_torch_load_with_validation", lambda *_, **__: loaded),
    ):
        yield


@contextmanager
def lean_engine(trainer: Trainer) -> Iterator[None]:
    """Patch Composer while a Trainer trains in the ``with`` block."""
    state, logger = trainer.state, trainer.logger

    def run_callbacks(event: Event, callbacks: list[Callback]) -> None:
        skipped = MONITORS if event in MONITORED and int(state.timestamp.batch) % 10 else ()
        for callback in callbacks:
            if not isinstance(callback, skipped) and (
                overrides(callback, "run_event") or overrides(callback, event.value)
            ):
                callback.run_event(event, state, logger)

    def overrides(callback: Callback, name: str) -> bool:
        return getattr(getattr(callback, name), "__func__", None) is not getattr(Callback, name)

    with (
        patch.object(trainer.engine, "_run_callbacks", run_callbacks),
        patch.object(State, "fsdp_enabled", state.fsdp_enabled),
    ):
        yield
