"""Promises 7, 11 and 13: what a command would write is asked for before its work, and again under its lock."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from gated_store import GatedStore
from helpers import D2V, GOLDEN, d2v, failure, start_python, succeed, wait_until, write_files, write_images

TEACHER = str(GOLDEN / "tiny_base.pt")
BUCKET = "outputs"
EMBED, CONVERT = ("embed", TEACHER, "photos", "o.npy"), ("convert-images", "photos", "o", "--labels", "none")
PART = ("--part", "0/2")


@pytest.fixture(scope="module")
def store(object_store: GatedStore) -> GatedStore:
    object_store.create_bucket(BUCKET)
    return object_store


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return write_images(tmp_path / "photos", [f"{number}.jpg" for number in range(8)])


class Place:
    """A folder, or a prefix of a store."""

    def __init__(self, folder: Path, store: GatedStore | None) -> None:
        self.folder, self.store, self.prefix = folder, store, f"{folder.name}/"
        self.environment = {} if store is None else {**store.environment, "TORCH_HOME": str(folder / "torch")}

    def name(self, out: str) -> str:
        return str(self.folder / out) if self.store is None else f"s3://{BUCKET}/{self.prefix}{out}"

    def write(self, name: str, content: bytes) -> None:
        if self.store is not None:
            self.store.client().put_object(Bucket=BUCKET, Key=self.prefix + name, Body=content)
            return
        write_files(self.folder, {name: content})

    def contents(self) -> Mapping[str, bytes]:
        if self.store is not None:
            return self.store.objects(BUCKET, self.prefix)
        files = [path for path in self.folder.rglob("o*/**/*") if path.is_file()]
        files += [path for path in self.folder.glob("o*") if path.is_file()]
        return {path.relative_to(self.folder).as_posix(): path.read_bytes() for path in files}

    def command(self, *arguments: str) -> list[str]:
        return [self.name(word) if word in ("o", "o.npy") else word for word in arguments]


@pytest.fixture(params=["folder", "store"])
def place(request: pytest.FixtureRequest, tmp_path: Path, photos: Path) -> Place:
    return Place(tmp_path, request.getfixturevalue("store") if request.param == "store" else None)


@pytest.mark.parametrize(
    ("command", "foreign"),
    [
        (EMBED, "o.npy"),
        (EMBED, "o.ids.npy"),
        ((*EMBED, *PART), "o.npy.parts/00000-of-00002.ids.npy"),
        ((*EMBED, *PART), "o.npy.parts/00000-of-00002.json"),
        (CONVERT, "o/shard.00000.mds"),
        (CONVERT, "o/conversion.json"),
        (CONVERT, "o/deep/notes.txt"),
        ((*CONVERT, *PART), "o/notes.txt"),
        ((*CONVERT, *PART), "o/parts/00000-of-00002/shard.00000.mds"),
    ],
)
def test_a_file_of_no_record_of_ours_is_not_replaced(place: Place, command: tuple[str, ...], foreign: str) -> None:
    """7, 11: it is named, and nothing is written beside it."""
    place.write(foreign, b"{}")
    line = failure(d2v(*place.command(*command), cwd=place.folder, environment=place.environment), 2)
    assert place.name("o") in line
    assert place.contents() == {foreign: b"{}"}


@pytest.mark.parametrize(
    ("command", "left", "finished"),
    [
        (CONVERT, {"o/conversion.json": b'{"seed": 0}', "o/shard.00000.mds": b"half"}, "o/index.json"),
        (
            (*EMBED, *PART),
            {"o.npy.parts/00000-of-00002.json": b'{"part": {}}', "o.npy.parts/00000-of-00002.ids.npy": b"half"},
            "o.npy.parts/00000-of-00002.npy",
        ),
    ],
)
def test_what_died_on_another_machine_is_made_again(
    place: Place, command: tuple[str, ...], left: Mapping[str, bytes], finished: str
) -> None:
    """9, 10: only a record of ours, beside it, shows whose it is."""
    for name, content in left.items():
        place.write(name, content)
    succeed(*place.command(*command), cwd=place.folder, environment=place.environment)
    contents = place.contents()
    assert finished in contents
    assert not [name for name in left if contents[name] == left[name]]


@pytest.mark.parametrize(
    ("command", "outputs"),
    [
        (["embed", "MODEL", "photos", "o.npy"], {"o.npy", "o.ids.npy"}),
        (["export", "MODEL", "o.safetensors"], {"o.safetensors"}),
    ],
)
def test_what_came_meanwhile_is_not_replaced(
    command: list[str], outputs: set[str], store: GatedStore, photos: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    """7, 11: the second command has looked for its outputs, and waits for its model, until the first has ended."""
    model = TEACHER if command[0] == "embed" else str(uninterrupted / "latest-rank0.pt")
    store.client().upload_file(model, BUCKET, "model.pt")
    here, there = (
        [path if word == "MODEL" else word for word in command] for path in (model, f"s3://{BUCKET}/model.pt")
    )
    place = Place(tmp_path, None)
    with store.unreachable():
        second = start_python(*D2V, *there, cwd=tmp_path, environment=store.environment | {"TORCH_HOME": str(tmp_path)})
        wait_until(lambda: "retrying" in second.stderr, 60)
        succeed(*here, cwd=tmp_path)
        before = place.contents()
        assert before.keys() == outputs
    second.wait(120)
    assert f"{command[-1]} already exists; choose another" in failure(second, 2)
    assert place.contents() == before
