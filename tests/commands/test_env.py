"""d2v env names a missing package and another version; tests/core/test_systems.py runs it without Composer."""

import pytest

from d2v_composer.commands import env
from d2v_composer.system import machine


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(machine, "package_versions", lambda *names: dict.fromkeys(names) | {"torch": "2.13.0+cpu"})
    env.main([])
    named = "lacks torch==2.7.0 torchvision==0.22.0 mosaicml==0.32.1 mosaicml-streaming==0.13.0 boto3"
    assert f"extra train         {named}\n" in capsys.readouterr().out
