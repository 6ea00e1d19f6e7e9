"""Everything on torch_xla's CPU, a device that is not the host: ``python -m pytest -m device``.

tests/README.md describes the installation, in a separate folder, because Composer imports torch_xla if it can.
"""

import signal
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from composer import Callback, Logger, State, Trainer
from composer.devices import DeviceCPU
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from d2v_composer.checkpoints.load import load_student
from d2v_composer.commands import export as export_student
from d2v_composer.config.load import load_evaluate_config
from d2v_composer.data.images import Images
from d2v_composer.embedding.embed_source import EmbeddingOptions, embed_source
from d2v_composer.runs.comparison import build_comparison
from d2v_composer.sources.open import open_source
from helpers import datasets_of, load_checkpoint, log_of, losses_of, small_run, student_of
from recipes import train

pytestmark = [
    pytest.mark.device,
    pytest.mark.filterwarnings("default"),  # those of XLA, and of Composer's callbacks on an unknown device
]


# Functions that move tensors between devices.
MOVES = {
    "__deepcopy__",
    "__set__",  # .grad, .data
    "_has_compatible_shallow_copy_type",
    "copy_",
    "cpu",
    "swap_tensors",
    "to",
}


class OneDevice(TorchFunctionMode):
    """Refuse operations that mix devices, some of which XLA computes. Host scalars are allowed.

    Not a TorchDispatchMode, which changes XLA's results.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        tensors = [leaf for leaf in tree_leaves((args, kwargs or {})) if isinstance(leaf, Tensor)]
        devices = {tensor.device.type for tensor in tensors if tensor.ndim or tensor.device.type != "cpu"}
        name = getattr(func, "__name__", str(func))
        if len(devices) > 1 and name not in MOVES:
            raise RuntimeError(f"{name} of {', '.join(f'{tensor.device} {tuple(tensor.shape)}' for tensor in tensors)}")
        return func(*args, **(kwargs or {}))


class SecondDevice(DeviceCPU):
    """torch_xla's CPU, treated by Composer's Trainer like a GPU: it moves the model and each microbatch."""

    name = "xla"

    def __init__(self) -> None:
        import torch_xla.core.xla_model as xm  # pyright: ignore[reportMissingImports]

        self._device = xm.xla_device()

    def module_to_device(self, module: Any) -> Any:
        # In place, as on a GPU: the optimizer already holds the parameters.
        torch.__future__.set_swap_module_params_on_conversion(True)
        try:
            return module.to(self._device)
        finally:
            torch.__future__.set_swap_module_params_on_conversion(False)

    def tensor_to_device(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._device)


@pytest.fixture(scope="module")
def device() -> Iterator[SecondDevice]:
    """The device, with replacements for features that XLA lacks."""
    import torch_xla  # pyright: ignore[reportMissingImports]

    torch_xla.experimental.eager_mode(True)  # one graph of a whole evaluation takes minutes and gigabytes
    optimizer = torch.optim.AdamW
    with pytest.MonkeyPatch.context() as patch:
        # XLA makes no views of inference tensors, and has no fused AdamW.
        patch.setattr(torch, "inference_mode", lambda mode=True: torch.no_grad() if mode else nullcontext())
        patch.setattr(torch.optim, "AdamW", lambda *args, fused=None, **options: optimizer(*args, **options))
        with OneDevice():
            yield SecondDevice()


@pytest.fixture
def train_there(device: SecondDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make recipes/train.py train on the second device."""
    monkeypatch.setattr("d2v_composer.runs.trainer.Trainer", partial(Trainer, device=device))


class StopsAt(Callback):
    """Send SIGTERM to the run before a batch."""

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def batch_start(self, state: State, logger: Logger) -> None:
        if int(state.timestamp.batch) == self.batch - 1:
            signal.raise_signal(signal.SIGTERM)


EVERYTHING = (
    "max_duration=4ba",
    "scheduler.t_warmup=1ba",
    "device_train_microbatch_size=6",
    "save_num_checkpoints_to_keep=1",
    "retrieval.embeddings=all",
    "retrieval.interval=2ba",
    "callbacks.health={interval: 1ba}",
    "callbacks.memory_monitor={}",
    "callbacks.optimizer_monitor={batch_log_interval: 1}",
    "callbacks.runtime_estimator={}",
    "callbacks.speed_monitor={window_size: 1}",
    "callbacks.system_metrics_monitor={}",
)


def run_of_everything(folder: Path, data: Path, labeled: Path) -> list[str]:
    return small_run(folder, data, f"retrieval.{datasets_of(labeled)}", *EVERYTHING)


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory, small_data: Path, labeled: Path) -> Path:
    """Return the folder of the same run on the host."""
    folder = tmp_path_factory.mktemp("here") / "run"
    train.main(run_of_everything(folder, small_data, labeled))
    return folder


def assert_same_log(ours: Path, expected: Path) -> None:
    """Compare all measurements of model and training; equally near neighbors may differ."""
    ours_log, log = log_of(ours), log_of(expected)
    measured = [name for name in log if name.startswith(("loss/", "health/", "l2_", "metrics/", "norm_", "moment"))]
    assert len(measured) > 100
    for name in measured:
        tolerance = 0.05 if name.startswith("metrics/") else 2e-3 * max(1.0, *map(abs, log[name].values()))
        at_the_same_steps = {step: ours_log[name][step] for step in log[name]}  # a resume logs the references again
        assert at_the_same_steps == pytest.approx(log[name], abs=tolerance), name


@pytest.mark.usefixtures("train_there")
def test_a_run_with_every_callback_measures_as_on_the_host(
    here: Path, small_data: Path, labeled: Path, tmp_path: Path
) -> None:
    """With a stop by SIGTERM and a resume."""
    arguments = run_of_everything(tmp_path / "run", small_data, labeled)
    with pytest.raises(SystemExit, match="143"):
        train.main(arguments, [StopsAt(3)])
    assert (tmp_path / "run" / "latest-rank0.pt").readlink().name == "ep0-ba3-rank0.pt"
    trainer = train.main(arguments)
    assert {parameter.device.type for parameter in trainer.state.model.parameters()} == {"xla"}
    assert losses_of(tmp_path / "run") == pytest.approx(losses_of(here), rel=1e-3)
    assert_same_log(tmp_path / "run", here)
    ours, expected = student_of(tmp_path / "run"), student_of(here)
    for name, tensor in expected.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-2, atol=1e-3)
    moments = next(iter(load_checkpoint(tmp_path / "run" / "latest-rank0.pt")["state"]["optimizers"].values()))
    assert all(tensor.device.type == "cpu" for state in moments["state"].values() for tensor in state.values())


@pytest.mark.usefixtures("device")
def test_an_evaluation_measures_as_on_the_host(here: Path, labeled: Path) -> None:
    """With a checkpoint and all its comparisons."""
    checkpoint = f"model={here / 'latest-rank0.pt'}"
    config = load_evaluate_config([checkpoint, "device_eval_batch_size=40", datasets_of(labeled)])
    measured = []
    for device in ("xla", "cpu"):
        _, evaluation = build_comparison(config, device)
        evaluation.run(device)
        names = [(result.row, result.column, result.embedding) for result in evaluation.results]
        measured.append((names, [result.hits.double().mean() for result in evaluation.results]))
    (names, on_device), (expected_names, on_host) = measured
    assert names == expected_names
    np.testing.assert_allclose(on_device, on_host, atol=0.05)


@pytest.mark.usefixtures("device")
def test_an_exported_student_embeds_as_on_the_host(here: Path, labeled: Path, tmp_path: Path) -> None:
    export_student.main([str(here / "latest-rank0.pt"), str(tmp_path / "student.safetensors")])
    student = load_student(tmp_path / "student.safetensors")
    embedded = []
    for device in ("xla", "cpu"):
        out = tmp_path / f"{device}.npy"
        options = EmbeddingOptions(batch_size=40)
        source = open_source(str(labeled / "test"), Images.of(student.encoder.config))
        embed_source(student.to(device), source, out, options, device=device, workers=0, made_from={})
        embedded.append(np.load(out))
    np.testing.assert_allclose(*embedded, atol=1e-4)
