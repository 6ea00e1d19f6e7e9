"""Embed a folder of JPEGs with an exported student, without torch and without this package: a script to copy.

usage: python recipes/embed_onnx.py student.onnx photos embeddings.npy

It needs numpy, onnxruntime and Pillow. The images are prepared as the file's metadata say. The embeddings, (N, D), are
those of ``d2v embed``, up to pixels of a decoded JPEG that differ by 1 of 255.
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

    images = np.stack([prepare(path) for path in sorted(Path(folder).rglob("*.jpg"))])
    outputs: Any = session.run(None, {"images": images})
    np.save(out, outputs[0])


if __name__ == "__main__":
    main(*sys.argv[1:])
