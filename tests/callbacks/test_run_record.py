"""A fine-tuning refuses to resume with other classes, and names each change."""

from pathlib import Path
from typing import Any

import pytest

from d2v_composer.builders.training import FIXED_IN_A_FINETUNING
from d2v_composer.callbacks.run_record import RunRecord
from d2v_composer.system.errors import InputError


def record_of(num_classes: int, **dataset: str) -> dict[str, Any]:
    return {
        "config": {"dataset": {"column": "image", "label_column": "label"} | dataset},
        "model": {"num_classes": num_classes},
    }


@pytest.mark.parametrize(
    ("now", "change"),
    [
        (record_of(3), "number of classes: 2 in the checkpoint, 3 asked"),
        (record_of(2, label_column="other"), "dataset.label_column: label in the checkpoint, other asked"),
    ],
)
def test_a_fine_tuning_resumes_with_its_classes_only(now: dict[str, Any], change: str) -> None:
    before = RunRecord(record_of(2), None, FIXED_IN_A_FINETUNING).state_dict()
    RunRecord(record_of(2), Path("elsewhere"), FIXED_IN_A_FINETUNING).load_state_dict(before)
    with pytest.raises(InputError) as caught:
        RunRecord(now, None, FIXED_IN_A_FINETUNING).load_state_dict(before)
    assert str(caught.value) == f"{change}; a new run needs another run_name or save_folder"
