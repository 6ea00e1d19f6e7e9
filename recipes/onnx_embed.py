"""Embed a folder of images with an exported student where neither torch nor this package is installed.

    pip install numpy onnxruntime pillow
    python onnx_embed.py student.onnx photos photos.npy

photos.npy, (N, D), has a row for each image; photos.ids.npy has the images' paths, as `d2v embed` writes them.
Unreadable images are skipped and listed.
"""

import json
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
BATCH_SIZE = 32


def load(program: str) -> tuple[Any, dict[str, Any]]:
    """Return a function from prepared images to embeddings, (B, D), and the settings for :func:`prepare`."""
    session = onnxruntime.InferenceSession(program, providers=onnxruntime.get_available_providers())
    preprocessing = json.loads(session.get_modelmeta().custom_metadata_map["preprocessing"])
    return lambda images: session.run(None, {"images": images})[0], preprocessing


def prepare(path: Path, how: dict[str, Any]) -> np.ndarray:
    """Decode an image, upright, and resize it without keeping its aspect ratio; normalize it if the program does not.

    Returns:
        (3, height, width) float32; if the program normalizes, (height, width, 3) uint8.
    """
    with Image.open(path) as opened:
        image = ImageOps.exif_transpose(opened)
    if image.mode.startswith("I;16"):  # Pillow would clip values above 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode[0] in "IF":
        raise ValueError(f"expected 8 or 16 bits per color, got Pillow's mode {image.mode}")
    height, width = np.broadcast_to(how["image_size"], 2).tolist()
    pixels = np.asarray(image.convert("RGB").resize((width, height), Image.Resampling[how["interpolation"].upper()]))
    if "image_mean" not in how:
        return pixels
    mean, std = np.float32(how["image_mean"]), np.float32(how["image_std"])
    return ((pixels / np.float32(255) - mean) / std).transpose(2, 0, 1)


def list_images(root: Path) -> list[str]:
    """List the paths of all images below ``root``, relative to it and sorted, without hidden ones.

    Each file is listed once; a link to a file or folder that is also below ``root`` is left out.
    """
    named, links, seen, images = deque([root]), deque[Path](), set[tuple[int, int]](), list[str]()
    while named or links:
        path = (named or links).popleft()
        status = path.stat()
        place = status.st_dev, status.st_ino
        if place not in seen and path.is_dir():
            for entry in path.glob("[!.]*"):
                (links if entry.is_symlink() else named).append(entry)
        elif place not in seen and path.name.lower().endswith(SUFFIXES):
            images.append(path.relative_to(root).as_posix())
        else:
            continue
        seen.add(place)
    return sorted(images)


def main(program: str, folder: str, out: str) -> None:
    outs = [Path(out.removesuffix(".npy") + suffix) for suffix in (".npy", ".ids.npy")]
    if existing := [*filter(Path.exists, outs)]:
        raise SystemExit(f"{existing[0]} exists; choose another OUT")
    embed, preprocessing = load(program)
    names, ids, images, rows = list_images(Path(folder)), [], [], []
    for name in names:
        try:
            images.append(prepare(Path(folder, name), preprocessing))
            ids.append(name)
        except Exception as error:  # noqa: BLE001  (Pillow raises many)
            print(f"skipped {name}: {error}", file=sys.stderr)
        if len(images) == BATCH_SIZE or (images and name == names[-1]):
            rows.append(embed(np.stack(images)))
            images.clear()
    if not rows:
        raise SystemExit(f"{folder}: no image can be read; supported suffixes are {', '.join(SUFFIXES)}")
    np.save(outs[0], np.concatenate(rows))
    np.save(outs[1], np.array(ids))


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    for name in ("program", "folder", "out"):
        parser.add_argument(name)
    main(**vars(parser.parse_args()))
