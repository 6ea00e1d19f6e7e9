"""A function is called once a package is imported."""

import importlib
import sys
from pathlib import Path

import pytest

from d2v_composer.system.when_imported import when_imported


def test_a_function_is_called_after_the_import_and_only_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "followed_package.py").write_text("value = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    seen: list[int] = []
    when_imported("followed_package", lambda: seen.append(sys.modules["followed_package"].value))
    assert not seen
    module = importlib.import_module("followed_package")
    assert seen == [1]
    importlib.reload(module)
    assert seen == [1]
    when_imported("followed_package", lambda: seen.append(2))
    assert seen == [1, 2]


def test_a_package_that_is_missing_stays_missing() -> None:
    when_imported("package_that_nobody_has", lambda: pytest.fail("it was not imported"))
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("package_that_nobody_has")
