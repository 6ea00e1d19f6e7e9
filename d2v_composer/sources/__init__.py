"""Read samples from local folders and files, web servers, object stores and the Hugging Face hub."""

from collections.abc import Callable, Iterable
from importlib import import_module
from typing import Any, NamedTuple


class Container(NamedTuple):
    """A kind of file that holds many samples."""

    suffix: str
    plural: str
    ids: str
    """Form of a sample's id, such as ``FILE.zip/PATH``."""
    samples: str
    """Text for the guides: what the samples in a file of this kind are."""
    labels: str
    """Text for the help of ``--label-column``: the option's values; empty if files of this kind have no columns."""
    module: str
    """Name of the module, in this package, that contains the function ``list_samples`` for this kind."""

    @property
    def list_samples(self) -> Callable[..., Any]:  # a SampleListing, whose module imports this one
        return import_module(f"{__package__}.{self.module}").list_samples


CONTAINERS = (
    Container(
        ".parquet",
        "Parquet files",
        "FILE.parquet#ROW",
        "a column of files, as bytes, as Hugging Face's `Image` or `Audio`, or as paths relative to FILE.parquet; if "
        "several columns fit, `--column` chooses one",
        "a column's name",
        "parquet",
    ),
    Container(
        ".tar",
        "tars",
        "FILE.tar/KEY",
        "files by suffix, as in WebDataset; if a key has several such files, `--column jpg` chooses one; without "
        "`--label-column`, folders in the tar are classes and splits",
        "cls or json:KEY",
        "tars",
    ),
    Container(".zip", "zips", "FILE.zip/PATH", "files by suffix", "", "zips"),
)


def path_of(name: str) -> str:
    """Return a path without the parts '' and '.'; return '' if another part begins with a dot, as hidden files do."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    return "" if any(part.startswith(".") for part in parts) else "/".join(parts)


def listed(words: Iterable[str]) -> str:
    """Join words to a text: ``a, b or c``."""
    *first, end = words
    return f"{', '.join(first)} or {end}" if first else end


NAMES = listed(container.plural for container in CONTAINERS)
# What a SOURCE may be besides a folder of files, and the help of --column and --label-column.
SOURCES = (
    f"a local folder of MDS shards, {NAMES} (a file, folder or glob, local or in a store: s3://, …), or "
    "hf://datasets/ORG/NAME"
)
COLUMN = (
    "The column that holds the samples; in tars, the suffix of the samples' files. Default: the only column that can "
    "hold samples; in MDS, image or audio."
)
CHOOSE = "choose one with --column or, in a YAML, with column"
CHOOSE_LABELS = "choose one with --label-column or, in a YAML, with label_column"
LABEL_COLUMN = "; ".join(f"in {container.plural}, {container.labels}" for container in CONTAINERS if container.labels)
# Values of ``format`` of a labeled set; those of LOCAL need a folder on this machine.
LOCAL = ("cifar10", "cifar100", "speech_commands", "mds", "folder")
FORMATS = (*LOCAL, *(container.suffix[1:] for container in CONTAINERS))
FORMAT = (
    "Format of the data set. If null, the format is found from the files in ROOT; set a format for CIFAR, for Speech "
    "Commands, and if ROOT holds files of several formats. Allowed: " + listed(f"``{name}``" for name in FORMATS)
)
IDS = ", ".join(container.ids for container in CONTAINERS)
