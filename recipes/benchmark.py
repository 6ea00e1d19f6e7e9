"""Measure speed on this machine, against others: ``python recipes/benchmark.py {data,step,retrieval}``."""

from d2v_composer.commands.benchmark import main
from d2v_composer.system import command_line

__all__ = ["main"]

if __name__ == "__main__":
    command_line.run(main)
