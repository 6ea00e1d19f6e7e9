"""Find the images or clips of an index that are nearest to a query, or the index's near-duplicates.

    d2v search photos.npy query.jpg
    d2v search photos.npy queries --k 5 --html neighbors.html
    d2v search photos.parquet --id holiday/0012.jpg --json
    d2v search old.npy query.jpg --model student.safetensors
    d2v search photos.npy --duplicates --above 0.9 --html duplicates.html

INDEX is what d2v embed wrote. It says which model made it, and this model embeds the queries. --model names the model
if it moved, or a student that searches its teacher's index; a model of another space is refused. The search is exact,
by cosine. --duplicates compares all pairs, after it subtracted what all rows have in common; a group is what pairs
above the threshold connect. --html writes one page with the pictures, or with spectrograms and players, which needs
the files of the index.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from d2v_composer.commands.options import make_parser
from d2v_composer.system.command_line import print_next
from d2v_composer.system.errors import InputError
from d2v_composer.system.files import check_out_file, write_atomically

if TYPE_CHECKING:
    from d2v_composer.embedding.align import VectorIndex
    from d2v_composer.embedding.search import Found
    from d2v_composer.report.gallery import Shown
    from d2v_composer.sources.source import Source

SLOW_HOURS = 1 / 60  # what takes longer is announced
ROWS_SHOWN, SAMPLES_SHOWN = 100, 12  # of a page
NEIGHBORS_SHOWN = "Each row is a query, and what is nearest to it, with its cosine."
DUPLICATES_SHOWN = (
    "Each row is a group of near-duplicates, with the cosine of each with the first, without the mean of all."
)


def main(argv: Sequence[str]) -> "list[Found]":
    """Print what each query finds, or the groups of near-duplicates, and write the page."""
    arguments = make_parser(__doc__, "search").parse_args(argv)
    path, page = arguments.index, arguments.html
    kinds = {"QUERY": arguments.query, "--id": arguments.id, "--duplicates": arguments.duplicates}
    if len(given := [name for name, value in kinds.items() if value]) != 1:
        raise InputError(f"expected one of QUERY, --id and --duplicates; got {' and '.join(given) or 'none'}")
    if page is not None:
        check_out_file(page, overwrite=True)

    import torch

    from d2v_composer.embedding.align import read_index
    from d2v_composer.embedding.search import embed_queries, near_duplicates, search, search_row

    device = "cuda" if torch.cuda.is_available() else "cpu"
    index, queries = read_index(path), []
    if arguments.duplicates:
        found = near_duplicates(index.rows, arguments.above, device, _announce)
    elif arguments.id:
        found = [search_row(index, path, arguments.id, arguments.k)]
    else:
        queries, names, embeddings = embed_queries(index, path, arguments.query, arguments.model, device)
        found = search(index, names, embeddings, arguments.k)
    rows = [*_rows(path, index, found, queries, arguments.source)] if page is not None else []
    if arguments.json:
        print(json.dumps([_as_json(each, index.ids) for each in found], indent=1, ensure_ascii=False))
    else:
        for each in found:
            lines = (f"  {cosine:.4f}  {index.ids[row]}" for row, cosine in zip(each.rows, each.cosines, strict=True))
            print("\n".join([each.query or f"{len(each.rows)} near-duplicates", *lines]))
        if arguments.duplicates:
            print(f"groups of near-duplicates: {len(found):,}, with {sum(len(each.rows) for each in found):,} rows")
    if page is not None:
        from d2v_composer.report.gallery import render

        about = DUPLICATES_SHOWN if arguments.duplicates else NEIGHBORS_SHOWN
        values = {"title": path, "about": about, "rows": rows, "left_out": len(found) - len(rows)}
        write_atomically(page, render("search.html", **values))
        if not arguments.json:
            print_next(f"open {page.absolute().as_uri()}")
    return found


def _announce(hours: float) -> None:
    if hours > SLOW_HOURS:
        print(f"comparing all pairs takes about {hours:.1f} hours", file=sys.stderr, flush=True)


def _as_json(found: "Found", ids: Any) -> dict[str, Any]:
    pairs = zip(found.rows, found.cosines, strict=True)
    rows = [{"id": str(ids[row]), "cosine": float(cosine)} for row, cosine in pairs]
    return {"query": found.query, "neighbors": rows} if found.query else {"near_duplicates": rows}


def _rows(
    path: str, index: "VectorIndex", found: "Sequence[Found]", queries: "Sequence[Source]", source: str | None
) -> "Iterator[list[Shown]]":
    """Yield what the page shows in each row: a query and what it finds, or a group of near-duplicates.

    Raises:
        InputError: The samples of the index cannot be found.
    """
    from d2v_composer.data import MODALITIES
    from d2v_composer.report.gallery import SHOWN_SIZE, Shown, picture, sound
    from d2v_composer.sources.open import open_source

    if (made_by := index.made_by) is None:
        raise InputError(f"--html: {path} does not say of what its rows are; embed the samples again")
    modality = MODALITIES[made_by["modality"]].of_side(SHOWN_SIZE)
    samples = open_source(source or made_by["source"], modality)
    numbers = {str(name): number for number, name in enumerate(samples.ids)}

    def show(of: "Source", number: int, title: str, name: str) -> Shown:
        sample = of.decode(number)
        return Shown(title, "", name, picture(sample), sound(sample))

    def show_row(row: int, title: str) -> Shown:
        if (name := str(index.ids[row])) not in numbers:
            raise InputError(f"--html: {samples.root} has no {name}; set --source to where the samples of {path} are")
        return show(samples, numbers[name], title, name)

    asked = ((replace(of, modality=modality), number) for of in queries for number in range(len(of)))
    for each in found[:ROWS_SHOWN]:
        first = [show(*query, "query", each.query) for query in [next(asked, None)] if query]
        first += [] if each.row is None else [show_row(each.row, "query")]
        pairs = zip(each.rows[:SAMPLES_SHOWN], each.cosines, strict=False)
        yield first + [show_row(row, f"{cosine:.4f}") for row, cosine in pairs]
