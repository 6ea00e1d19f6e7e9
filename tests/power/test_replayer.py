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
    found = {tree["file"] for tree in states({"file": b"old"}, operations)}
    torn = {content for content in found if isinstance(content, bytes) and len(content) in (1, 2)}
    assert found - torn == expected


def test_what_is_safe_stays(tmp_path: object) -> None:
    """After the folder's flush a name is there; before it, both are possible."""
    operations = [*WRITE[:2], SYNC, WRITE[2], KEEP]
    after = [state for state in crash_states({}, operations) if state.number == len(operations)]
    assert all(state.tree == {"file": b"new"} for state in after)
    assert {(): 1, ("new",): 1, ("file",): 1}.keys() == {tuple(tree) for tree in states({}, operations)}


def test_folders_keep_their_order_and_a_move_is_whole() -> None:
    before: Tree = {"a": None, "b": None, "a/x": b"x"}
    operations = [Operation("create", "a/1"), Operation("create", "b/2"), Operation("create", "a/3")]
    found = [{*tree} - {*before} for tree in states(before, operations)]
    assert sorted(map(sorted, found)) == [[], ["a/1"], ["a/1", "a/3"], ["a/1", "a/3", "b/2"], ["a/1", "b/2"], ["b/2"]]
    moved = states(before, [Operation("create", "b/2"), Operation("rename", "a/x", "b/x")])
    assert [sorted({*tree} - {"a", "b"}) for tree in moved] == [["a/x"], ["a/x", "b/2"], ["b/2", "b/x"]]


def test_blocks_reach_the_disk_in_any_order() -> None:
    operations = [Operation("resize", "f"), Operation("write", "f", data=b"n" * 8192)]
    found = {
        (len(content), content[:1], content[-1:])
        for tree in states({"f": b"o" * 8192}, operations, 500)
        if isinstance(content := tree["f"], bytes)
    }
    assert {(8192, b"o", b"o"), (0, b"", b""), (8192, b"n", b"n"), (8192, b"\0", b"\0")} <= found


def test_a_log_keeps_its_flushed_lines() -> None:
    lines = [Operation("write", "log", size=-1, data=b"a\n"), Operation("sync", "log")]
    lines += [Operation("write", "log", size=-1, data=b"b\n")]
    found = {tree["log"] for tree in states({"log": b""}, lines)}
    assert {b"a\n", b"a\nb\n"} <= found
    assert all(content in (b"", b"a") or content is not None for content in found)
