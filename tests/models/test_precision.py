"""The precision that "auto" stands for on each machine."""

import pytest
import torch

from d2v_composer.models.precision import choose_precision, name_precision


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
