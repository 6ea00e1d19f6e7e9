"""Run the tests on every supported Python: ``nox``, or ``nox -s tests-3.12``, ``nox -s tests-3.12 -- tests/data``.

Each Python gets its own environment in ``.nox`` (7 GB), which later calls reuse.
"""

import sys
from importlib.util import find_spec

import nox

nox.options.reuse_venv = "yes"
nox.options.sessions = ["tests", "lint"]
PYTHONS = ["3.10", "3.11", "3.12"]
SLOW_ON = "3.11"
# What the extra 'train' is not needed for.
CORE = [
    "tests/core",
    "tests/checkpoints/test_fairseq.py",
    "tests/checkpoints/test_safetensors_file.py",
    "tests/commands/test_env.py",
    "tests/embedding/test_embed_sound.py",
    "tests/evaluation/test_retrieval.py",
    "tests/models/test_attention.py",
    "tests/models/test_precision.py",
]


@nox.session(python=PYTHONS)
def tests(session: nox.Session) -> None:
    """Run the default tests, or those of the arguments; on one Python the slow ones as well."""
    session.install("-e", ".[dev]")
    session.run("python", "-m", "pytest", *session.posargs)
    if session.python == SLOW_ON and not session.posargs:
        session.run("python", "-m", "pytest", "-m", "slow")


@nox.session(venv_backend="uv", python=SLOW_ON)
def newest(session: nox.Session) -> None:
    """Run the default tests, or those of the arguments, on the newest torch, which Composer does not ask for."""
    session.install("--override", ".uv/newest-torch.txt", "-e", ".[dev]")
    session.run("python", "-c", "import torch; print(torch.__version__)")
    session.run("python", "-m", "pytest", *session.posargs)


@nox.session
def core(session: nox.Session) -> None:
    """Run the core's tests, without the extra 'train', on the Python that runs nox, and on any system."""
    session.install("-e", ".", "pytest", "pytest-xdist")
    session.run("python", "-m", "pytest", *(session.posargs or CORE))


@nox.session(venv_backend="none")
def lint(session: nox.Session) -> None:
    """Run ruff and pyright of the environment that runs nox: ``.venv/bin/nox -s lint``."""
    if find_spec("ruff") is None or find_spec("pyright") is None:
        session.error("ruff and pyright are not installed beside nox; CONTRIBUTING.md sets up .venv/bin/nox")
    for arguments in (["ruff", "check", "."], ["ruff", "format", "--check", "."]):
        session.run(sys.executable, "-m", *arguments)
    session.run(sys.executable, "-m", "pyright", "--pythonpath", sys.executable)


@nox.session(venv_backend="none")
def docs(session: nox.Session) -> None:
    """Write HTML of the public names to build/docs, by the environment that runs nox: ``.venv/bin/nox -s docs``."""
    if find_spec("pdoc") is None:
        session.error("pdoc is not installed beside nox; CONTRIBUTING.md sets up .venv/bin/nox")
    session.run(sys.executable, "tests/reference.py", "build/docs")
