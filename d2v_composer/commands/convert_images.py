"""Convert a collection of images to MDS shards.

    d2v convert-images /data/ILSVRC s3://bucket/imagenet/train --resize 256
    d2v convert-images /data/ILSVRC s3://bucket/imagenet/val --resize 256 --split val
    d2v convert-images photos datasets/photos --labels none --workers 8
    d2v convert-images 'laion/*.tar' s3://bucket/laion/train --skip-unreadable
    d2v convert-images hf://datasets/ORG/NAME datasets/birds/train --label-column label
    d2v convert-images cifar10:datasets datasets/cifar10/train
    d2v convert-images cifar10:datasets datasets/cifar10/test --split test

cifar10:FOLDER downloads CIFAR-10 to FOLDER, unless FOLDER has CIFAR-10 already.
For an S3-compatible store, set S3_ENDPOINT_URL, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY.
Run the same command again to resume an interrupted conversion.
SPLIT is the name of a folder, such as train in Kaggle's ILSVRC/Data/CLS-LOC; the folder may be inside a zip or a tar.
For Parquet files, zips and tars, SPLIT may also be a word in the path of the file, such as train in
train-00000.parquet. Labels come from class folders, from Kaggle's LOC_SPLIT_solution.csv, from the CSV file of
--labels, or from --label-column.
"""

from typing import Annotated, Any

from pydantic import Field

from d2v_composer.commands.command import Samples, whole
from d2v_composer.commands.conversion import Convert
from d2v_composer.sources import SOURCES


class ConvertImages(Convert):
    source: Samples = Field(description=f"A folder of images, cifar10:FOLDER, {SOURCES}.")
    resize: Annotated[int, whole(1, 65500)] | None = None
    """Number of pixels to which the short side of a larger image is shrunk; default: no change."""
    quality: Annotated[int, whole(1, 100)] = 90
    """Quality of re-encoded JPEGs, from 1 to 100."""

    def run(self) -> Any:
        """Convert the images, and return the conversion; ``None`` if the part exists already."""
        from d2v_composer.conversion.convert import IMAGES

        yaml = "cifar10" if self.source.startswith("cifar10:") else "distill"
        return self.convert(IMAGES, yaml, resize=self.resize, quality=self.quality)


main = ConvertImages.main
