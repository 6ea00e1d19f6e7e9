"""Convert a fairseq checkpoint of data2vec 2.0 or EAT to a safetensors file.

    d2v convert-teacher base_imagenet.pt teacher.safetensors
    d2v convert-teacher https://dl.fbaipublicfiles.com/fairseq/data2vec2/base_imagenet.pt teacher.safetensors
    d2v convert-teacher base_libri.pt small.safetensors --weights ema --dtype float16
    d2v convert-teacher EAT-base.pt teacher.safetensors --target-length 512 --log-mel-mean -6.627 --log-mel-std 5.359

The command runs no code in the checkpoint, and prints which tensors are used and which are left out.
"""

from collections import Counter
from typing import Literal

from d2v_composer.commands.command import Command, Embedding, PlaceHere, Positional
from d2v_composer.models.names import Weights
from d2v_composer.system.command_line import print_next, training
from d2v_composer.system.files import check_out_file


class ConvertTeacher(Command):
    source: Positional[str]
    """The checkpoint: a path or an address (https://, s3://, …)."""
    out: Positional[PlaceHere]
    """The file to write, NAME.safetensors."""
    weights: Weights = "model"
    """Weights to keep. model: the trained weights; ema: the moving average of the trained weights."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Type of the stored weights."""
    license: str | None = None
    """A note on the weights' license, stored in the file."""
    embedding: Embedding = None
    target_length: int | None = None
    """For EAT: length of a spectrogram in frames, a multiple of 16; default: as in the file."""
    log_mel_mean: float | None = None
    """For EAT: mean of the log-mel values; default: AudioSet's, -4.268."""
    log_mel_std: float | None = None
    """For EAT: standard deviation of the log-mel values; default: AudioSet's, 4.569."""
    overwrite: bool = False
    """Replace OUT if it exists."""

    def run(self) -> None:
        check_out_file(self.out, overwrite=self.overwrite)

        import torch

        from d2v_composer.checkpoints.fairseq import convert_teacher

        spectrogram = self.model_dump(include={"target_length", "log_mel_mean", "log_mel_std"}, exclude_none=True)
        out, dtype = self.out, getattr(torch, self.dtype)
        teacher, left = convert_teacher(
            self.source, out, self.weights, dtype, self.license, self.embedding, **spectrogram
        )
        config, provenance = teacher.config, teacher.provenance
        print(f"source: {provenance['source']} (sha256 of the weights: {provenance['sha256']})")
        print(
            f"{config.modality} model: width {config.embed_dim}, {config.num_heads} heads, "
            f"{config.prenet_depth + config.depth} blocks ({config.prenet_depth} shared with students by default), "
            f"{teacher.encoder.num_tokens()} tokens for an input of shape "
            f"{tuple(teacher.encoder.example(1).shape[1:])}"
        )
        for verb, names in (("used", list(teacher.state_dict())), ("left out", left)):
            print(f"{verb} {len(names)} tensors")
            for group, count in Counter(name.rsplit(".", 1)[0] for name in names).items():
                print(f"  {group} ({count})")
        print(f"wrote {out}: {provenance['weights']} weights, {provenance['dtype']}, {out.stat().st_size / 1e6:.1f} MB")
        print_next(*training(config.recipe, f"teacher.checkpoint={out}"))


main = ConvertTeacher.main
