"""Do something once another package is imported, without importing it."""

import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


def when_imported(package: str, then: Callable[[], object]) -> None:
    """Call a function after the import of a package: now, if it was imported before."""
    if package in sys.modules:
        then()
    else:
        sys.meta_path.insert(0, _Finder(package, then))


class _Finder(MetaPathFinder):
    """Find one package as usual, and follow its import; a look-up alone, such as transformers', is not an import."""

    def __init__(self, package: str, then: Callable[[], object]) -> None:
        self.package = package
        self.then = then

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.package:
            return None
        for finder in sys.meta_path[sys.meta_path.index(self) + 1 :]:
            spec = finder.find_spec(fullname, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader = _Loader(spec.loader, self)
                return spec
        return None

    def has_imported(self) -> None:
        """Call the function, once."""
        if self in sys.meta_path:
            sys.meta_path.remove(self)
            self.then()


class _Loader(Loader):
    """Another loader, and the finder to tell when it is done."""

    def __init__(self, loader: Loader, finder: _Finder) -> None:
        self.loader = loader
        self.finder = finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        spec = module.__spec__
        assert spec is not None
        spec.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        self.finder.has_imported()
