"""The lines that open a run's log say what is true of any number of ranks."""

import pytest
import torch

from d2v_composer.builders.fit import describe_batch, describe_device
from d2v_composer.config.load import load_config
from helpers import ROOT


@pytest.mark.parametrize(
    ("ranks", "micro", "text"),
    [
        (1, 256, "256 images"),
        (1, 64, "256 images, microbatches: 64"),
        (8, 32, "256 images, 32 a device"),
        (8, 16, "256 images, 32 a device, microbatches: 16"),
        (8, "auto", "256 images, 32 a device, microbatches: auto"),
    ],
)
def test_the_batch_of_each_device(ranks: int, micro: int | str | None, text: str) -> None:
    config = load_config([str(ROOT / "yamls" / "quickstart.yaml"), "global_train_batch_size=256"])
    config = config.model_copy(update={"device_train_microbatch_size": micro})
    assert describe_batch(config, ranks) == text


@pytest.mark.parametrize(("has_bf16", "hint"), [(True, ""), (False, ": precision=auto is many times faster")])
def test_an_emulated_precision_is_told(monkeypatch: pytest.MonkeyPatch, has_bf16: bool, hint: str) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_bf16)
    assert describe_device("cpu", "amp_bf16").endswith(hint or "amp_bf16")
    assert describe_device("cpu", "fp32").endswith(", fp32")
