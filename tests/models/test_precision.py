"""The precision that "auto" stands for on each machine; commands compute float32 in full, whatever a process allows."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.modules.module import register_module_forward_pre_hook

from d2v_composer import load_student, load_teacher
from d2v_composer.checkpoints.load import save_student
from d2v_composer.commands import embed, evaluate
from d2v_composer.models.precision import choose_precision, name_precision
from helpers import GOLDEN, QUICKSTART, datasets_of, write_images


@pytest.mark.parametrize(
    ("gpu", "gpu_bf16", "cpu_bf16", "expected"),
    [
        (True, True, False, ("amp_bf16", torch.bfloat16, "amp_bf16", False)),
        (True, False, True, ("amp_fp16", torch.float16, "amp_fp16", False)),
        # Composer's Trainer computes in fp32 on a CPU; the model casts.
        (False, False, True, ("amp_bf16", torch.bfloat16, "fp32", True)),
        (False, False, False, ("fp32", torch.float32, "fp32", False)),
    ],
)
def test_auto_is_what_the_machine_has_instructions_for(
    monkeypatch: pytest.MonkeyPatch, gpu: bool, gpu_bf16: bool, cpu_bf16: bool, expected: tuple[object, ...]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: gpu_bf16 or including_emulation)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: cpu_bf16)
    assert (name_precision("auto"), *choose_precision("auto")) == expected
    for explicit in ("fp32", "amp_bf16", "amp_fp16"):
        assert name_precision(explicit) == explicit


SWITCHES: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)


def allowed() -> list[bool]:
    return [switch.allow_tf32 for switch in SWITCHES]


@pytest.fixture
def tf32_is_allowed() -> Iterator[None]:
    before = allowed()
    for switch in SWITCHES:
        switch.allow_tf32 = True
    yield
    for switch, was_allowed in zip(SWITCHES, before, strict=True):
        switch.allow_tf32 = was_allowed


@pytest.mark.slow
@pytest.mark.usefixtures("tf32_is_allowed")
def test_float32_is_not_tf32_in_commands_and_a_library_changes_nothing(tmp_path: Path) -> None:
    photos, student = write_images(tmp_path / "photos", ["a.jpg"]), tmp_path / "student.safetensors"
    save_student(load_teacher(GOLDEN / "tiny_base.pt").build_student(depth=1), student)
    few = ["max_images=20", "probes=[linear]", datasets_of(QUICKSTART / "cifar10")]
    for is_allowed, compute in (
        (False, lambda: embed.main([str(student), str(photos), f"{photos}.npy", "--workers", "0"])),
        (False, lambda: evaluate.main([f"model={student.as_posix()}", *few])),
        (True, lambda: load_student(student).embed(torch.zeros(1, 3, 32, 32))),
    ):
        seen = set[bool]()
        with register_module_forward_pre_hook(lambda *_, seen=seen: seen.update(allowed())):
            compute()
        assert seen == {is_allowed}
    assert all(allowed())
