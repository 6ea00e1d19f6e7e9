"""Convert ImageNet's layouts, unusual files, CIFAR-10 and sound to MDS, on disk and in an object store; resume."""

import errno
import io
import json
import resource
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from streaming import MDSWriter, StreamingDataset
from streaming.base.format.mds import MDSReader
from streaming.base.hashing import get_hash

from d2v_composer.commands import convert_audio, convert_images
from d2v_composer.conversion import convert
from d2v_composer.conversion.convert import CIFAR10, convert_cifar10, open_samples, work_folder
from d2v_composer.data.audio import Audio
from d2v_composer.data.images import Images, decode_rgb
from d2v_composer.sources.labeled import EvaluationSet, LabeledSamples, load_labeled_set
from d2v_composer.sources.source import Source
from d2v_composer.system.errors import InputError, RunError
from d2v_composer.system.fetch import cache_folder
from d2v_composer.system.files import sole_user
from gated_store import GatedStore
from helpers import contents_of, encoded_clip, encoded_image, flip_bit, saved, truncated, write_files, write_images

CLASSES = ("n01440764", "n01443537", "n02105855")
NUM_IMAGES = 90
SMALL_SHARDS = ("--shard-size", "10kb", "--workers", "2")
main = convert_images.main


@pytest.fixture(autouse=True)
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, short_pauses: None) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train/WNID/*.JPEG, thirty images per class; read-only."""
    names = [f"train/{CLASSES[i % 3]}/{CLASSES[i % 3]}_{i}.JPEG" for i in range(NUM_IMAGES)]
    images = {name: encoded_image(i, size=48) for i, name in enumerate(names)}
    return write_files(tmp_path_factory.mktemp("imagenet"), images)


def samples(folder: Path) -> list[dict]:
    """Verify every shard against the index, and return the samples."""
    index = json.loads((folder / "index.json").read_bytes())
    for shard in index["shards"]:
        content = (folder / shard["raw_data"]["basename"]).read_bytes()
        assert len(content) == shard["raw_data"]["bytes"]
        assert shard["raw_data"]["hashes"] == {name: get_hash(name, content) for name in ("sha1", "xxh64")}
    return [sample for shard in index["shards"] for sample in MDSReader.from_json(str(folder), None, shard)]


def images(folder: Path) -> list[bytes]:
    return sorted(sample["image"] for sample in samples(folder))


def labels_of(source: Source) -> list[int]:
    assert source.label is not None
    return [source.label(number) for number in range(len(source))]


def test_converts_train_folders(source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    out = tmp_path / "out"
    result = main([str(source), str(out), *SMALL_SHARDS])
    rows = samples(out)
    want = {path.read_bytes(): CLASSES.index(path.parent.name) for path in (source / "train").rglob("*.JPEG")}
    assert {sample["image"]: int(sample["label"]) for sample in rows} == want
    assert len(rows) == len(want) == result.samples == NUM_IMAGES
    assert result.skipped == []
    assert result.shards == len(list(out.glob("shard.*.mds"))) > 5
    assert {name for name in contents_of(out) if not name.startswith("shard.")} == {"index.json", "conversion.json"}
    # Shuffled over all classes: the first shard has more than one.
    assert len({int(sample["label"]) for sample in rows[:12]}) > 1
    assert "90 images, 3 classes" in capfd.readouterr().out
    before = contents_of(out)
    with pytest.raises(InputError, match="holds a finished data set"):
        main([str(source), str(out), "--seed", "1"])
    assert contents_of(out) == before


@pytest.mark.parametrize(
    ("lines", "want"),
    [
        (["ImageId,PredictionString", "a,10 85 1 499 272", "b,2 85 1 9 2 10 1 2 3 4"], [1, 2]),
        (["a.jpg,0", "b.jpg,1"], r"val/a.jpg: expected one of the classes 1, 10, 2; got '0'"),
        (["a.jpg, 1"], r"val/b.jpg: expected one of the classes .*; got ''"),
        (['"a.jpg","2"', "b,10"], [2, 1]),
    ],
)
def test_val_takes_its_labels_from_a_file(tmp_path: Path, lines: list[str], want: list | str):
    images = ("train/1/a.jpg", "train/2/a.jpg", "train/10/a.jpg", "val/a.jpg", "val/b.jpg")
    write_images(tmp_path / "ILSVRC/Data/CLS-LOC", images)
    archive = {"imagenet-object-localization-challenge.zip": b"what it was unpacked from"}
    write_files(tmp_path, archive | {"LOC_val_solution.csv": "\n".join(lines).encode()})
    if isinstance(want, str):
        with pytest.raises(InputError, match=want):
            open_samples(tmp_path, "val")
    else:
        assert labels_of(open_samples(tmp_path, "val")) == want
    result = main([str(tmp_path), str(tmp_path / "out"), "--split", "val", "--labels", "none", "--workers", "1"])
    assert result.samples == 2
    assert all(sample.keys() == {"image"} for sample in samples(tmp_path / "out"))


def test_class_names_of_a_file_may_have_several_words(tmp_path: Path) -> None:
    write_images(tmp_path / "in" / "photos", ("a.jpg", "b.jpg", "c.jpg"))
    lines = ["image,class", "photos/a.jpg,sea lion", 'b.jpg,"lion, sea"', "photos/c, sea horse "]
    (tmp_path / "labels.csv").write_text("\n".join(lines))
    listing = open_samples(tmp_path / "in", labels=tmp_path / "labels.csv")
    assert listing.class_names == ("lion, sea", "sea horse", "sea lion")
    assert labels_of(listing) == [2, 0, 1]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("a.jpg,cat\nb.jpg,dog\na.jpg,dog", r"labels\.csv: a\.jpg has two classes, cat and dog$"),
        ("a.jpg,cat", r"b\.jpg: .*got ''; \S+labels\.csv must have a line 'sample,class' for each sample$"),
        ("a.jpg;cat\nb.jpg;dog", r"a\.jpg: .*got ''; \S+labels\.csv must have a line 'sample,class' for each sample$"),
    ],
)
def test_a_file_of_labels_has_one_for_each_sample(tmp_path: Path, lines: str, message: str) -> None:
    write_images(tmp_path / "in", ("a.jpg", "b.jpg"))
    (tmp_path / "labels.csv").write_text(lines)
    with pytest.raises(InputError, match=message):
        open_samples(tmp_path / "in", labels=tmp_path / "labels.csv")
    (tmp_path / "labels.csv").write_text("a.jpg,cat\nb.jpg,dog\na.jpg,cat")
    assert labels_of(open_samples(tmp_path / "in", labels=tmp_path / "labels.csv")) == [0, 1]


def test_a_class_may_have_the_name_of_a_split(tmp_path: Path) -> None:
    write_images(tmp_path, ("car/1.jpg", "plane/1.jpg", "train/1.jpg"))
    listing = open_samples(tmp_path, "none")
    assert (listing.class_names, labels_of(listing)) == (("car", "plane", "train"), [0, 1, 2])
    listing = open_samples(tmp_path, "train")
    assert (listing.label, [*listing.ids]) == (None, ["train/1.jpg"])


def test_a_folder_without_images_is_no_class(tmp_path: Path) -> None:
    write_images(tmp_path, ("train/bee/1.jpg", "train/cat/deep/1.jpg", "test/cat/1.jpg"))
    write_files(tmp_path, {"train/ant/notes.txt": b"none yet", "train/dog/._1.jpg": b"what macOS leaves in archives"})
    for split, labels in {"train": [0, 1], "test": [1]}.items():
        listing = open_samples(tmp_path, split)
        assert (listing.class_names, labels_of(listing)) == (("bee", "cat"), labels)


@pytest.mark.parametrize(
    ("files", "options", "message"),
    [
        (["a/1.jpg", "2.jpg"], [], "2.jpg: expected one of the classes a; got '2.jpg'; .* use --labels none"),
        (["train/a/1.jpg", "val/b/1.jpg"], ["--split", "val"], "1.jpg: expected one of the classes a; got 'b'"),
        (
            [f"train/{i:050}/1.jpg" for i in range(9)] + ["val/b/1.jpg"],
            ["--split", "val"],
            f"classes {0:050}, …; got 'b'",
        ),
        (["1.jpg"], ["--quality", "0"], "--quality"),
        (
            ["car/1.jpg", "train/1.jpg"],
            [],
            "in: the folder train may be a split, or a class like car; choose with --split train",
        ),
    ],
)
def test_ambiguous_input_is_one_line(tmp_path: Path, files: list[str], options: list[str], message: str):
    write_images(tmp_path / "in", files)
    with pytest.raises(InputError, match=message):
        main([str(tmp_path / "in"), str(tmp_path / "out"), *options])
    assert not (tmp_path / "out").exists()


def colors(size: tuple[int, int] = (60, 40)) -> Image.Image:
    return Image.open(io.BytesIO(encoded_image(3, size=64))).resize(size)


def converted_images(folder: Path, files: dict[str, bytes], *options: str) -> list[bytes]:
    """Convert files, and return the stored images, sorted."""
    main([str(write_files(folder / "in", files)), str(folder / "out"), "--workers", "1", *options])
    return images(folder / "out")


def test_odd_files_become_rgb_jpegs(tmp_path: Path):
    deep = Image.fromarray(np.asarray(colors().convert("L")).astype(np.uint16) << 8)
    odd = {"CMYK": saved(colors().convert("CMYK")), "16 bits": saved(deep, "PNG"), "GIF": saved(colors(), "GIF")}
    for kind, encoded in odd.items():
        converted = np.asarray(decode_rgb(Images.encode(encoded, kind, quality=95)[0], kind)).astype(int)
        assert kind == "GIF" or np.abs(converted - np.asarray(decode_rgb(encoded, kind))).mean() < 4  # dithered
    plain = saved(colors(), comment=b"kept")
    jpegs = converted_images(tmp_path, {f"{kind}.JPEG": encoded for kind, encoded in {**odd, "plain": plain}.items()})
    assert plain in jpegs
    opened = [Image.open(io.BytesIO(encoded)) for encoded in jpegs]
    assert [(image.format, image.mode, image.size) for image in opened] == [("JPEG", "RGB", (60, 40))] * 4


def test_resizes_the_short_side(tmp_path: Path):
    files = {f"{size}.jpg": saved(colors(size)) for size in ((300, 200), (101, 333), (50, 40))}
    jpegs = converted_images(tmp_path, files, "--resize", "64")
    assert sorted(Image.open(io.BytesIO(encoded)).size for encoded in jpegs) == [(50, 40), (64, 211), (96, 64)]
    assert files["(50, 40).jpg"] in jpegs  # never enlarged


def test_finished_shards_are_kept_if_they_are_whole_and_of_the_same_settings(source: Path, tmp_path: Path):
    """The conversion that wrote them stopped at an unreadable image."""
    skipped = [f"train/{CLASSES[0]}/cut.JPEG", f"train/{CLASSES[1]}/empty.JPEG"]
    unreadable = dict(zip(skipped, (truncated(encoded_image(1, size=48)), b""), strict=True))
    damaged, out = write_files(shutil.copytree(source, tmp_path / "in"), unreadable), tmp_path / "out"
    named = r"/train/n014\d+/(cut|empty)\.JPEG: cannot decode as an image .*--skip-unreadable"
    for shard_size in ("4kb", "10kb"):
        with pytest.raises(InputError, match=named):
            main([str(damaged), str(out), "--shard-size", shard_size, "--workers", "1"])
    first, second, *_ = sorted(out.glob("shard.*.mds"))
    first.write_bytes(flip_bit(first.read_bytes()))
    second.unlink()
    (out / "shard.mine.mds").write_bytes(b"mine")
    result = main([str(damaged), str(out), *SMALL_SHARDS, "--skip-unreadable"])
    assert sorted(line.split(":")[0] for line in result.skipped) == skipped
    assert 0 < result.resumed < result.shards
    main([str(damaged), str(tmp_path / "clean"), *SMALL_SHARDS, "--skip-unreadable"])
    assert contents_of(out) == contents_of(tmp_path / "clean") | {"shard.mine.mds": b"mine"}
    assert images(out) == sorted(path.read_bytes() for path in source.rglob("*.JPEG"))


def test_what_the_machine_cannot_read_is_not_skipped(source: Path, tmp_path: Path):
    read_bytes, command = Path.read_bytes, [str(source), str(tmp_path / "out"), *SMALL_SHARDS, "--skip-unreadable"]

    def fail(path: Path) -> bytes:
        if path.name.endswith("_17.JPEG"):
            raise OSError(errno.EIO, "Input/output error", str(path))
        return read_bytes(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "read_bytes", fail)
        with pytest.raises(InputError, match=r"_17\.JPEG cannot be read: Input/output error$"):
            main(command)
    assert main(command).skipped == []


def test_a_full_disk_is_one_line(source: Path, tmp_path: Path) -> None:
    """A limit on files stands for the disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))
    try:
        with pytest.raises(RunError, match=r"/out\S* cannot be written: File too large$"):
            main([str(source), str(tmp_path / "out"), *SMALL_SHARDS])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_two_conversions_at_once_are_one_line(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(convert, "LOCK_SECONDS", 0.1)
    lock = work_folder(str(tmp_path / "out")) / "lock"
    with sole_user(lock), pytest.raises(InputError, match="another conversion"):
        main([str(source), str(tmp_path / "out")])


def test_writes_to_an_object_store(
    source: Path, tmp_path: Path, reachable_store: GatedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store without the bucket, or without access, is one line."""
    remote = f"{reachable_store.create_bucket('conversion')}/imagenet/train"
    shards = ("--shard-size", "50kb", "--workers", "2")
    main([str(source), str(tmp_path / "local"), *shards])
    assert main([str(source), remote, *shards]).samples == NUM_IMAGES
    # The same data set as on disk, and no copy of it here.
    assert reachable_store.objects("conversion", "imagenet/train/") == contents_of(tmp_path / "local")
    assert not [path for path in cache_folder().rglob("*") if path.is_file()]
    for nowhere in ("s3://no-such-bucket/train", "ftp://host/folder"):
        with pytest.raises(InputError, match=rf"^{nowhere} cannot be listed \("):
            main([str(source), nowhere])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(RunError, match=r"^s3://conversion/train/conversion\.json cannot be written"):
        main([str(source), "s3://conversion/train"])


@pytest.fixture
def client(reachable_store: GatedStore) -> Any:
    """A client of the store, which conversions reach too."""
    return reachable_store.client()


@pytest.mark.slow
def test_a_shard_in_a_store_is_kept_only_if_it_is_there(
    source: Path, tmp_path: Path, object_store: GatedStore, client: Any
) -> None:
    """A removed, replaced or foreign shard is written again, whatever the local record says."""
    damaged = write_files(shutil.copytree(source, tmp_path / "in"), {f"train/{CLASSES[2]}/cut.JPEG": b""})
    remote = f"{object_store.create_bucket('resumed')}/train"
    command = [str(damaged), remote, "--shard-size", "20kb", "--workers", "1"]
    main([str(damaged), str(tmp_path / "local"), *command[2:], "--skip-unreadable"])

    def stop(*options: str) -> dict[str, bytes]:
        with pytest.raises(InputError, match=r"cut\.JPEG"):
            main([*command, *options])
        return object_store.objects("resumed", "train/")

    finished = stop()
    replaced = {name for name, content in stop("--resize", "24").items() if finished.get(name) != content}
    removed = max(finished.keys() - replaced)
    client.delete_object(Bucket="resumed", Key=f"train/{removed}")
    result = main([*command, "--skip-unreadable"])
    assert 0 < result.resumed == len(finished.keys() - replaced - {removed}) < len(finished) - 1
    assert object_store.objects("resumed", "train/") == contents_of(tmp_path / "local")


class Cifar10(list):
    """A stand-in for torchvision's, with five images of two classes."""

    classes, targets = ("a", "b"), [1, 0, 1, 1, 0]

    def __init__(self, root: str, train: bool, download: bool) -> None:
        self.data = np.random.default_rng(train).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
        super().__init__(self.data)


@pytest.fixture
def cifar10(monkeypatch: pytest.MonkeyPatch) -> EvaluationSet:
    """Replace torchvision's CIFAR-10 by a small one, and return the images and labels to expect from it."""
    monkeypatch.setattr("torchvision.datasets.CIFAR10", Cifar10)
    pixels = [torch.from_numpy(Cifar10("", train, False).data).permute(0, 3, 1, 2) for train in (True, False)]
    train, test = (LabeledSamples(images, torch.tensor(Cifar10.targets)) for images in pixels)
    return EvaluationSet(train, test, Cifar10.classes)


def assert_begins(ours: EvaluationSet, expected: EvaluationSet, chosen: list[list[int]]) -> None:
    """Check that train and test have the chosen images of two sets, with their labels."""
    assert ours.class_names == expected.class_names
    for split, whole, numbers in zip(ours[:2], expected[:2], chosen, strict=True):
        assert torch.equal(split.samples, whole.samples[numbers])
        assert torch.equal(split.labels, whole.labels[numbers])


def test_cifar10_keeps_its_pixels_labels_and_order(
    cifar10: EvaluationSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    for split in ("train", "test"):
        main([f"{CIFAR10}{tmp_path}", str(tmp_path / split), "--split", split, "--workers", "1"])
    assert " train cifar10.yaml train_loader.local=" in capsys.readouterr().out.splitlines()[-1]
    assert_begins(load_labeled_set("mds", tmp_path, image_size=32), cifar10, [[*range(5)]] * 2)
    with pytest.raises(InputError, match="no split 'val'; available: train, test"):
        main([f"{CIFAR10}{tmp_path}", str(tmp_path / "val"), "--split", "val"])


def test_cifar10_is_read_in_part(cifar10: EvaluationSet, tmp_path: Path):
    """An evaluation reads images at even distances, a sample of the data set has the first ones."""
    for max_images, chosen in {None: [*range(5)], 9: [*range(5)], 3: [0, 1, 3]}.items():
        assert_begins(load_labeled_set("cifar10", tmp_path, max_images=max_images), cifar10, [chosen] * 2)
    for _ in range(2):  # what exists is not made again
        convert_cifar10(tmp_path, tmp_path / "sample", 4, 3)
    assert_begins(load_labeled_set("mds", tmp_path / "sample", image_size=32), cifar10, [[*range(4)], [*range(3)]])
    convert_cifar10(tmp_path, tmp_path / "few", 2, 0)
    assert [path.name for path in (tmp_path / "few").iterdir()] == ["train"]


@pytest.fixture(scope="module")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty FLAC files of 16 kHz in class folders, an OGG, an MP3, a WAV in stereo, one of 44.1 kHz, a cut FLAC."""
    clips = {f"{('no', 'yes')[i % 2]}/{i:02}.flac": encoded_clip(i, 800 + 400 * i) for i in range(40)}
    other_files = {
        "no/vorbis.ogg": encoded_clip(50, 8000, format="OGG"),
        "no/speech.mp3": encoded_clip(51, 8000, format="MP3"),
        "yes/stereo.wav": encoded_clip(52, 8000, format="WAV", channels=2),
        "yes/cd.wav": encoded_clip(53, 44100, format="WAV", rate=44100),
        "yes/cut.flac": truncated(encoded_clip(54, 8000)),
        "yes/notes.txt": b"notes",
    }
    return write_files(tmp_path_factory.mktemp("sounds"), clips | other_files)


def clips_of(folder: Path) -> list[dict]:
    """Read a data set with Streaming's own class."""
    return list(StreamingDataset(local=str(folder), batch_size=1))


def lengths_of(clips: list[dict]) -> list[int]:
    return [len(Audio().decode(clip["audio"], "clip")) for clip in clips]


def test_sound_is_stored_as_it_is_or_as_flac(sounds: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    options = ["--shard-size", "50kb", "--workers", "2", "--skip-unreadable"]
    result = convert_audio.main([str(sounds), str(tmp_path / "out"), *options])
    said, summary = capfd.readouterr().out, json.loads((tmp_path / "out" / "conversion.json").read_bytes())
    clips = clips_of(tmp_path / "out")
    assert lengths_of(clips) == summary["lengths"] == result.lengths
    assert summary["clips"] == result.samples == len(clips) == 44
    assert summary["classes"] == ["no", "yes"]
    assert "44 clips (0.01 hours), 2 classes" in said
    assert "1 .txt" in said
    assert result.shards > 2
    [skipped] = result.skipped
    assert skipped.startswith("yes/cut.flac: cannot decode as a FLAC, WAV, OGG or MP3 file")
    originals, changed = {path.read_bytes(): path.parent.name for path in sounds.rglob("*.*")}, []
    for clip in clips:
        file = soundfile.SoundFile(io.BytesIO(clip["audio"]))
        assert (file.samplerate, file.channels) == (16000, 1)
        if clip["audio"] in originals:
            assert summary["classes"][clip["label"]] == originals[clip["audio"]]
        else:
            changed.append((file.format, file.subtype, int(clip["label"])))
    assert sorted(changed) == [("FLAC", "PCM_16", 0), ("FLAC", "PCM_16", 1), ("FLAC", "PCM_16", 1)]
    assert sum(summary["lengths"]) == pytest.approx(sum(800 + 400 * i for i in range(40)) + 24000 + 16000, abs=1200)


def test_another_makers_mds_of_sound_gets_lengths(tmp_path: Path) -> None:
    """Its column has another name."""
    with MDSWriter(out=str(tmp_path / "theirs"), columns={"flac": "bytes", "text": "str"}) as writer:
        for i in range(5):
            writer.write({"flac": encoded_clip(i, 2000 + i), "text": "word"})
    command = [str(tmp_path / "theirs"), str(tmp_path / "out"), "--column", "flac", "--workers", "1"]
    assert convert_audio.main(command).lengths == [2000 + i for i in range(5)]
    assert lengths_of(clips_of(tmp_path / "out")) == [2000 + i for i in range(5)]
