"""Tables of text and Markdown."""

from d2v_composer.evaluation.text_table import format_table
from recipes.ablations import DATASET, EMBEDDINGS, FinishedRun, table


def test_aligns_the_first_column_left_and_the_others_right() -> None:
    lines = format_table(["", "top-1", "top-3"], [["ours", "7.0"], ["1e3", "10.00", "3"]]).splitlines()
    assert lines == ["        top-1    top-3", "ours      7.0", "1e3     10.00        3"]
    assert format_table(["", "top-1"], []).split() == ["top-1"]


def test_the_ablations_table_is_markdown() -> None:
    log = {"loss/train/total": {0: 2.0, 1: 1.0}, "time/sample": {1: 10.0}, "throughput/images_per_sec": {1: 5.0}}
    for bank, untrained, trained, teacher in (("train", 0.25, 0.5, 0.75), ("test", 0.5, 0.75, 0.5)):
        for embedding in EMBEDDINGS:
            log[f"metrics/{DATASET}/bank_{bank}/top1/{embedding}"] = {0: untrained, 1: trained}
            log[f"metrics/{DATASET}/teacher/bank_{bank}/top1/{embedding}"] = {0: teacher}
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table([FinishedRun("base", log)]).splitlines()]
    assert rows[0] == ["bank train / bank test", *EMBEDDINGS, "loss", "s"]
    assert [row[:2] for row in rows[2:]] == [
        ["untrained", "25.0 / 50.0"],
        ["base", "50.0 / 75.0 (50 %)"],  # the teacher has no advantage with bank test
        ["teacher", "75.0 / 50.0"],
    ]
    assert rows[3][-2:] == ["1.500", "2"]
