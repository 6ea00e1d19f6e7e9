"""The messages in the troubleshooting guide are those that the program prints."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from helpers import ROOT

GUIDE = (ROOT / "recipes" / "guides" / "troubleshooting.md").read_text()
MESSAGES = re.findall(r"^\| `(.+?)` \|", GUIDE.split("## By message")[1].split("## By symptom")[0], flags=re.MULTILINE)


def texts(path: Path) -> Iterator[str]:
    """Yield each text in a source file, an f-string with what its braces choose from."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant | ast.JoinedStr):
            values = [getattr(part, "value", None) for part in ast.walk(node)]
            yield "".join(value for value in values if isinstance(value, str))


def test_the_guides_messages_are_printed() -> None:
    paths = [path for folder in ("d2v_composer", "recipes") for path in (ROOT / folder).rglob("*.py")]
    printed = [text for path in paths for text in texts(path)]
    assert len(MESSAGES) > 30
    for message in MESSAGES:
        parts = [part for part in message.split("…") if part.strip(":;, ")]
        assert any(all(part in text for part in parts) for text in printed), message
