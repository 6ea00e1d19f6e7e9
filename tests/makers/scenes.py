"""Make a toy data set for detectors: CIFAR-10's images at random scales and places on textures, with COCO's JSON.

    python tests/makers/scenes.py datasets/scenes

The objects are the quickstart's images: those for training in train/, those for testing in test/. A scene has 192 × 192
pixels and one to six objects of 24 to 96 pixels, which overlap little. The seed decides everything.
"""

import json
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

import numpy as np
from PIL import Image

from d2v_composer import load_labeled_set

ROOT = Path(__file__).resolve().parents[2]
SIDE, SMALLEST, LARGEST, MOST = 192, 24, 96, 6
LARGEST_OVERLAP = 0.1  # of the smaller object
NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
parser.add_argument("out", type=Path, help="a new folder")
parser.add_argument("--train", type=int, default=2000, help="number of training scenes")
parser.add_argument("--test", type=int, default=500, help="number of test scenes")
parser.add_argument("--seed", type=int, default=0)


def texture(rng: np.random.Generator) -> Image.Image:
    """Return smooth random colors with a finer grain."""
    canvas = np.zeros((SIDE, SIDE, 3))
    for cells, weight in ((3, 1.0), (12, 0.6), (48, 0.4)):
        coarse = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        canvas += weight * np.asarray(coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC))
    return Image.fromarray((canvas / 2).astype(np.uint8))


def places(rng: np.random.Generator) -> list[tuple[int, int, int]]:
    """Return left, top and side of each object."""
    chosen: list[tuple[int, int, int]] = []
    for _ in range(rng.integers(1, MOST + 1)):
        side = int(np.exp(rng.uniform(np.log(SMALLEST), np.log(LARGEST))))
        left, top = (int(rng.integers(SIDE - side + 1)) for _ in range(2))
        shared = (
            max(0, min(left + side, x + s) - max(left, x))
            * max(0, min(top + side, y + s) - max(top, y))
            / min(s, side) ** 2
            for x, y, s in chosen
        )
        if max(shared, default=0) <= LARGEST_OVERLAP:
            chosen.append((left, top, side))
    return chosen


def write_scenes(folder: Path, objects: np.ndarray, labels: np.ndarray, count: int, seed: int) -> None:
    """Write scenes with objects from (N, 32, 32, 3) uint8, and their boxes."""
    folder.mkdir(parents=True)
    images, annotations = [], []
    for number in range(count):
        rng = np.random.default_rng((seed, number))
        scene, name = texture(rng), f"{number:05}.png"
        for left, top, side in places(rng):
            chosen = int(rng.integers(len(objects)))
            scene.paste(Image.fromarray(objects[chosen]).resize((side, side), Image.Resampling.BICUBIC), (left, top))
            box, label = [left, top, side, side], int(labels[chosen]) + 1
            row = {"id": len(annotations) + 1, "image_id": number, "category_id": label, "bbox": box, "area": side**2}
            annotations.append({**row, "iscrowd": 0})
        scene.save(folder / name)
        images.append({"id": number, "file_name": name, "width": SIDE, "height": SIDE})
    categories = [{"id": label, "name": name} for label, name in enumerate(NAMES, 1)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations.json").write_text(json.dumps(content))


def main() -> None:
    args = parser.parse_args()
    labeled = load_labeled_set("mds", ROOT / "yamls" / "quickstart" / "cifar10", image_size=32)
    for split, (name, count) in enumerate((("train", args.train), ("test", args.test))):
        samples = getattr(labeled, name)
        objects = np.stack([image.permute(1, 2, 0).numpy() for image in samples.samples])
        write_scenes(args.out / name, objects, samples.labels.numpy(), count, 2 * args.seed + split)


if __name__ == "__main__":
    main()
