"""The checks of a preflight, in their order."""

import json
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple
from uuid import uuid4

from d2v_composer.builders.run_folder import find_run_folder
from d2v_composer.callbacks.jsonl_logger import read_jsonl
from d2v_composer.checkpoints.resume import LATEST
from d2v_composer.config.schema import TrainConfig
from d2v_composer.data.labelled_sets import LabelledSet
from d2v_composer.preflight import checks
from d2v_composer.preflight.checks import DataSet
from d2v_composer.preflight.needs import Measured, needs
from d2v_composer.preflight.nodes import Nodes
from d2v_composer.preflight.rehearsal import Rehearsal
from d2v_composer.preflight.rights import check_rights, remove_prefix
from d2v_composer.preflight.table import Check, Table
from d2v_composer.system.addresses import RunFolder
from d2v_composer.system.atomic_files import existing_folder

__all__ = ["preflight"]

# Their failure does not keep the run from starting.
LET_IT_START = {"versions", "listing"}
PHASES = ("training", "SIGTERM", "resume", "retrieval", "export")
AS_ABOVE = "the lines above say where; `python recipes/train.py` with the same arguments shows all of it"


class Found(NamedTuple):
    """What the checks before the rehearsal found; what the needs are computed from."""

    data: DataSet
    sets: Mapping[str, LabelledSet]
    decoded_per_core: float


def preflight(argv: Sequence[str], config: TrainConfig, train_script: Path) -> bool:
    """Check all that a run will do, rehearse it, and print a table and what the whole run will need.

    Call it in one process of each node, before any process group is made. It leaves nothing behind.

    Args:
        argv: The YAML and its overrides.
        config: The same, read.
        train_script: ``recipes/train.py``.

    Returns:
        Whether all checks passed, on all nodes.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # the rehearsal ends, and is removed
    nodes = Nodes.from_environment()
    try:
        return check_all(argv, config, train_script, nodes)
    finally:
        nodes.leave()


def check_all(argv: Sequence[str], config: TrainConfig, train_script: Path, nodes: Nodes) -> bool:
    """As :func:`preflight`, on one of several nodes."""
    table = Table()
    found = look(config, nodes, table)
    gather(nodes, table, "before the rehearsal")
    if table.failed - LET_IT_START or found is None:
        for phase in PHASES:
            table.skip(phase, "mend what failed first")
        return False
    with own_folders(argv, config, train_script, nodes) as rehearsal:
        measured = rehearse(rehearsal, table, found.decoded_per_core)
        gather(nodes, table, "after the rehearsal")
    if measured is not None:
        print("\nThe whole run will need (from the rehearsal; nothing else may have used the machine):")
        print("\n".join(needs(config, nodes, found.data, found.sets, measured)), flush=True)
    return not table.failed


def look(config: TrainConfig, nodes: Nodes, table: Table) -> Found | None:
    """Make the checks that need no training; ``None`` where teacher, images or labelled sets cannot be used."""
    table.check("versions", "pip install -e . in a fresh environment", checks.check_versions)
    table.check("machine", "composer -n GPUS …; ulimit -n 65536", lambda: checks.check_machine(nodes))
    teacher = table.check("teacher", "give teacher.checkpoint", lambda: checks.check_teacher(config))
    data = table.check("data", "train_loader.remote or .local; credentials", lambda: checks.check_data(config))
    rate, trained = None, 0
    if teacher is not None:
        student = table.check("student", "the section student", lambda: checks.check_student(config, teacher))
        trained = student or 0
    if data is not None:
        table.check("listing", "convert again, or allow listing", lambda: checks.check_listing(config, data))
        size = 224 if teacher is None else teacher.config.image_size
        rate = table.check("shards", "convert again", lambda: checks.check_shards(config, data, size))
        table.check("shared memory", "enlarge it as said", lambda: checks.check_memory_shared(config, data, size))
        run_folder = find_run_folder(config)
        folder = None if run_folder is None else run_folder.local
        remedy = "make room, or set train_loader.cache_limit or save_num_checkpoints_to_keep"
        table.check("room", remedy, lambda: checks.check_room_for_run(config, nodes, data, folder, trained))
    if config.save_folder is not None:
        save_folder = config.save_folder
        table.check("save_folder", "allow it, or another save_folder", lambda: (check_rights(save_folder), None))
    sets = None
    if teacher is not None:
        size = teacher.config.image_size
        sets = table.check("labelled sets", "retrieval.datasets", lambda: checks.check_retrieval_sets(config, size))
    return None if data is None or sets is None or rate is None else Found(data, sets, rate)


def rehearse(rehearsal: Rehearsal, table: Table, decoded_per_core: float) -> Measured | None:
    """Run the training command twice, small; the figures of it on the first node, where all went well."""
    with rehearsal.started() as command:
        table.check("training", AS_ABOVE, lambda: rehearsal.train(command))
        batch = None
        if "training" not in table.failed:
            batch = table.check("SIGTERM", AS_ABOVE, lambda: rehearsal.stop(command))
    if batch is None:
        for phase in PHASES[PHASES.index("SIGTERM" if "training" in table.failed else "resume") :]:
            table.skip(phase, "the rehearsal failed before it")
        return None
    logged = rehearsal.log.stat().st_size if rehearsal.log.is_file() else 0
    with rehearsal.resumed(batch) as command:
        table.check("resume", AS_ABOVE, lambda: rehearsal.resume(command, batch, logged))
    if rehearsal.nodes.rank != 0 or "resume" in table.failed:
        return None
    table.check("retrieval", AS_ABOVE, rehearsal.retrieve)
    table.check("export", AS_ABOVE, rehearsal.export)
    checkpoint = rehearsal.folder / LATEST
    return Measured.from_log(read_jsonl(rehearsal.log), command.peak_bytes, decoded_per_core, checkpoint)


def gather(nodes: Nodes, table: Table, when: str) -> None:
    """Make each node know what failed on the others."""
    failed = json.dumps([check for check in table.checks if check.verdict == "FAILED"])
    for rank, rows in enumerate(nodes.exchange(when, failed)):
        if rank != nodes.rank:
            for name, verdict, found, remedy in json.loads(rows):
                table.add(Check(name, verdict, f"on node {rank}: {found}", remedy))


@contextmanager
def own_folders(argv: Sequence[str], config: TrainConfig, train_script: Path, nodes: Nodes) -> Iterator[Rehearsal]:
    """The rehearsal in folders of its own below the run's, which are removed when the block ends."""
    name = nodes.exchange("name", f"preflight-{uuid4().hex[:8]}")[0]
    with tempfile.TemporaryDirectory() as temporary:
        save_folder = f"{(config.save_folder or temporary).rstrip('/')}/{name}"
        cache = Path(config.train_loader.local, name)
        port = nodes.exchange("port", str(free_port()))[0]
        rehearsal = Rehearsal(train_script, argv, config, nodes, port, config.run_name, save_folder, cache)
        made_in = {folder: existing_folder(folder) for folder in (cache, rehearsal.folder)}
        try:
            yield rehearsal
        finally:
            for folder, existing in made_in.items():
                remove(folder, existing)
            if nodes.rank == 0 and RunFolder.parse(save_folder).address is not None:
                remove_prefix(save_folder)


def remove(folder: Path, existing: Path) -> None:
    """Remove a folder, and what was made above it; other files, and other nodes' folders, stay."""
    shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):  # one that is not empty
        for parent in folder.absolute().parents:
            if parent == existing.absolute():
                return
            parent.rmdir()


def free_port() -> int:
    """A port that is free now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]
