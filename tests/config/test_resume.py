from enum import Enum

from d2v_composer.config.resume import FIXED, NEW_RESULT, OnResume, keys_marked
from d2v_composer.config.schema import RunConfig, TrainConfig


def marks_of(schema: type[RunConfig], name: str) -> set[Enum]:
    field = schema.model_fields.get(name)
    return {mark for mark in field.metadata if isinstance(mark, OnResume)} if field is not None else set()


def test_a_field_keeps_its_marks_where_its_type_is_narrower() -> None:
    bases = [base for base in TrainConfig.mro() if issubclass(base, RunConfig)]
    lost = [
        name for base in bases for name in base.model_fields if not marks_of(base, name) <= marks_of(TrainConfig, name)
    ]
    assert not lost


def test_marks_are_found_at_any_depth() -> None:
    """An alignment's pooling is fixed, because a checkpoint's student has it; its other fields only decide a result."""
    config = TrainConfig.model_validate({"teacher": {"checkpoint": None}, "train_loader": {"local": "images"}})
    fixed, results = set(keys_marked(config, FIXED)), set(keys_marked(config, NEW_RESULT))
    assert {"seed", "teacher.first_blocks", "alignment.pooling"} <= fixed
    assert "alignment" in results
    assert not fixed & {"max_duration", "train_loader.num_workers", "alignment.max_samples", "save_folder"}
