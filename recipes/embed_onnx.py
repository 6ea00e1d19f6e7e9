"""Embed a folder of images with an exported student, without torch and without d2v-composer.

usage: python recipes/embed_onnx.py student.onnx photos embeddings.npy

The script needs numpy, onnxruntime and Pillow. student.onnx must take normalized images. embeddings.npy has the
embeddings, (N, D), and embeddings.ids.npy the paths of the images, (N,). Files whose suffix Pillow does not know are
left out.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


def main(file: str, folder: str, out: str) -> None:
    session = onnxruntime.InferenceSession(file)
    preprocessing = json.loads(session.get_modelmeta().custom_metadata_map["preprocessing"])
    height, width = np.broadcast_to(preprocessing["image_size"], 2).tolist()
    interpolation = Image.Resampling[preprocessing["interpolation"].upper()]
    mean, std = np.float32(preprocessing["image_mean"]), np.float32(preprocessing["image_std"])

    def prepare(path: Path) -> np.ndarray:
        upright = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
        pixels = np.asarray(upright.resize((width, height), interpolation))
        return ((pixels / np.float32(255) - mean) / std).transpose(2, 0, 1)

    known = Image.registered_extensions()
    paths = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in known)
    images = np.stack([*map(prepare, paths)])
    outputs: Any = session.run(None, {"images": images})
    np.save(out, outputs[0])
    np.save(Path(out).with_suffix(".ids.npy"), [path.relative_to(folder).as_posix() for path in paths])
    print(f"embedded {len(paths)} images")


if __name__ == "__main__":
    main(*sys.argv[1:])
