"""Print what a bug report needs.

    d2v env

The list has the machine, its GPUs, torch's build and the versions of packages.
"""

from importlib import metadata

from d2v_composer.commands.command import Command


class Env(Command):
    def run(self) -> None:
        import torch.version
        from packaging.requirements import Requirement

        from d2v_composer.system.machine import describe_machine, package_versions

        build = {"cuda": torch.version.cuda, "rocm": torch.version.hip, "cpu": torch.backends.cpu.get_cpu_capability()}
        packages = [Requirement(text).name for text in metadata.requires("d2v-composer") or []]
        about = package_versions(*packages) | describe_machine()
        about |= {f"torch {name}": value for name, value in build.items()}
        for i in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(i)
            size, capability = gpu.total_memory / 2**30, f"{gpu.major}.{gpu.minor}"
            about[f"gpu {i}"] = f"{gpu.name}, {size:.0f} GiB, compute capability {capability}"
        for name, value in about.items():
            print(f"{name:<32}{value or 'none'}")


main = Env.main
