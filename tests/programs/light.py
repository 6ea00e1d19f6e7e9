"""Run commands of d2v, one in each line of the input, where the packages of the extra 'train' cannot be imported.

Text files without an encoding are refused: Windows would read them in another one.
"""

import shlex
import sys
import warnings

# What takes seconds to import; what of it a command has imported is printed after it.
HEAVY = ("matplotlib", "sympy", "timm", "torch", "torch._dynamo", "torch.distributed.fsdp", "torchvision")
EXTRA = ("boto3", "botocore", "composer", "streaming", "torchmetrics")


class Blocked:
    """Finds no module of the extra."""

    def find_spec(self, name: str, *_: object) -> None:
        if name.partition(".")[0] in EXTRA:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Blocked())
warnings.filterwarnings("error", category=EncodingWarning, module="d2v_composer")

from d2v_composer.commands.__main__ import main  # noqa: E402
from d2v_composer.system import command_line  # noqa: E402

*before, last = map(shlex.split, sys.stdin)
for arguments in before:
    main(arguments)
    print("imported:", *(name for name in HEAVY if name in sys.modules))
sys.argv = ["d2v", *last]
command_line.run(main)
