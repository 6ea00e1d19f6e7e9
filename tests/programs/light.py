"""Run commands of d2v, one in each line of the input, where the packages of the extra 'train' cannot be imported."""

import shlex
import sys


class Blocked:
    """Finds no module of the extra."""

    def find_spec(self, name: str, *_: object) -> None:
        if name.partition(".")[0] in ("boto3", "botocore", "composer", "streaming", "torchmetrics"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Blocked())

from d2v_composer.commands.__main__ import main  # noqa: E402
from d2v_composer.system import command_line  # noqa: E402

*before, last = map(shlex.split, sys.stdin)
for arguments in before:
    main(arguments)
sys.argv = ["d2v", *last]
command_line.run(main)
