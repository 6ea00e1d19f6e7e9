"""Record a run's config and versions in the run's folder and checkpoints, and compare records."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import yaml
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist

from d2v_composer.models.provenance import Json, Record, are_of_one_teacher, value_at
from d2v_composer.system.addresses import hide_secrets
from d2v_composer.system.errors import InputError
from d2v_composer.system.files import write_atomically

# What a resume must not change besides fields of a YAML: key of the record → what messages call it.
IDENTITIES = {
    "teacher.sha256": "teacher (sha256 of its weights and preprocessing)",
    "teacher.embedding": "teacher.embedding",
    "teacher.outputs": "teacher (its outputs for fixed inputs)",
    "model.sha256": "model (its sha256)",
    "model.embedding": "model.embedding",
    "model.num_classes": "number of classes",
    "data.sha256": "training data (sha256 of the samples)",
    "data.test_sha256": "test data (sha256 of the samples)",
}


class RunRecord(Callback):
    """Write the run's record to ``run.yaml``, and refuse to resume a run if a fixed key of the record has changed.

    Args:
        record: The sections of ``run.yaml``, as plain containers; RunRecord hides secrets in them.
        folder: The folder for ``run.yaml``; ``None``: write no file.
        fixed: Dotted keys of the record that a resume must not change, besides :data:`IDENTITIES`.
    """

    def __init__(self, record: Record, folder: Path | None, fixed: Sequence[str]) -> None:
        self.record, self.folder = hide_secrets(record), folder
        self.fixed = (*IDENTITIES, *fixed)

    def fit_start(self, state: State, logger: Logger) -> None:
        if self.folder is None or dist.get_global_rank() != 0:
            return
        path = self.folder / "run.yaml"
        write_atomically(path, yaml.safe_dump(self.record, sort_keys=False))
        logger.upload_file(path.name, path, overwrite=True)  # if the folder is in a store

    def state_dict(self) -> Record:
        return {"record": self.record}

    def load_state_dict(self, state: Record) -> None:
        """Check the record of the checkpoint from which the run resumes."""
        if changes := self.changes(state["record"]):
            raise InputError(
                f"{changes}; undo the changes, or start a new run with another save_folder and without load_path"
            )

    def changes(self, before: Record, keys: Sequence[str] = ()) -> str:
        """Return a line about all changes since an earlier record, or '' if nothing has changed."""
        records = hide_secrets(before), self.record
        groups = (find_changes(key, *(value_at(record, key) for record in records)) for key in keys or self.fixed)
        return "; ".join(change for changes in groups for change in changes)


def find_changes(key: str, before: Json, now: Json) -> Iterator[str]:
    """Yield a description of each changed field at or below a dotted key."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for name in dict.fromkeys([*now, *before]):
            yield from find_changes(f"{key}.{name}", before.get(name), now.get(name))
    elif before != now and not (key == "teacher.outputs" and are_of_one_teacher(before, now)):
        yield f"{IDENTITIES.get(key, key.removeprefix('config.'))}: checkpoint has {before}, this run has {now}"
