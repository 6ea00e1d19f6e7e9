"""Print what a bug report needs.

    d2v env

It lists the versions, the machine, torch's build, the GPUs, and the packages that each extra lacks.
"""

from collections.abc import Sequence
from importlib import metadata

from d2v_composer.system.command_line import make_parser


def main(argv: Sequence[str]) -> None:
    """Print versions, machine and missing packages, one a line."""
    make_parser(__doc__).parse_args(argv)

    import torch.version
    from packaging.requirements import Requirement

    from d2v_composer.system.machine import describe_machine, package_versions

    build = {"cuda": torch.version.cuda, "rocm": torch.version.hip, "cpu": torch.backends.cpu.get_cpu_capability()}
    about = package_versions() | describe_machine() | {f"torch {name}": value for name, value in build.items()}
    for i in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(i)
        about[f"gpu {i}"] = f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, compute {gpu.major}.{gpu.minor}"
    needed = [Requirement(text) for text in metadata.requires("d2v-composer") or []]
    versions = package_versions(*(need.name for need in needed))
    lacking = [
        need
        for need in needed
        if (version := versions[need.name]) is None or not need.specifier.contains(version, prereleases=True)
    ]
    for extra in metadata.metadata("d2v-composer").get_all("Provides-Extra") or []:
        missing = [need for need in lacking if need.marker is not None and need.marker.evaluate({"extra": extra})]
        about[f"extra {extra}"] = (
            f"lacks {' '.join(f'{need.name}{need.specifier}' for need in missing)}" if missing else "complete"
        )
    for name, value in about.items():
        print(f"{name:<20}{value or 'none'}")
