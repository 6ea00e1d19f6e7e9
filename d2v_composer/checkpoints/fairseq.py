"""Read fairseq's data2vec 2.0 checkpoints, and load and convert teachers."""

import datetime
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d2v_composer.checkpoints.checkpoint import fetch_model
from d2v_composer.checkpoints.safe_load import Stub, is_trained, load_untrusted
from d2v_composer.checkpoints.student_file import (
    build_loaded,
    is_safetensors,
    read_config,
    read_model_file,
    sha256,
    write_model_file,
)
from d2v_composer.models.data2vec2 import Data2Vec2
from d2v_composer.models.names import Weights
from d2v_composer.models.sizes import (
    MAX_DEPTH,
    Data2Vec2AudioConfig,
    Data2Vec2Config,
    Data2Vec2TeacherConfig,
    EatConfig,
    encoder_config,
    find_kind,
)
from d2v_composer.system.addresses import file_name
from d2v_composer.system.errors import InputError, reading

ENCODER = "encoder."
# Name of the encoder in a checkpoint → kind of model.
MODALITIES: dict[str, type[Data2Vec2TeacherConfig]] = {"IMAGE": Data2Vec2Config, "AUDIO": Data2Vec2AudioConfig}
LICENCE_NOTE = "as the source's; the data2vec 2.0 checkpoints released by Meta are"
LICENCES = {
    Data2Vec2Config: f"{LICENCE_NOTE} CC BY-NC 4.0",
    Data2Vec2AudioConfig: f"{LICENCE_NOTE} MIT for audio",
    EatConfig: "as the source's; EAT's code is MIT, and says nothing of its weights",
}
# Number of last blocks in the target if a file does not say it: all of an image model's, and data2vec's own default.
TOP_K = {"image": MAX_DEPTH, "audio": Data2Vec2AudioConfig.average_top_k_layers}
# Fields of our config in cfg["model"]; others are in the modality's section of cfg["model"]["modalities"].
MODEL_FIELDS = ("embed_dim", "num_heads", "mlp_ratio", "norm_eps", "depth", "final_layer_norm")
OTHER_NAMES = {"image_size": "input_size", "final_layer_norm": "layer_norm_targets"}
# What is read in another way, or not at all.
NOT_SIZES = ("average_top_k_layers", "num_alibi_heads", "alibi_scale_shape", "image_mean", "image_std")


def read_fairseq_checkpoint(path: str | Path, file: Path, weights: Weights) -> tuple[Data2Vec2, list[str]]:
    """Read and check a fairseq checkpoint, ``file``, without running its code; errors name its address, ``path``.

    Returns:
        The teacher, and the file's names of unused tensors.

    Raises:
        InputError: The file is corrupt, of another format, modality or kind, or lacks a tensor.
    """
    checkpoint = load_untrusted(file)
    stored, sizes = _section(checkpoint, "model"), _section(_section(checkpoint, "cfg"), "model")
    if is_trained(checkpoint):
        raise InputError(
            f"{path}: is a training checkpoint; expected a teacher; its teacher is named in the run.yaml beside it"
        )
    if stored is None or sizes is None:
        raise InputError(f"{path}: not a fairseq data2vec 2.0 checkpoint: it has no dicts 'model' and cfg['model']")
    stored = {name: each for name, each in stored.items() if isinstance(name, str)}
    prefixes = {f"modality_encoders.{name}.": kind for name, kind in MODALITIES.items()}
    prefix = next((prefix for prefix in prefixes if any(name.startswith(prefix) for name in stored)), None)
    if prefix is None:
        what = "not a data2vec 2.0 checkpoint of images or audio, or fine-tuned"
        raise InputError(f"{path}: {what}; use a pre-trained one with {' or '.join(f'{each}*' for each in prefixes)}")
    kind = prefixes[prefix]
    if weights == "ema":
        averaged = _section(stored, "_ema")
        if averaged is None:
            raise InputError(f"{path}: has no EMA weights ('_ema'); use weights=model")
        # Unless ema_local_encoder is true, the averaged model computes on the trained one's local features.
        local = tuple(f"{prefix}{part}." for part in ("local_encoder", "project_features"))
        stored = {name: each for name, each in stored.items() if name.startswith(local)} | averaged
    stored = {name: tensor for name, tensor in stored.items() if isinstance(name, str) and isinstance(tensor, Tensor)}
    scale = f"{prefix}alibi_scale"
    if scale in stored and stored[scale].ndim == 4:  # an older layout
        stored[scale] = stored[scale][None]
    section = _section(_section(sizes, "modalities"), kind.modality) or {}
    with reading(path):
        fields_of_encoder = _fields(section)
        if kind is Data2Vec2Config and fields_of_encoder.get("in_chans") == 1:  # EAT's images are spectrograms
            kind = EatConfig
        config = _read_config(kind, _fields(sizes), fields_of_encoder)
        if config.num_alibi_heads:
            config = replace(config, alibi_scale_shape=tuple(stored[scale].shape))
    renamed = {f"{ENCODER}{name.removeprefix(prefix)}" if name.startswith(prefix) else name: name for name in stored}
    # Only pre-training uses these: data2vec 2.0's decoder, and the heads of its and EAT's losses.
    left = (f"{prefix}decoder.", "shared_decoder.", "recon_proj.", "cls_proj.", "center")
    used = {ours: stored[name] for ours, name in renamed.items() if not name.startswith(left)}
    licence = LICENCES[kind]
    provenance = {"source": file_name(path), "sha256": sha256(file), "weights": weights, "licence": licence}
    teacher = build_loaded(path, lambda: Data2Vec2(config, provenance), used)
    return teacher, [name for name in stored if name.startswith(left)]


def _section(container: Any, name: str) -> dict[Any, Any] | None:
    """Return a section, a dict or another program's object, as a dict; ``None`` if there is none."""
    # dict's own methods: a pickle may set attributes of an OrderedDict, such as `items`.
    section = dict.get(container, name) if isinstance(container, dict) else None
    section = dict.get(section, "_content", section) if isinstance(section, Stub) else section  # OmegaConf's
    return dict(dict.items(section)) if isinstance(section, dict) else None


def _fields(section: dict[Any, Any]) -> dict[Any, Any]:
    """Return a section's fields that are set, without the interpolated ones, which equal our defaults."""
    values = {name: each.get("_val") if isinstance(each, Stub) else each for name, each in section.items()}
    # Not str(each): a list may hold another one twice, 60 times over.
    return {
        name: each
        for name, each in values.items()
        if each is not None and not (isinstance(each, str) and each.startswith("${"))
    }


def _read_config(
    kind: type[Data2Vec2TeacherConfig], model: dict[Any, Any], section: dict[Any, Any]
) -> Data2Vec2TeacherConfig:
    """Read the sizes, except a scale's shape; fields that the file lacks keep the config's defaults, data2vec's.

    Raises:
        ValueError: They are not those of a supported teacher.
    """
    if model.get("layer_norm_first"):
        raise ValueError("pre-norm models (layer_norm_first: true) are not supported; the released ones are post-norm")
    alibi_kind = section.get("alibi_dims", 2), section.get("alibi_distance", "manhattan"), section.get("learned_alibi")
    if section.get("use_alibi_encoder") and (alibi_kind[:2] != (2, "manhattan") or alibi_kind[2]):
        raise ValueError(
            "ALiBi is supported only as the released models use it: alibi_dims 2, alibi_distance manhattan, not learned"
        )
    found: dict[str, Any] = {}
    for ours in {each.name for each in fields(kind)} - set(NOT_SIZES):
        theirs, values = OTHER_NAMES.get(ours, ours), model if ours in MODEL_FIELDS else section
        if theirs in values:
            found[ours] = values[theirs]
    # Clamped to the depth, as fairseq's slice does.
    depth = kind(**found, average_top_k_layers=1).depth
    top_k = model.get("average_top_k_layers", TOP_K[kind.modality])
    found["average_top_k_layers"] = min(top_k, depth) if isinstance(top_k, int) else top_k
    if section.get("use_alibi_encoder"):
        found["num_alibi_heads"] = section.get("num_alibi_heads", kind(**found).num_heads)
    return kind(**found)


def load_data2vec2(path: str | Path, weights: Weights) -> Data2Vec2:
    """Load a frozen teacher; see :func:`~d2v_composer.checkpoints.load.load_teacher`.

    Raises:
        InputError: The file does not exist, or is not a supported teacher.
    """
    file = fetch_model(path)
    if not is_safetensors(file):
        return read_fairseq_checkpoint(path, file, weights)[0]
    stored = read_model_file(file)
    stored.expect(path, "teacher")
    with reading(path):
        found = stored.provenance["weights"]
        config = read_config(find_kind(stored.config), stored.config)
    if found != weights:
        raise InputError(f"{path}: was converted with --weights {found}, and has no {weights} weights")
    return build_loaded(path, lambda: Data2Vec2(config, stored.provenance), stored.tensors)


def convert_teacher(
    source: str | Path,
    out: Path,
    weights: Weights = "model",
    dtype: torch.dtype = torch.float32,
    licence: str | None = None,
    **spectrogram: float,
) -> tuple[Data2Vec2, list[str]]:
    """Convert a fairseq checkpoint to a safetensors file.

    Args:
        source: As :func:`load_data2vec2`'s path.
        out: The file to write.
        weights: The weights to keep.
        dtype: Stored dtype; a loaded teacher is float32 in any case.
        licence: A note on the weights' licence for the metadata.
        spectrogram: For EAT: ``target_length``, ``log_mel_mean``, ``log_mel_std``; default the file's, and AudioSet's.

    Returns:
        As :func:`read_fairseq_checkpoint`.

    Raises:
        InputError: As :func:`load_data2vec2`; or ``out`` cannot be written.
    """
    file = fetch_model(source)
    if is_safetensors(file):
        raise InputError(f"{source}: is already a safetensors file; expected a fairseq checkpoint")
    teacher, left = read_fairseq_checkpoint(source, file, weights)
    if spectrogram and not isinstance(teacher.config, EatConfig):
        raise InputError(f"{source}: is not an EAT checkpoint, which alone takes {', '.join(spectrogram)}")
    with reading(source):
        teacher.config = replace(teacher.config, **spectrogram)
    teacher.encoder.config = encoder_config(teacher.config)
    teacher.provenance |= {
        "dtype": str(dtype).removeprefix("torch."),
        "licence": licence or teacher.provenance["licence"],
        "converted": datetime.date.today().isoformat(),
    }
    tensors = {name: tensor.to(dtype) for name, tensor in teacher.state_dict().items()}
    write_model_file(out, "teacher", asdict(teacher.config), teacher.provenance, tensors)
    return teacher, left
