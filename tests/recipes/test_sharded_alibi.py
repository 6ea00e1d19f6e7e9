"""FSDP with a teacher whose ALiBi has learned scales, which blocks in different units read."""

from pathlib import Path

import pytest

from helpers import GOLDEN, ROOT, assert_same_losses, losses_of, run_ranks, run_training, small_run


@pytest.mark.slow
def test_sharded_ranks_train_as_one_process(small_data: Path, tmp_path: Path) -> None:
    options = f"teacher.checkpoint={GOLDEN / 'tiny_alibi.pt'}", "max_duration=6ba"
    run_training(*small_run(tmp_path / "whole", small_data, *options))
    arguments = small_run(tmp_path / "sharded", small_data, *options, "parallelism_config.fsdp={}")
    run_ranks(ROOT / "tests" / "programs" / "fsdp_on_cpu.py", *arguments)
    assert_same_losses(losses_of(tmp_path / "sharded"), losses_of(tmp_path / "whole"), num_steps=6)
