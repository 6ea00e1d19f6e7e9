"""The pixels of decoded and augmented images."""

import errno
import io
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
import torch
from PIL import Image, ImageOps, features
from scipy.stats import ks_2samp
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms.functional import pil_to_tensor
from torchvision.transforms.v2.functional import resized_crop as resized_tensor

from d2v_composer.data import images
from d2v_composer.data.images import Box, CuttableJpeg, RandomResizedCropFlip, random_crop_box
from d2v_composer.data.modality import sample_rng
from d2v_composer.system.errors import InputError
from helpers import run_command, saved

SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)


def photo(width: int, height: int) -> Image.Image:
    """A picture with colors that differ from pixel to pixel, so that a wrong neighbor shows."""
    rng = np.random.default_rng((width, height))
    coarse = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)).resize((width, height))
    noise = rng.integers(0, 128, (height, width, 3))
    return Image.fromarray((np.asarray(coarse) // 2 + noise).astype(np.uint8))


PHOTO = photo(90, 70)
WHOLE = Box(0, 0, 90, 70)


def opened(encoded: bytes) -> Image.Image:
    """Decode an image by Pillow."""
    return Image.open(io.BytesIO(encoded)).convert("RGB")


def expected_pixels(encoded: bytes, box: Box, height: int = 32, width: int = 32) -> torch.Tensor:
    """The pixels that torchvision crops from the whole image, decoded by Pillow."""
    left, top, right, bottom = box
    options: Any = [height, width], InterpolationMode.BICUBIC
    image = pil_to_tensor(opened(encoded))
    return resized_tensor(image, top, left, bottom - top, right - left, *options, antialias=True)


@pytest.mark.parametrize("sampling", ["444", "422", "420", "440", "411"])
@pytest.mark.parametrize(("width", "height"), [(97, 61), (17, 130), (7, 5)])
def test_a_box_of_a_jpeg_has_the_pixels_of_the_whole_image(width: int, height: int, sampling: str) -> None:
    encoded = simplejpeg.encode_jpeg(np.array(photo(width, height)), quality=92, colorsubsampling=sampling)
    whole = opened(encoded)
    jpeg = CuttableJpeg.parse(encoded, "a picture")
    assert jpeg
    assert jpeg.size == (width, height)
    for bottom in range(1, height + 1):
        for box in (
            Box(0, 0, width, bottom),
            Box(0, bottom - 1, 1, bottom),
            Box(width - 1, bottom - 1, width, bottom),
            Box(width // 3, bottom // 2, width // 3 + 2, bottom),
        ):
            assert np.array_equal(np.asarray(jpeg.crop(box)), np.asarray(whole.crop(box)))


RESTARTS, PLAIN = saved(PHOTO, restart_marker_blocks=3), saved(PHOTO)
CUTTABLE = {
    "RGB inside": saved(PHOTO, keep_rgb=True),
    "restart markers": RESTARTS,
    "a thumbnail with an end of its own": RESTARTS[:2] + b"\xff\xe1\0\x06\xff\xd8\xff\xd9" + RESTARTS[2:],
    "a hole": PLAIN[: len(PLAIN) // 2] + PLAIN[len(PLAIN) // 2 + 200 :],
    "nothing but the end after the middle": PLAIN[: len(PLAIN) // 2] + b"\xff\xd9",
}
OTHER_IMAGES = {
    "grayscale": saved(PHOTO.convert("L")),
    "CMYK": saved(PHOTO.convert("CMYK")),
    "PNG": saved(PHOTO, "PNG"),
    "WebP": saved(PHOTO, "WEBP"),
    "progressive": saved(PHOTO, progressive=True),
    "bytes behind the end": PLAIN + b"\0\0",
}


@pytest.mark.parametrize("kind", CUTTABLE | OTHER_IMAGES)
def test_pixels_are_those_of_torchvision(kind: str) -> None:
    encoded = (CUTTABLE | OTHER_IMAGES)[kind]
    assert (CuttableJpeg.parse(encoded, kind) is None) == (kind in OTHER_IMAGES)
    for sample_id in range(20):
        box = random_crop_box(90, 70, sample_rng(0, 0, sample_id), SCALE, RATIO)
        expected = expected_pixels(encoded, box)
        for flip, wanted in ((0.0, expected), (1.0, expected.flip(-1))):
            assert torch.equal(RandomResizedCropFlip(32, flip=flip)(encoded, sample_rng(0, 0, sample_id)), wanted)


@pytest.mark.parametrize("kind", CUTTABLE | OTHER_IMAGES)
def test_an_evaluation_resizes_jpegs_as_training_does_and_other_images_as_pillow_does(kind: str) -> None:
    encoded = (CUTTABLE | OTHER_IMAGES)[kind]
    trained, decoded = expected_pixels(encoded, WHOLE), images.Images(32).decode(encoded, kind)
    pillow = pil_to_tensor(opened(encoded).resize((32, 32), Image.Resampling.BICUBIC))
    assert torch.equal(decoded, pillow if kind in ("PNG", "WebP") else trained)
    assert (decoded.int() - pillow.int()).abs().max() <= 1
    converted, _ = images.Images.encode(encoded, kind, resize=32, quality=100)
    shrunk = expected_pixels(encoded, WHOLE, 32, 41).permute(1, 2, 0).numpy()
    assert converted == saved(Image.fromarray(shrunk), quality=100)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_a_turned_image_is_upright_in_training_evaluation_and_conversion(file_format: str, orientation: int) -> None:
    """Pillow's exif_transpose says what upright is."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    options: dict[str, Any] = {"lossless": True} if file_format == "WEBP" else {}
    encoded = saved(photo(6, 5).resize((90, 70)), file_format, exif=exif, **options)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(encoded)))
    width, height = (90, 70) if orientation < 5 else (70, 90)
    assert upright.size == (width, height)
    assert torch.equal(images.Images((height, width)).decode(encoded, "a"), pil_to_tensor(upright))
    for sample_id in range(3):
        pixels, wanted = (
            RandomResizedCropFlip(32)(file, sample_rng(0, 0, sample_id)) for file in (encoded, saved(upright, "PNG"))
        )
        assert torch.equal(pixels, wanted)
    converted, _ = images.Images.encode(encoded, "a", quality=100)
    assert (converted == encoded) == (file_format == "JPEG" and orientation == 1)
    if converted != encoded:
        again = Image.open(io.BytesIO(converted))
        assert not again.getexif()
        assert np.abs(np.asarray(again).astype(int) - np.asarray(upright)).mean() < 2


WORDED = b"II*\0\x08\0\0\0" + b"\x01\0" + b"\x12\x01\x02\0\x04\0\0\0six\0" + bytes(4)  # the orientation is a text


@pytest.mark.parametrize("record", [b"", b"II*\0", b"no record", WORDED])
def test_a_corrupt_exif_record_turns_nothing(record: bytes) -> None:
    encoded = saved(PHOTO, exif=b"Exif\0\0" + record)
    assert CuttableJpeg.parse(encoded, "a")
    assert images.decode_rgb(encoded, "a").tobytes() == images.decode_rgb(PLAIN, "a").tobytes()


@pytest.mark.parametrize("kept", [2, 30, 700, 3000, -300, -2, -1])
def test_a_truncated_jpeg_is_named(kept: int) -> None:
    encoded = PLAIN[:kept]
    with pytest.raises(InputError, match=rf"sample 3 of x: cannot decode as an image \({len(encoded)} bytes\)"):
        RandomResizedCropFlip(32)(encoded, sample_rng(0, 0, 0), "sample 3 of x")


def test_a_jpeg_that_claims_to_be_huge_is_refused_before_it_is_decoded() -> None:
    encoded = bytearray(saved(photo(90, 70)))
    jpeg = CuttableJpeg.parse(bytes(encoded), "")
    assert jpeg
    encoded[jpeg.height_at : jpeg.height_at + 4] = b"\xff\xdc\xff\xdc"
    assert CuttableJpeg.parse(bytes(encoded), "") is None
    with pytest.raises(InputError, match="more than 89478485 pixels"):
        RandomResizedCropFlip(32)(bytes(encoded), sample_rng(0, 0, 0))


def test_boxes_are_distributed_as_torchvisions() -> None:
    ours = np.array([random_crop_box(500, 375, sample_rng(0, 0, i), SCALE, RATIO) for i in range(4000)])
    left, top, right, bottom = ours.T
    assert min(left.min(), top.min(), 500 - right.max(), 375 - bottom.max()) >= 0

    torch.manual_seed(0)
    image = torch.empty(3, 375, 500)
    theirs = np.array([RandomResizedCrop.get_params(image, [*SCALE], [*RATIO]) for _ in range(4000)])
    their_top, their_left, their_height, their_width = theirs.T
    # Two-sample Kolmogorov-Smirnov: 4,000 draws of one distribution differ by less than 0.044 with 99.9 %.
    for a, b in (
        ((right - left) * (bottom - top), their_height * their_width),
        ((right - left) / (bottom - top), their_width / their_height),
        (left, their_left),
        (top, their_top),
    ):
        assert float(ks_2samp(a, b)[0]) < 0.044  # pyright: ignore[reportArgumentType]


def test_an_image_too_narrow_for_any_box_is_cropped_in_the_middle() -> None:
    assert random_crop_box(1000, 10, sample_rng(0, 0, 0), (0.5, 1.0), RATIO) == (493, 0, 506, 10)
    assert random_crop_box(10, 1000, sample_rng(0, 0, 0), (0.5, 1.0), RATIO) == (0, 493, 10, 506)


def test_decoding_without_descriptors_does_not_blame_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_descriptors(*_: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(images, "open_image", no_descriptors)
    with pytest.raises(OSError, match="Too many open files"):
        images.decode_rgb(PLAIN, "sample 3")
    # Pillow would drop a format whose module cannot be opened at its first use.
    assert set(images.IMAGE_FORMATS) <= Image.OPEN.keys()


PLUGIN = """
import io
from PIL import Image

def register_heif_opener():
    Image.register_open("HEIF", lambda file, _: Image.open(io.BytesIO(file.read()[12:])), lambda head: b"heic" in head)
    Image.register_extension("HEIF", ".heic")
"""
PROGRAM = """
import sys
from pathlib import Path
for name in [name for name in sys.modules if name.startswith("d2v_composer")]:
    del sys.modules[name]  # imported without the plugin
from d2v_composer.data.images import Images, decode_rgb
from d2v_composer.sources.open import open_source

found = open_source(".", Images())
print([*found.ids], found.left_out, decode_rgb(Path("0.heic").read_bytes(), "0.heic").size)
"""


def test_heic_is_decoded_with_its_plugin(tmp_path: Path) -> None:
    """A plugin of the tests', because pillow-heif need not be here; without one, tests/promises/test_distill.py."""
    (tmp_path / "pillow_heif.py").write_text(PLUGIN)
    (tmp_path / "0.heic").write_bytes(b"\0\0\0\x0cftypheic" + saved(photo(40, 30), "PNG"))
    ended = run_command(sys.executable, "-c", PROGRAM, cwd=tmp_path)
    assert ended.stdout == "['0.heic'] {'.py': 1} (40, 30)\n", ended.stderr


def test_avif_is_decoded_if_pillow_can() -> None:
    assert (".avif" in images.Images.suffixes) == features.check("avif")
    if features.check("avif"):
        decoded = images.decode_rgb(saved(photo(64, 48), "AVIF", quality=100, subsampling="4:4:4"), "0.avif")
        assert np.abs(np.asarray(decoded).astype(int) - np.asarray(photo(64, 48))).max() <= 3
