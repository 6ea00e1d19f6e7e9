"""d2v env names a missing package; tests/core/test_systems.py runs it without Composer."""

import pytest

from d2v_composer.commands import env
from d2v_composer.system import machine


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(machine, "package_versions", lambda *names: dict.fromkeys(names) | {"torch": "2.13.0+cpu"})
    env.main([])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["mosaicml", "none"] in lines
    assert ["torch", "2.13.0+cpu"] in lines
