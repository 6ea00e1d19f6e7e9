"""Make the checks of a preflight in their order, and print one row for each."""

import json
import logging
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple
from uuid import uuid4

from d2v_composer.checkpoints.pointer import LATEST
from d2v_composer.config.schema import TrainConfig
from d2v_composer.evaluation.metrics_log import read_jsonl
from d2v_composer.preflight.checks import Checks, check_versions
from d2v_composer.preflight.needs import Measured, needs
from d2v_composer.preflight.nodes import Nodes
from d2v_composer.preflight.permissions import remove_prefix
from d2v_composer.preflight.rehearsal import Rehearsal
from d2v_composer.system.addresses import RunFolder
from d2v_composer.system.atomic_files import existing_folder
from d2v_composer.system.retry import reason

__all__ = ["CheckTable", "check_before_training", "free_port", "preflight"]

# The run could start although these failed.
WARNINGS = {"versions", "listing"}
PHASES = ("training", "SIGTERM", "resume", "retrieval", "export")
SEE_LOG = "see the lines above; `python recipes/train.py` with the same arguments shows the whole log"
NAME_WIDTH, VERDICT_WIDTH = 14, 7

log = logging.getLogger(__name__)


class CheckRow(NamedTuple):
    """The result of one check."""

    name: str
    verdict: str
    """``ok``, ``FAILED``, or ``skipped`` after an earlier failure."""
    found: str
    remedy: str = ""

    def __str__(self) -> str:
        row = f"{self.name:{NAME_WIDTH}} {self.verdict:{VERDICT_WIDTH}} {self.found}"
        return row if not self.remedy else f"{row}\n{'':{NAME_WIDTH + VERDICT_WIDTH + 1}} to do: {self.remedy}"


class CheckTable:
    """The rows of all checks, printed as they are added."""

    def __init__(self) -> None:
        self.rows: list[CheckRow] = []
        print(f"{'check':{NAME_WIDTH}} verdict found", flush=True)

    @property
    def failed(self) -> set[str]:
        """The names of the failed checks."""
        return {row.name for row in self.rows if row.verdict == "FAILED"}

    def add(self, row: CheckRow) -> None:
        self.rows.append(row)
        print(row, flush=True)

    def check(self, name: str, look: Callable[[], str], remedy: str, after: Sequence[str] = ()) -> bool:
        """Make one check and add its row.

        Args:
            name: The name of the row.
            look: Return what was found; raise if the run would fail.
            remedy: The advice after a failure.
            after: Skip the check unless these passed.

        Returns:
            Whether the check passed.
        """
        broken = [row.name for row in self.rows if row.name in after and row.verdict != "ok"]
        if broken:
            self.add(CheckRow(name, "skipped", f"{broken[0]} did not pass"))
            return False
        try:
            self.add(CheckRow(name, "ok", look()))
        except Exception as error:  # the run would fail with it too
            log.debug("%s", name, exc_info=True)
            self.add(CheckRow(name, "FAILED", reason(error), remedy))
            return False
        return True

    def share(self, nodes: Nodes, key: str) -> None:
        """Add the failures of the other nodes."""
        failed = [row for row in self.rows if row.verdict == "FAILED"]
        for rank, rows in enumerate(nodes.exchange(key, json.dumps(failed))):
            if rank != nodes.rank:
                for name, verdict, found, remedy in json.loads(rows):
                    self.add(CheckRow(name, verdict, f"on node {rank}: {found}", remedy))


def preflight(argv: Sequence[str], config: TrainConfig, train_script: Path) -> bool:
    """Check everything that a run needs, rehearse it, and print a table and the needs of the whole run.

    Call it in one process of each node, before a process group exists. It leaves nothing behind.

    Args:
        argv: The YAML and its overrides.
        config: The same, as read.
        train_script: ``recipes/train.py``.

    Returns:
        Whether all checks passed on all nodes.
    """
    nodes = Nodes.from_environment()
    try:
        checks, table = Checks(config, nodes), CheckTable()
        check_before_training(checks, table)
        table.share(nodes, "before the rehearsal")
        if table.failed - WARNINGS:
            for phase in PHASES:
                table.add(CheckRow(phase, "skipped", "fix the failures above first"))
            return False
        with own_folders(argv, config, train_script, nodes) as rehearsal:
            measured = rehearse(rehearsal, table)
            table.share(nodes, "after the rehearsal")
        if measured is not None:
            print("\nThe whole run will need (from the rehearsal, if nothing else used the machine):")
            print("\n".join(needs(checks, measured)), flush=True)
        return not table.failed
    finally:
        nodes.leave()


def check_before_training(checks: Checks, table: CheckTable) -> None:
    """Make all checks that need no training."""
    logging_remedy = "log in or start the server, or turn the logger off: loggers.NAME=null"
    room = "free disk space, or set train_loader.cache_limit or save_num_checkpoints_to_keep"
    rows = (
        ("versions", check_versions, "pip install -e . in a fresh environment", ()),
        ("machine", checks.check_machine, "composer -n GPUS …; ulimit -n 65536", ()),
        ("teacher", checks.check_teacher, "set teacher.checkpoint", ()),
        ("data", checks.check_data, "set train_loader.remote or .local, and the credentials", ()),
        ("student", checks.check_student, "change the section student", ("teacher",)),
        ("listing", checks.check_listing, "convert again, or allow listing", ("data",)),
        ("shards", checks.check_shards, "convert again", ("data",)),
        ("shared memory", checks.check_shared_memory, "enlarge it as the row says", ("data",)),
        ("room", checks.check_room, room, ("data",)),
        ("save_folder", checks.check_save_folder, "grant the permission, or choose another save_folder", ()),
        ("labelled sets", checks.check_labelled_sets, "change retrieval.datasets", ("teacher",)),
        ("loggers", checks.check_loggers, logging_remedy, ()),
    )
    for row in rows:
        table.check(*row)


def rehearse(rehearsal: Rehearsal, table: CheckTable) -> Measured | None:
    """Start, stop and resume a small run; return its figures on node 0 if all phases passed."""
    with rehearsal.started() as command:
        table.check("training", partial(rehearsal.train, command), SEE_LOG)
        stopped = table.check("SIGTERM", partial(rehearsal.stop, command), SEE_LOG, after=("training",))
    if not stopped:
        for phase in PHASES[2:]:
            table.add(CheckRow(phase, "skipped", "SIGTERM did not pass"))
        return None
    with rehearsal.resumed() as command:
        resumed = table.check("resume", partial(rehearsal.resume, command), SEE_LOG)
    if rehearsal.nodes.rank != 0 or not resumed:
        return None
    table.check("retrieval", rehearsal.retrieve, SEE_LOG)
    table.check("export", rehearsal.export, SEE_LOG)
    return Measured.from_log(read_jsonl(rehearsal.log), command.peak_bytes, rehearsal.folder / LATEST)


@contextmanager
def own_folders(argv: Sequence[str], config: TrainConfig, train_script: Path, nodes: Nodes) -> Iterator[Rehearsal]:
    """Give the rehearsal folders of its own inside the run's, and remove them when the block ends."""
    name = nodes.exchange("name", f"preflight-{uuid4().hex[:8]}")[0]
    port = nodes.exchange("port", str(free_port()))[0]
    with tempfile.TemporaryDirectory() as temporary:
        save_folder = f"{(config.save_folder or temporary).rstrip('/')}/{name}"
        cache = Path(config.train_loader.local, name)
        rehearsal = Rehearsal(train_script, argv, config, nodes, port, save_folder, cache)
        made_in = {folder: existing_folder(folder) for folder in (cache, rehearsal.folder)}
        try:
            yield rehearsal
        finally:
            for folder, existing in made_in.items():
                remove(folder, existing)
            if nodes.rank == 0 and RunFolder.parse(save_folder).address is not None:
                remove_prefix(save_folder)


def remove(folder: Path, existing: Path) -> None:
    """Remove a folder, and its empty parents below ``existing``."""
    shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):  # a parent is not empty
        for parent in folder.absolute().parents:
            if parent == existing.absolute():
                return
            parent.rmdir()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]
