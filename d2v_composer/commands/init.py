"""Print one of this package's YAMLs as a starting point.

    d2v init quickstart > my.yaml
    d2v train my.yaml max_duration=10ep

The YAML's references to files beside it become absolute paths.
"""

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import d2v_composer
from d2v_composer.system.command_line import d2v, make_parser

YAMLS = Path(d2v_composer.__file__).with_name("yamls").resolve()
# YAML → what reads it, if that is not d2v train.
READERS = {
    "evaluate": d2v("evaluate", "FILE.yaml", "model=PATH"),
    "finetune": "composer recipes/finetune.py FILE.yaml model=PATH (in a clone)",
}


def main(argv: Sequence[str]) -> None:
    """Print the YAML to stdout, and the next step to stderr."""
    names = sorted(path.stem for path in YAMLS.glob("*.yaml"))
    parser = make_parser(__doc__)
    parser.add_argument("name", metavar="NAME", choices=names, help=", ".join(names))
    name = parser.parse_args(argv).name
    text = (YAMLS / f"{name}.yaml").read_text("utf-8")
    # Quoted, since a path may hold ' #' and the like.
    text = re.sub(r"\$\{here:(.*?)\}", lambda match: json.dumps(f"{YAMLS}/{match[1]}", ensure_ascii=False), text)
    print(text, end="")
    print(f"next: {READERS.get(name) or d2v('train', 'FILE.yaml')}", file=sys.stderr)
