"""Commands compute float32 in full, whatever a process allows; a library changes nothing in its user's process."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.modules.module import register_module_forward_pre_hook

from d2v_composer import load_student, load_teacher
from d2v_composer.checkpoints.load import save_student
from d2v_composer.commands import embed, evaluate
from helpers import GOLDEN, QUICKSTART, encoded_image

SWITCHES: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)


@pytest.fixture
def tf32_is_allowed() -> Iterator[None]:
    before = [switch.allow_tf32 for switch in SWITCHES]
    for switch in SWITCHES:
        switch.allow_tf32 = True
    yield
    for switch, allowed in zip(SWITCHES, before, strict=True):
        switch.allow_tf32 = allowed


@pytest.mark.slow
@pytest.mark.usefixtures("tf32_is_allowed")
def test_float32_is_not_tf32(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(encoded_image(0))
    student = tmp_path / "student.safetensors"
    save_student(load_teacher(GOLDEN / "tiny_base.pt").build_student(depth=1), student)
    seen = set[tuple[bool, ...]]()
    hook = register_module_forward_pre_hook(lambda *_: seen.add(tuple(switch.allow_tf32 for switch in SWITCHES)))
    try:
        embed.main([str(student), str(tmp_path / "photos"), str(tmp_path / "photos.npy"), "--workers", "0"])
        assert seen == {(False, False)}
        seen.clear()
        small = f"datasets={{small: {{format: mds, root: {(QUICKSTART / 'cifar10').as_posix()}}}}}"
        evaluate.main([f"model={student.as_posix()}", "max_images=20", "probes=[linear]", small])
        assert seen == {(False, False)}
        seen.clear()
        load_student(student).embed(torch.zeros(1, 3, 32, 32))
        assert seen == {(True, True)}
    finally:
        hook.remove()
    assert all(switch.allow_tf32 for switch in SWITCHES)
