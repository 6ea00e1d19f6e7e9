"""The packages of loggers are compared with the versions that Composer's loggers work with."""

from importlib import metadata

import pytest

from d2v_composer.config.load import needs_of_loggers
from d2v_composer.system.machine import find_wrong_packages, install_command

CHOSEN = {"jsonl": {}, "wandb": {}, "mlflow": {}, "tensorboard": None, "unknown": {}}


def test_the_development_extra_has_what_the_loggers_need() -> None:
    assert list(needs_of_loggers({**CHOSEN, "tensorboard": {}})) == []


def test_other_versions_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", {"wandb": "0.31.0", "mlflow-skinny": "2.22.5"}.__getitem__)
    assert list(needs_of_loggers(CHOSEN)) == [
        "loggers.wandb: does not work with wandb 0.31.0: pip install 'wandb<0.24,>=0.18'"
    ]


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)
    assert list(needs_of_loggers({"mlflow": {}, "tensorboard": None})) == [
        "loggers.mlflow: needs the package mlflow-skinny: pip install 'mlflow-skinny<3,>=2.19'"
    ]


def test_an_extra_is_apart_from_the_package_itself() -> None:
    assert list(find_wrong_packages()) == []
    assert install_command("", "omegaconf", "pyarrow") == "pip install 'omegaconf<3,>=2.4'"
    assert install_command("onnx", "onnx", "onnxscript") == "pip install 'onnx>=1.17' 'onnxscript>=0.4'"
