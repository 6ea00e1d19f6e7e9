"""A function is called once a package is imported."""

import importlib
import importlib.util
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


def test_neither_a_look_up_nor_a_failed_import_is_an_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers looks timm up when it is imported."""
    source = tmp_path / "looked_up_package.py"
    source.write_text("raise RuntimeError('broken')\n")
    monkeypatch.syspath_prepend(tmp_path)
    seen: list[int] = []
    for number in (1, 2):
        when_imported("looked_up_package", lambda number=number: seen.append(number))
    with pytest.raises(RuntimeError, match="broken"):
        importlib.import_module("looked_up_package")
    source.write_text("value = 1  # mended\n")
    spec = importlib.util.find_spec("looked_up_package")
    assert spec is not None
    assert spec.origin == str(source)
    assert not seen
    importlib.import_module("looked_up_package")
    assert sorted(seen) == [1, 2]


def test_a_package_that_is_missing_stays_missing() -> None:
    when_imported("package_that_nobody_has", lambda: pytest.fail("it was not imported"))
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("package_that_nobody_has")
