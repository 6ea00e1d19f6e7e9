"""The states of a crash are those of the model, no fewer and no more."""

from collections.abc import Sequence

import pytest

from power.recorder import Operation
from power.replayer import Tree, crash_states

WRITE = [Operation("create", "new"), Operation("write", "new", data=b"new"), Operation("rename", "new", "file")]
SYNC = Operation("sync", "new")
KEEP = Operation("sync", ".")


def states(before: Tree, operations: Sequence[Operation], limit: int = 1000) -> list[Tree]:
    return [state.tree for state in crash_states(before, operations, limit)]


@pytest.mark.parametrize(
    ("operations", "expected"),
    [
        (WRITE, {b"old", b"", b"\0\0\0", b"new"}),
        ([*WRITE[:2], SYNC, WRITE[2]], {b"old", b"new"}),
        ([*WRITE, KEEP, Operation("sync", "file")], {b"old", b"", b"\0\0\0", b"new"}),
    ],
)
def test_a_renamed_file_is_whole_only_if_it_was_flushed_before(
    operations: Sequence[Operation], expected: set[bytes]
) -> None:
    contents = {tree["file"] for tree in states({"file": b"old"}, operations)}
    shorter = {content for content in contents if isinstance(content, bytes) and len(content) in (1, 2)}
    assert contents - shorter == expected


@pytest.mark.parametrize(
    ("last", "expected"), [((WRITE[2], KEEP), [{"file": b"new"}]), ((WRITE[2],), [{"new": b"new"}, {"file": b"new"}])]
)
def test_a_name_stays_only_if_its_folder_was_flushed(last: Sequence[Operation], expected: list[Tree]) -> None:
    """At the end, even if an earlier moment has the same state."""
    operations = [*WRITE[:2], SYNC, *last]
    assert [state.tree for state in crash_states({}, operations) if state.number == len(operations)] == expected
    assert {(), ("new",), ("file",)} == {tuple(tree) for tree in states({}, operations)}


def test_folders_keep_their_order_and_a_move_is_whole() -> None:
    before: Tree = {"a": None, "b": None, "a/x": b"x"}
    operations = [Operation("create", "a/1"), Operation("create", "b/2"), Operation("create", "a/3")]
    names = [{*tree} - {*before} for tree in states(before, operations)]
    assert sorted(map(sorted, names)) == [[], ["a/1"], ["a/1", "a/3"], ["a/1", "a/3", "b/2"], ["a/1", "b/2"], ["b/2"]]
    moved = states(before, [Operation("create", "b/2"), Operation("rename", "a/x", "b/x")])
    assert [sorted({*tree} - {"a", "b"}) for tree in moved] == [["a/x"], ["a/x", "b/2"], ["b/2", "b/x"]]


def test_blocks_reach_the_disk_in_any_order() -> None:
    operations = [Operation("resize", "f"), Operation("write", "f", data=b"n" * 8192)]
    ends = {
        (len(content), content[:1], content[-1:])
        for tree in states({"f": b"o" * 8192}, operations, 500)
        if isinstance(content := tree["f"], bytes)
    }
    assert {(8192, b"o", b"o"), (0, b"", b""), (8192, b"n", b"n"), (8192, b"\0", b"\0")} <= ends


def test_a_log_keeps_its_flushed_lines() -> None:
    lines = [Operation("write", "log", size=-1, data=b"a\n"), Operation("sync", "log")]
    lines += [Operation("write", "log", size=-1, data=b"b\n")]
    contents = {state.tree["log"] for state in crash_states({"log": b""}, lines) if state.number == len(lines)}
    assert {b"a\n", b"a\nb\n", b"a\n\0\0"} <= contents <= {b"a\n", b"a\nb", b"a\nb\n", b"a\n\0", b"a\n\0\0"}
