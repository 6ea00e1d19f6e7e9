"""Print one of this package's YAMLs as a starting point.

    d2v init quickstart > my.yaml
    d2v train my.yaml max_duration=10ep

References to files beside the YAML are printed as absolute paths.
"""

import json
import re
import sys
from pathlib import Path
from typing import Annotated

from pydantic import Field

import d2v_composer
from d2v_composer.commands.command import Command, Positional, one_of
from d2v_composer.system.command_line import d2v

YAMLS = Path(d2v_composer.__file__).with_name("yamls").resolve()
NAMES = sorted(path.stem for path in YAMLS.glob("*.yaml"))
# YAML → what reads it, if that is not d2v train.
READERS = {
    "evaluate": d2v("evaluate", "FILE.yaml", "model=PATH"),
}


class Init(Command):
    name: Positional[Annotated[str, one_of(NAMES)]] = Field(description=f"Name of the YAML: {', '.join(NAMES)}")

    def run(self) -> None:
        """Print the YAML to stdout, and the next step to stderr."""
        text = (YAMLS / f"{self.name}.yaml").read_text("utf-8")
        # Quoted, since a path may hold ' #' and the like.
        text = re.sub(r"\$\{here:(.*?)\}", lambda match: json.dumps(f"{YAMLS}/{match[1]}", ensure_ascii=False), text)
        print(text, end="")
        print(f"next: {READERS.get(self.name) or d2v('train', 'FILE.yaml')}", file=sys.stderr)


main = Init.main
