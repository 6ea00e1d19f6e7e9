"""Convert a fairseq data2vec 2.0 checkpoint to a safetensors file.

    d2v convert-teacher base_imagenet.pt teacher.safetensors
    d2v convert-teacher https://dl.fbaipublicfiles.com/fairseq/data2vec2/base_imagenet.pt teacher.safetensors
    d2v convert-teacher base_libri.pt small.safetensors --weights ema --dtype float16
    d2v convert-teacher EAT-base.pt teacher.safetensors --target-length 512 --log-mel-mean -6.627 --log-mel-std 5.359

Reading a checkpoint runs none of its code. The command prints which tensors it used and left out.
"""

from collections import Counter
from collections.abc import Sequence

from d2v_composer.commands.options import make_parser
from d2v_composer.system.command_line import print_next, training
from d2v_composer.system.files import check_out_file


def main(argv: Sequence[str]) -> None:
    """Convert a teacher, and print the used and the unused tensors of its file."""
    arguments = make_parser(__doc__, "convert-teacher").parse_args(argv)
    check_out_file(arguments.out, overwrite=arguments.overwrite)

    import torch

    from d2v_composer.checkpoints.fairseq import convert_teacher

    names = ("target_length", "log_mel_mean", "log_mel_std")
    spectrogram = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    out, options = arguments.out, (arguments.weights, getattr(torch, arguments.dtype), arguments.license)
    teacher, left = convert_teacher(arguments.source, out, *options, arguments.embedding, **spectrogram)
    config, provenance = teacher.config, teacher.provenance
    print(f"{provenance['source']} (sha256 of its weights: {provenance['sha256']})")
    print(
        f"{config.modality} model: width {config.embed_dim}, {config.num_heads} heads, "
        f"{config.prenet_depth} + {config.depth} blocks, {teacher.encoder.num_tokens()} tokens of "
        f"{' x '.join(map(str, teacher.encoder.example(1).shape[1:]))} inputs"
    )
    for verb, names in (("used", list(teacher.state_dict())), ("left out", left)):
        print(f"{verb} {len(names)} tensors")
        for group, count in Counter(name.rsplit(".", 1)[0] for name in names).items():
            print(f"  {group} ({count})")
    print(f"wrote {out}: {provenance['weights']} weights, {provenance['dtype']}, {out.stat().st_size / 1e6:.1f} MB")
    print_next(*training(config.recipe, f"teacher.checkpoint={out}"))
