"""Patches to Composer 0.32.1's internals."""

import logging
import random
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

from composer.utils import checkpoint, dist

from d2v_composer.system.errors import reason

# Other modules also use internals of packages:
# - objectives/compilation.py sets options of torch 2.7's Dynamo and Inductor.
# - training_data/sampler.py calls Streaming 0.13.0's get_sampling and get_shuffle, which order the samples.
# - system/ranks.py uses the default store of torch 2.7's process group.
# - system/fetch.py uses botocore's _raw_stream: botocore's own reads wait until they have all bytes asked for.


def _shorten(record: logging.LogRecord) -> bool:
    if record.exc_info and record.exc_info[1]:
        record.msg, record.args = "%s: %s", (record.getMessage(), reason(record.exc_info[1]))
        record.exc_info = record.stack_info = None
    return True


# If a callback's close or post_close fails, one line is logged: Composer's traceback would hide why the run ended.
logging.getLogger("composer.core.engine").addFilter(_shorten)


@contextmanager
def patched_composer(loaded: object) -> Iterator[None]:
    """Patch Composer while a Trainer is constructed in the ``with`` block."""
    common_name = dist.get_node_signal_file_name

    def name_of_this_node(rng: random.Random | None = None) -> str:
        return f"{common_name(rng)}_{dist.get_node_rank()}"

    with (
        # Composer gives all nodes the same name, and in a shared folder each node deletes the others' file.
        patch.object(dist, "get_node_signal_file_name", name_of_this_node),
        # The contents that the caller has read and checked: Composer would unpickle the file without such a check.
        patch.object(checkpoint, "_torch_load_with_validation", lambda *_, **__: loaded),
    ):
        yield
