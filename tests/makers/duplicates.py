"""Plant altered copies among CIFAR-10 images, and count those that d2v search --duplicates finds, for search.md.

PYTHONPATH=tests python tests/makers/duplicates.py
"""

import io
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image, ImageOps

from d2v_composer.commands import embed, search
from d2v_composer.sources.labeled import load_labeled_set
from helpers import QUICKSTART

NUM_IMAGES, COPY_EVERY, SIDE = 500, 12, 32
THRESHOLDS = (0.98, 0.95, 0.9, 0.85)


def altered(image: Image.Image, kind: int) -> Image.Image:
    """Return a copy that is cropped, compressed, resized or mirrored."""
    if kind == 0:
        return image.crop((2, 2, SIDE - 2, SIDE - 2)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    if kind == 1:
        image.save(buffer := io.BytesIO(), "JPEG", quality=60)
        return Image.open(buffer)
    if kind == 2:
        return image.resize((24, 24), Image.Resampling.BICUBIC)
    return ImageOps.mirror(image)


def main() -> None:
    """Print recall of the copies, and the share of listed images that are copies or have one, for each threshold."""
    images = load_labeled_set("mds", QUICKSTART / "cifar10", image_size=SIDE).train.samples[:NUM_IMAGES]
    with TemporaryDirectory() as temporary:
        (photos := Path(temporary) / "photos").mkdir()
        for number, pixels in enumerate(images):
            image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
            image.save(photos / f"{number}.png")
            if number % COPY_EVERY == 0 and number // COPY_EVERY < 40:
                altered(image, number // COPY_EVERY % 4).save(photos / f"{number}.copy.png")
        index = str(Path(temporary) / "photos.npy")
        embed.main([str(QUICKSTART / "teacher.safetensors"), str(photos), index])
        ids = np.load(Path(temporary) / "photos.ids.npy")
        of = np.array([name.partition(".")[0] for name in ids.tolist()])
        is_copy = np.char.endswith(ids, ".copy.png")
        for threshold in THRESHOLDS:
            groups = search.main([index, "--duplicates", "--above", str(threshold)])
            listed = np.concatenate([group.rows for group in groups])
            right = [row for group in groups for row in group.rows if (of[group.rows] == of[row]).sum() > 1]
            found = sum(is_copy[row] for row in right)
            print(f"above {threshold}: recall {found / is_copy.sum():.3f}, precision {len(right) / len(listed):.3f}")


if __name__ == "__main__":
    main()
