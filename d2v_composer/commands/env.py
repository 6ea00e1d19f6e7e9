"""Print what a bug report needs.

    d2v env

These are versions, machine, torch's build, GPUs, and the packages that each extra lacks.
"""

from collections.abc import Sequence
from importlib import metadata

from d2v_composer.system.command_line import make_parser


def main(argv: Sequence[str]) -> None:
    """Print a name and its value in each line."""
    make_parser(__doc__).parse_args(argv)

    import torch.version

    from d2v_composer.system.machine import describe_machine, package_versions

    build = {"cuda": torch.version.cuda, "rocm": torch.version.hip, "cpu": torch.backends.cpu.get_cpu_capability()}
    about = package_versions() | describe_machine() | {f"torch {name}": value for name, value in build.items()}
    for i in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(i)
        about[f"gpu {i}"] = f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, compute {gpu.major}.{gpu.minor}"
    for extra in metadata.metadata("d2v-composer").get_all("Provides-Extra") or []:
        about[f"extra {extra}"] = " ".join(["lacks", *lacks]) if (lacks := find_missing(extra)) else "complete"
    for name, value in about.items():
        print(f"{name:<20}{value or 'none'}")


def find_missing(extra: str) -> list[str]:
    """Return the requirements of an extra that are not installed, or only in another version."""
    from packaging.requirements import Requirement

    from d2v_composer.system.machine import package_versions

    all_of_them = [Requirement(text) for text in metadata.requires("d2v-composer") or []]
    wanted = [each for each in all_of_them if each.marker is not None and each.marker.evaluate({"extra": extra})]
    found = package_versions(*(each.name for each in wanted))
    return [
        f"{each.name}{each.specifier}"
        for each in wanted
        if (version := found[each.name]) is None or not each.specifier.contains(version, prereleases=True)
    ]
