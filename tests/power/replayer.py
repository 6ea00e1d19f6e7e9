"""Replay recorded operations, and build the states of a folder that a loss of power may leave.

The model:

- The names in a folder change in their order. A crash may lose any number of the last changes, but none from before the
  folder's last fsync. Folders lose their changes independently of each other; a move between two folders is in both or
  in neither.
- An fsync of a file or a folder also keeps the names under which it and the folders above it were created. It keeps no
  later rename: that takes an fsync of the folder in which the rename was.
- What was written to a file since its last fsync reaches the disk in blocks of 4 KiB, in any order or not at all. A
  block that did not reach the disk has its old content or, beyond the file's old end, zeros. The file has its old size,
  its new one, or any between them. If the file was emptied since, this change may be lost, or be the only one that is
  kept.
- What was flushed stays. Locks, shared memory and everything outside the folder are gone.
"""

import math
import random
import shutil
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from power.recorder import Operation

BLOCK = 4096


class Link(NamedTuple):
    """A symlink."""

    target: str


Tree: TypeAlias = dict[str, bytes | Link | None]
"""Path → content of a file, target of a link, ``None`` for a folder."""


class File:
    """A file: what the program sees, and what is safe."""

    def __init__(self, content: bytes = b"") -> None:
        self.content, self.safe = bytearray(content), content
        self.shortest = len(content)  # since the last flush
        self.changed: set[int] = set()  # blocks, since the last flush

    def resize(self, size: int) -> None:
        self.shortest = min(self.shortest, size)
        self.content[size:] = bytes(max(0, size - len(self.content)))

    def write(self, offset: int, data: bytes) -> None:
        offset = len(self.content) if offset < 0 else offset
        self.content.extend(bytes(max(0, offset - len(self.content))))
        self.content[offset : offset + len(data)] = data
        self.changed |= {*range(offset // BLOCK, -(-(offset + len(data)) // BLOCK))}

    def flush(self) -> None:
        self.safe = bytes(self.content)
        self.shortest, self.changed = len(self.safe), set()

    @property
    def outcomes(self) -> list[str]:
        """Return what a crash may leave of it; empty if nothing is at risk.

        ``old``: as at its last flush. ``cut``: so, but as short as it has been since. ``written``: as the program sees
        it. ``zero``: of that size, without any new data: zeros where none were before. ``mixed``: of that size; each
        block is written or not. ``torn``: so, but of any size.
        """
        if not self.changed and len(self.content) == len(self.safe) == self.shortest:
            return []
        cut = ["cut"] if self.shortest < len(self.safe) else []
        return ["written", "old", *cut, *(["zero", "mixed", "torn"] if self.changed else [])]

    def after_crash(self, outcome: str, rng: random.Random) -> bytes:
        kept = self.safe if outcome == "old" else self.safe[: self.shortest]
        if outcome in ("old", "cut"):
            return kept
        content = bytearray(self.content)
        for block in () if outcome == "written" else self.changed:
            part = slice(block * BLOCK, min((block + 1) * BLOCK, len(content)))
            if outcome == "zero" or rng.random() < 0.5:
                content[part] = kept[part].ljust(max(0, part.stop - part.start), b"\0")
        return bytes(content[: rng.randint(self.shortest, len(content))] if outcome == "torn" else content)


class Folder:
    """A folder, with all changes of its names; the first has those that were there before."""

    def __init__(self) -> None:
        self.changes: list[tuple[int, dict[str, Node | None]]] = [(0, {})]
        """Number of the operation, and what it changed here."""
        self.num_safe = 1

    def entries(self, num_changes: int | None = None) -> "dict[str, Node]":
        entries: dict[str, Node | None] = {}
        for _, changed in self.changes[:num_changes]:
            entries |= changed
        return {name: node for name, node in entries.items() if node is not None}


Node: TypeAlias = File | Folder | Link


class Disk:
    """A folder as the program sees it, and as it may be found after a crash at this moment.

    Args:
        tree: What is in it at first; all of it is safe.
    """

    def __init__(self, tree: Tree) -> None:
        self.root, self.number = Folder(), 0
        self.made_in: dict[int, tuple[Folder, int]] = {}
        """Identity of a file or a folder → the folder in which it was made, and the number of changes there then."""
        self.folders = [self.root]
        for path, content in sorted(tree.items()):
            node: Node = File(content) if isinstance(content, bytes) else Folder() if content is None else content
            parent, name = self._find(path)
            parent.changes[0][1][name] = node
            self.folders += [node] if isinstance(node, Folder) else []

    def _find(self, path: str) -> tuple[Folder, str]:
        folder, *names = self.root, *path.split("/")
        for name in names[:-1]:
            folder = folder.entries()[name]
            assert isinstance(folder, Folder), path
        return folder, names[-1]

    def _node(self, path: str) -> "Node | None":
        if path == ".":
            return self.root
        folder, name = self._find(path)
        return folder.entries().get(name)

    def _change(self, changes: Mapping[str, "Node | None"]) -> None:
        by_folder: dict[int, tuple[Folder, dict[str, Node | None]]] = {}
        for path, node in changes.items():
            folder, name = self._find(path)
            by_folder.setdefault(id(folder), (folder, {}))[1][name] = node
        for folder, changed in by_folder.values():
            folder.changes.append((self.number, changed))
            for node in filter(None, changed.values()):
                self.made_in.setdefault(id(node), (folder, len(folder.changes)))

    def apply(self, operation: Operation) -> None:
        kind, path, other, size, data = operation
        self.number += 1
        node = self._node(path)
        if kind == "create":
            if node is None:
                self._change({path: File()})
        elif kind == "mkdir":
            self.folders.append(made := Folder())
            self._change({path: made})
        elif kind == "symlink":
            self._change({path: Link(other)})
        elif kind == "link":
            self._change({other: node})
        elif kind == "rename":
            self._change({path: None, other: node})
        elif kind == "remove":
            self._change({path: None})
        elif kind == "sync":
            self._sync(node)
        elif isinstance(node, File):
            node.write(size, data) if kind == "write" else node.resize(size)
        else:
            raise AssertionError(f"{operation}: no such file")

    def _sync(self, node: "Node | None") -> None:
        """Make a file's data or a folder's names safe, and the names on the way to it, in which it was made."""
        if isinstance(node, File):
            node.flush()
        elif isinstance(node, Folder):
            self._keep(node, len(node.changes))
        while id(node) in self.made_in:
            node, count = self.made_in[id(node)]
            self._keep(node, count)

    def _keep(self, folder: Folder, count: int) -> None:
        """Make a folder's first changes safe, and with a move between folders those before it in the other one."""
        if count <= folder.num_safe:
            return
        moved = {number for number, _ in folder.changes[folder.num_safe : count]}
        folder.num_safe = count
        for other in self.folders:
            for i, (number, _) in enumerate(other.changes):
                if number in moved:
                    self._keep(other, i + 1)

    def _cut(self, counts: dict[int, int]) -> None:
        """Shorten the changes that reach the disk, by folder, until each move between folders is in both or in none."""
        is_torn = True
        while is_torn:
            lost = {number for folder in self.folders for number, _ in folder.changes[counts[id(folder)] :]}
            is_torn = False
            for folder in self.folders:
                for i, (number, _) in enumerate(folder.changes[: counts[id(folder)]]):
                    if number in lost:
                        counts[id(folder)], is_torn = i, True
                        break

    def choices(self) -> "tuple[list[Folder], list[File], list[Sequence[Any]]]":
        """Return the folders and files of which a crash may lose something, and all that may be left of each of them.

        For a folder, this is a number of its changes; for a file, an outcome.
        """
        folders = [folder for folder in self.folders if folder.num_safe < len(folder.changes)]
        changes = [changed for folder in self.folders for _, changed in folder.changes]
        nodes = {id(node): node for changed in changes for node in changed.values()}  # a node may have several names
        files = [node for node in nodes.values() if isinstance(node, File) and node.outcomes]
        cuts = [range(folder.num_safe, len(folder.changes) + 1) for folder in folders]
        return folders, files, [*cuts, *(file.outcomes for file in files)]

    def states(self, rng: random.Random, limit: int) -> "Iterator[tuple[Tree, Tree]]":
        """Yield what a crash at this moment may leave, and the same as if all data were written.

        These are all such trees, or the extreme ones and others.
        """
        folders, files, choices = self.choices()
        if math.prod(map(len, choices)) <= limit:
            drawn = product(*choices)
        else:
            ends = product((0, -1), ("old", "zero", "torn", "written"))
            extreme = [self._extreme(choices, end, outcome) for end, outcome in ends]
            rng.shuffle(extreme)
            drawn = [*extreme[:limit], *(self._draw(choices, rng) for _ in range(limit - len(extreme)))]
        for chosen in drawn:
            counts = self._all_changes()
            counts |= {id(folder): count for folder, count in zip(folders, chosen, strict=False)}
            self._cut(counts)
            outcomes = {id(file): outcome for file, outcome in zip(files, chosen[len(folders) :], strict=True)}
            yield self._tree(counts, outcomes, rng), self._tree(counts, {}, rng)

    @staticmethod
    def _extreme(choices: Sequence[Sequence[Any]], end: int, outcome: str) -> list[Any]:
        """All folders keep as little or as much as they can, and all files have one outcome."""
        return [
            choice[end] if isinstance(choice, range) else outcome if outcome in choice else choice[0]
            for choice in choices
        ]

    def _draw(self, choices: Sequence[Sequence[Any]], rng: random.Random) -> list[Any]:
        """Draw a state; in most, many files or folders have one outcome."""
        usual = self._extreme(choices, rng.choice((0, -1)), rng.choice(("old", "zero", "mixed", "written")))
        share = rng.choice((0.0, 0.5, 0.9))
        pairs = zip(usual, choices, strict=True)
        return [outcome if rng.random() < share else rng.choice(choice) for outcome, choice in pairs]

    def as_seen(self) -> Tree:
        """Return what the program has made."""
        return self._tree(self._all_changes(), {}, random.Random())

    def _all_changes(self) -> dict[int, int]:
        return {id(folder): len(folder.changes) for folder in self.folders}

    def _tree(self, counts: Mapping[int, int], outcomes: Mapping[int, str], rng: random.Random) -> Tree:
        tree: Tree = {}

        def walk(folder: Folder, prefix: str) -> None:
            for name, node in folder.entries(counts[id(folder)]).items():
                if isinstance(node, Folder):
                    tree[prefix + name] = None
                    walk(node, f"{prefix}{name}/")
                else:
                    outcome = outcomes.get(id(node), "written")
                    tree[prefix + name] = node if isinstance(node, Link) else node.after_crash(outcome, rng)

        walk(self.root, "")
        return tree


class State(NamedTuple):
    """A folder as a crash may leave it."""

    number: int
    """Number of operations before the crash."""
    tree: Tree
    written: Tree
    """The same names, if the data of all files had been written."""
    named: Tree
    """What the program had made by then."""

    @property
    def losses(self) -> list[str]:
        """Return what the crash took, a line for each path."""
        lines = []
        for path in sorted({*self.tree, *self.named}):
            if path not in self.tree or path not in self.named:
                lines.append(f"{path} is {'missing' if path in self.named else 'still there'}")
            elif (left := self.tree[path]) != (expected := self.named[path]):
                sizes = [len(content) if isinstance(content, bytes) else content for content in (left, expected)]
                lines.append(f"{path} is damaged ({sizes[0]} of {sizes[1]} bytes)")
        return lines


def crash_states(tree: Tree, operations: Sequence[Operation], limit: int = 1000, seed: int = 0) -> Iterator[State]:
    """Yield different states that a crash at any moment may leave: all, or if there are more, about ``limit``.

    Until something becomes safe, what a crash may leave only becomes more. So only the moments before each sync, and
    the last one, need to be tried. Moments at which more is at risk get more of the states.
    """
    ends = [i for i, operation in enumerate(operations) if operation.kind == "sync"] + [len(operations)]
    risks = [disk.choices()[2] for _, disk in replay(tree, operations, ends)]
    total = sum(math.prod(map(len, choices)) for choices in risks)
    weights = [sum(len(choice) - 1 for choice in choices) for choices in risks]
    rng, seen = random.Random(seed), set[tuple[int, bool]]()
    for (i, disk), weight in zip(replay(tree, operations, ends), weights, strict=True):
        for left, written in disk.states(rng, total if total <= limit else -(-limit * weight // sum(weights))):
            # What is a state of an unfinished command, too, may be wrong when the command has ended.
            if (key := (hash(frozenset(left.items())), i == len(operations))) not in seen:
                seen.add(key)
                yield State(i, left, written, disk.as_seen())


def replay(tree: Tree, operations: Sequence[Operation], ends: Sequence[int]) -> "Iterator[tuple[int, Disk]]":
    """Yield the disk after each of these numbers of operations."""
    disk = Disk(tree)
    for i in range(len(operations) + 1):
        if i in ends:
            yield i, disk
        if i < len(operations):
            disk.apply(operations[i])


def read_tree(folder: Path) -> Tree:
    """Return all that is below a folder."""
    tree: Tree = {}
    for path in sorted(folder.rglob("*")):
        content = Link(str(path.readlink())) if path.is_symlink() else None if path.is_dir() else path.read_bytes()
        tree[str(path.relative_to(folder))] = content
    return tree


def write_tree(tree: Tree, folder: Path) -> None:
    """Let a folder hold this, and nothing else."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for path, content in sorted(tree.items()):
        if content is None:
            (folder / path).mkdir()
        elif isinstance(content, Link):
            (folder / path).symlink_to(content.target)
        else:
            (folder / path).write_bytes(content)
