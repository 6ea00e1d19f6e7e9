"""Write a teacher with random weights, for trials and benchmarks.

    d2v random-teacher base teacher.safetensors
    d2v random-teacher timm/vit_base_patch14_dinov2 teacher.safetensors

SIZE is base, large or huge for an image model of data2vec 2.0; base_audio or large_audio for an audio model of data2vec
2.0; base_eat for EAT; or timm/NAME.
"""

from d2v_composer.commands.command import Command, Embedding, PlaceHere, Positional
from d2v_composer.models.configs import RELEASED, ImageConfig
from d2v_composer.models.names import DATA2VEC2, TIMM_PREFIX
from d2v_composer.system.command_line import print_next, training
from d2v_composer.system.errors import InputError, errors_of
from d2v_composer.system.files import check_out_file


class RandomTeacher(Command):
    size: Positional[str]
    """Size of the teacher, or timm/NAME."""
    out: Positional[PlaceHere]
    """The file to write, NAME.safetensors."""
    embedding: Embedding = None
    overwrite: bool = False
    """Replace OUT if it exists."""

    def run(self) -> None:
        size, out = self.size, self.out
        check_out_file(out, overwrite=self.overwrite)

        import torch

        from d2v_composer.checkpoints.model_file import write_model_file
        from d2v_composer.models.data2vec2 import Data2Vec2
        from d2v_composer.models.timm_teacher import build_timm_model, materialize

        torch.manual_seed(0)
        config = RELEASED.get(size)
        provenance = {"source": f"random {size}", "weights": "model", "license": "none: random weights"}
        if config is None and not size.startswith(TIMM_PREFIX):
            raise InputError(f"SIZE: must be {', '.join(RELEASED)} or timm/NAME, got {size!r}")
        with errors_of("SIZE"):
            model = materialize(build_timm_model(size)) if config is None else Data2Vec2(config, provenance)
        tensors = model.state_dict()
        for name, tensor in tensors.items():  # LayerScale becomes 1: timm's 1e-5 would leave nothing of a block
            is_drawn = tensor.ndim > 1 and not name.endswith("alibi_scale")
            tensor.normal_(std=0.02) if is_drawn else tensor.fill_(not name.endswith("bias"))
        if isinstance(model, Data2Vec2):
            model.identify()
        if self.embedding is not None:
            provenance["embedding"] = self.embedding
        write_model_file(out, "teacher", config.model_dump(mode="json") if config else {}, provenance, tensors)
        print(f"wrote {out}: {sum(map(torch.numel, tensors.values())) / 1e6:.1f} M random parameters")
        teacher = f"teacher.model={DATA2VEC2 if config else size}", f"teacher.checkpoint={out}"
        print_next(*training((config or ImageConfig).recipe, *teacher))


main = RandomTeacher.main
