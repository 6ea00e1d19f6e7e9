"""Be a test process without its imports: ``forked.py -u -c CODE``, as xdist starts it, runs in a fork of the server."""

import os
import sys
from pathlib import Path

from preloaded import STDIN, PreloadedPython

if __name__ == "__main__":
    sys.exit(PreloadedPython().start(sys.argv[2:], Path.cwd(), dict(os.environ), STDIN).wait(timeout=1e6))
