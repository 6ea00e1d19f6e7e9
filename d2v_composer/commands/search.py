"""Find the images or clips of an index that are nearest to a query, or the index's near-duplicates.

    d2v search photos.npy query.jpg
    d2v search photos.npy queries --k 5 --html neighbors.html
    d2v search photos.parquet --id holiday/0012.jpg --json
    d2v search old.npy query.jpg --model student.safetensors
    d2v search photos.npy --duplicates --above 0.9 --html duplicates.html

The model that made INDEX embeds QUERY, unless --model names another model of the same embedding space. The search
compares QUERY with every row of INDEX, by cosine. --duplicates subtracts the mean of all rows, then compares all pairs
of rows; the two rows of a pair whose cosine is above --above are in the same group. --html also reads the images or
clips that were embedded.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from d2v_composer.commands.command import Command, PlaceHere, Positional, whole
from d2v_composer.sources import SOURCES
from d2v_composer.system.command_line import print_next
from d2v_composer.system.errors import InputError
from d2v_composer.system.files import check_out_file, write_atomically

if TYPE_CHECKING:
    from d2v_composer.embedding.index import VectorIndex
    from d2v_composer.embedding.search import Found
    from d2v_composer.report.gallery import Shown
    from d2v_composer.sources.source import Source

DEFAULT_K, DEFAULT_ABOVE = 10, 0.95
ROWS_SHOWN, SAMPLES_SHOWN = 100, 24  # of a page
LIMITS_SHOWN = f"A row shows at most {SAMPLES_SHOWN} samples."
NEIGHBORS_SHOWN = "Each row has a query and the nearest samples, with each sample's cosine to the query."
DUPLICATES_SHOWN = (
    "Each row is a group of near-duplicates, with each sample's cosine to the first sample of the group, after the "
    "mean of all embeddings is subtracted."
)


class Search(Command):
    index: Positional[str]
    """Path or address of the index: NAME.npy, with the ids in NAME.ids.npy, or NAME.parquet."""
    query: Positional[tuple[str, ...]] = Field(
        (), description=f"An image, a clip, a folder of images or clips, {SOURCES}."
    )
    id: str | None = None
    """Find the neighbors of the row with this id, instead of the neighbors of a QUERY."""
    duplicates: bool = False
    """List the groups of near-duplicates in INDEX, without a QUERY."""
    above: Annotated[float, Field(ge=-1, lt=1)] | None = None
    """Cosine above which two rows are near-duplicates, after the mean of all rows is subtracted; default: 0.95."""
    k: Annotated[int, whole(1, 0x10000)] | None = None
    """Number of neighbors to find for each query; default: 10."""
    model: str | None = None
    """Model that embeds QUERY: a path, an address or timm/NAME; default: the model that made INDEX."""
    as_json: bool = Field(False, alias="json", description="Print JSON.")
    html: PlaceHere | None = None
    """HTML file to write the results to, with images or, for clips, spectrograms and players."""
    source: str | None = None
    """For --html: where the embedded images or clips are, as SOURCE of d2v embed; default: the SOURCE that d2v embed
    read."""
    overwrite: bool = False
    """Replace the HTML file if it exists."""

    def run(self) -> "list[Found]":
        """Print and return the nearest rows of each query, or the groups of near-duplicates."""
        path, page = self.index, self.html
        kinds = {"QUERY": self.query, "--id": self.id, "--duplicates": self.duplicates}
        if len(given := [name for name, value in kinds.items() if value]) != 1:
            raise InputError(f"expected one of QUERY, --id and --duplicates; got {' and '.join(given) or 'none'}")
        for name, value, needed, is_met in (
            ("--k", self.k, "QUERY or --id", not self.duplicates),
            ("--model", self.model, "QUERY", bool(self.query)),
            ("--above", self.above, "--duplicates", self.duplicates),
            ("--source", self.source, "--html", page is not None),
        ):
            if value is not None and not is_met:
                raise InputError(f"{name}: can be used only with {needed}")
        if page is not None:
            check_out_file(page, overwrite=self.overwrite)

        import torch

        from d2v_composer.embedding.index import read_index
        from d2v_composer.embedding.search import embed_queries, near_duplicates, search, search_row

        device = "cuda" if torch.cuda.is_available() else "cpu"
        index, queries, k = read_index(path), [], self.k or DEFAULT_K
        opened = None if page is None else _open_samples(path, index, self.source)
        if self.duplicates:
            found = near_duplicates(index.rows, DEFAULT_ABOVE if self.above is None else self.above, device)
        elif self.id:
            found = [search_row(index, path, self.id, k)]
        else:
            queries, names, embeddings = embed_queries(index, path, self.query, self.model, device)
            found = search(index, names, embeddings, k)
        if self.as_json:
            print(json.dumps([_as_json(each, index.ids) for each in found], indent=1, ensure_ascii=False))
        else:
            for each in found:
                pairs = zip(each.rows, each.cosines, strict=True)
                lines = (f"  {cosine:.4f}  {index.ids[row]}" for row, cosine in pairs)
                print("\n".join([each.query or f"{len(each.rows)} near-duplicates", *lines]))
            if self.duplicates:
                print(f"groups of near-duplicates: {len(found):,}, with {sum(len(each.rows) for each in found):,} rows")
        if page is not None and opened is not None:
            from d2v_composer.report.gallery import render

            about = DUPLICATES_SHOWN if self.duplicates else NEIGHBORS_SHOWN
            rows = [*_rows(index.ids, found, queries, *opened)]
            values = {"title": path, "about": f"{about} {LIMITS_SHOWN}", "rows": rows}
            write_atomically(page, render("search.html", left_out=len(found) - len(rows), **values))
            if not self.as_json:
                print_next(f"open {page.absolute().as_uri()}")
        return found


main = Search.main


def _as_json(found: "Found", ids: Any) -> dict[str, Any]:
    pairs = zip(found.rows, found.cosines, strict=True)
    rows = [{"id": str(ids[row]), "cosine": float(cosine)} for row, cosine in pairs]
    return {"query": found.query, "neighbors": rows} if found.query else {"near_duplicates": rows}


def _open_samples(path: str, index: "VectorIndex", source: str | None) -> "tuple[Source, dict[str, int]]":
    """Open the samples of an index; return the samples, and each sample's id → the sample's index."""
    from d2v_composer.data import MODALITIES
    from d2v_composer.report.gallery import SHOWN_SIZE
    from d2v_composer.sources.open import open_source

    if (made_by := index.made_by) is None:
        raise InputError(f"--html: {path} has no record of the samples it was made from; run d2v embed again")
    modality = MODALITIES[made_by["modality"]].of_side(SHOWN_SIZE)
    hint = "; set --source to the place where the embedded samples are now"
    try:
        samples = open_source(source or made_by["source"], modality, column=made_by["column"])
    except InputError as error:
        raise InputError(f"--html: {error}{hint}") from error
    numbers = {str(name): number for number, name in enumerate(samples.ids)}
    if missing := sorted({*index.ids.tolist()} - numbers.keys()):
        raise InputError(
            f"--html: {samples.root} lacks samples of {path}: {len(missing):,}, such as {missing[0]}{hint}"
        )
    return samples, numbers


def _rows(
    ids: Any, found: "Sequence[Found]", queries: "Sequence[Source]", samples: "Source", numbers: Mapping[str, int]
) -> "Iterator[list[Shown]]":
    from d2v_composer.report.gallery import Shown, picture, sound

    def show(of: "Source", number: int, title: str, name: str) -> Shown:
        sample = of.decode(number)
        return Shown(title, "", name, picture(sample), sound(sample))

    def show_row(row: int, title: str) -> Shown:
        name = str(ids[row])
        return show(samples, numbers[name], title, name)

    asked = ((replace(of, modality=samples.modality), number) for of in queries for number in range(len(of)))
    for each in found[:ROWS_SHOWN]:
        first = [show(*query, "query", each.query) for query in [next(asked, None)] if query]
        first += [] if each.row is None else [show_row(each.row, "query")]
        pairs = zip(each.rows[:SAMPLES_SHOWN], each.cosines, strict=False)
        yield first + [show_row(row, f"{cosine:.4f}") for row, cosine in pairs]
