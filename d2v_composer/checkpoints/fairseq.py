"""Load data2vec 2.0 and EAT teachers, and convert their fairseq checkpoints to safetensors files."""

import datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d2v_composer.checkpoints.checkpoint import fetch_model
from d2v_composer.checkpoints.model_file import (
    build_loaded,
    is_safetensors,
    read_config,
    read_model_file,
    write_model_file,
)
from d2v_composer.checkpoints.safe_load import Stub, is_checkpoint, load_untrusted
from d2v_composer.models.configs import AudioEncoderConfig, EatEncoderConfig, ImageEncoderConfig, TeacherConfig
from d2v_composer.models.data2vec2 import Data2Vec2
from d2v_composer.models.names import Weights
from d2v_composer.models.provenance import Record
from d2v_composer.system.addresses import file_name
from d2v_composer.system.errors import InputError, errors_of, reading

# How the names of an encoder's tensors begin → its kind.
PREFIXES: dict[str, type[Any]] = {
    "modality_encoders.IMAGE.": ImageEncoderConfig,
    "modality_encoders.AUDIO.": AudioEncoderConfig,
}
LICENSES = {
    ImageEncoderConfig: "not stated in the file; Meta released its data2vec 2.0 image checkpoints under CC BY-NC",
    AudioEncoderConfig: "not stated in the file; Meta released its data2vec 2.0 audio checkpoints under MIT",
    EatEncoderConfig: "not stated in the file; EAT's code is under the MIT license; none is stated for its weights",
}
# data2vec's default number of blocks, and of blocks in the target.
DEPTH = TOP_K = 8


def read_fairseq_checkpoint(path: str | Path, file: Path, weights: Weights) -> tuple[Data2Vec2, list[str]]:
    """Build a teacher from a fairseq checkpoint, without running code in the file.

    Returns:
        The teacher, and the names of the tensors that are left out because only pre-training uses them.
    """
    checkpoint = load_untrusted(file)
    stored, sizes = _section(checkpoint, "model"), _section(_section(checkpoint, "cfg"), "model")
    if is_checkpoint(checkpoint):
        raise InputError(
            f"{path} is a training checkpoint, not a teacher; run.yaml in the run's folder names the teacher"
        )
    if stored is None or sizes is None:
        raise InputError(
            f"{path}: not a fairseq checkpoint of data2vec 2.0 or EAT: it lacks the dict 'model' or cfg['model']"
        )
    prefix = next((prefix for prefix in PREFIXES if any(name.startswith(prefix) for name in stored)), None)
    if prefix is None:
        raise InputError(
            f"{path}: not a pre-trained data2vec 2.0 or EAT checkpoint: it has no tensors named "
            f"{' or '.join(f'{start}*' for start in PREFIXES)}; fine-tuned checkpoints are not supported"
        )
    kind = PREFIXES[prefix]
    if weights == "ema":
        averaged = _section(stored, "_ema")
        if averaged is None:
            raise InputError(f"{path} has no EMA weights ('_ema'); set weights to 'model'")
        # Unless ema_local_encoder is true, the averaged model computes on the trained one's local features.
        local = tuple(f"{prefix}{part}." for part in ("local_encoder", "project_features"))
        stored = {name: value for name, value in stored.items() if name.startswith(local)} | averaged
    stored = {name: tensor for name, tensor in stored.items() if isinstance(tensor, Tensor)}
    scale = f"{prefix}alibi_scale"
    if scale in stored and stored[scale].ndim == 4:  # an older layout
        stored[scale] = stored[scale][None]
    section = _section(_section(sizes, "modalities"), kind.modality) or {}
    with reading(path):
        fields_of_encoder = _fields(section)
        if kind is ImageEncoderConfig and fields_of_encoder.get("in_chans") == 1:  # EAT's images are spectrograms
            kind = EatEncoderConfig
        config = _read_config(kind, _fields(sizes), fields_of_encoder)
        if config.num_alibi_heads:
            encoder = config.encoder.changed(alibi_scale_shape=tuple(stored[scale].shape))
            config = config.changed(encoder=encoder)
    renamed = {f"encoder.{name.removeprefix(prefix)}" if name.startswith(prefix) else name: name for name in stored}
    # Only pre-training uses these: data2vec 2.0's decoder, and the heads of its and EAT's losses.
    left = (f"{prefix}decoder.", "shared_decoder.", "recon_proj.", "cls_proj.", "center")
    used = {ours: stored[name] for ours, name in renamed.items() if not name.startswith(left)}
    provenance = {"source": file_name(path), "weights": weights, "license": LICENSES[kind]}
    teacher = build_loaded(path, lambda: Data2Vec2(config, provenance), used)
    return teacher, [name for name in stored if name.startswith(left)]


def _section(container: object, name: str) -> Record | None:
    """Return the dict under ``name``, with string keys only; ``None`` if there is no dict under this name."""
    # dict's own methods: a pickle may set attributes of an OrderedDict, such as `items`.
    section = dict.get(container, name) if isinstance(container, dict) else None
    section = dict.get(section, "_content", section) if isinstance(section, Stub) else section  # OmegaConf's
    if isinstance(section, dict):
        return {name: value for name, value in dict.items(section) if isinstance(name, str)}
    return None


def _fields(section: Record) -> Record:
    """Return the fields that a section sets, except those set to an interpolation, ``${…}``."""
    values = {name: value.get("_val") if isinstance(value, Stub) else value for name, value in section.items()}
    # Not str(value): a list may hold another one twice, 60 times over.
    return {
        name: value
        for name, value in values.items()
        if value is not None and not (isinstance(value, str) and value.startswith("${"))
    }


def _read_config(kind: type[Any], model: Record, section: Record) -> TeacherConfig:
    """Convert a fairseq config to a teacher's config, with data2vec's defaults for missing fields."""
    if model.get("layer_norm_first"):
        raise ValueError("pre-norm models (layer_norm_first: true) are not supported")
    alibi_kind = section.get("alibi_dims", 2), section.get("alibi_distance", "manhattan"), section.get("learned_alibi")
    if section.get("use_alibi_encoder") and (alibi_kind[:2] != (2, "manhattan") or alibi_kind[2]):
        raise ValueError("ALiBi is supported only with alibi_dims 2, alibi_distance manhattan and learned_alibi false")
    # The section has what only the modality's encoder has, the model all else.
    values = section | model | {"num_alibi_heads": 0}
    if "input_size" in section:
        values["image_size"] = section["input_size"]
    encoder = kind(**{name: values[name] for name in kind.model_fields if name in values})
    if section.get("use_alibi_encoder"):
        encoder = encoder.changed(num_alibi_heads=section.get("num_alibi_heads", encoder.num_heads))
    depth = model.get("depth", DEPTH)
    # Images: all, if the file does not say it. Clamped to the depth, as fairseq's slice does.
    top_k = model.get("average_top_k_layers", depth if kind.modality == "image" else TOP_K)
    if isinstance(top_k, int) and isinstance(depth, int):
        top_k = min(top_k, depth)
    final_layer_norm = kind is not AudioEncoderConfig or model.get("layer_norm_targets", False)
    return TeacherConfig(encoder=encoder, depth=depth, average_top_k_layers=top_k, final_layer_norm=final_layer_norm)


def load_data2vec2(path: str | Path, weights: Weights) -> Data2Vec2:
    """Load a frozen data2vec 2.0 or EAT teacher; see :func:`~d2v_composer.checkpoints.load.load_teacher`."""
    file = fetch_model(path)
    if not is_safetensors(file):
        teacher, _ = read_fairseq_checkpoint(path, file, weights)
    else:
        stored = read_model_file(file)
        stored.expect(path, "teacher")
        with reading(path):
            file_weights = stored.provenance["weights"]
            config = read_config(TeacherConfig, stored.config)
        if file_weights != weights:
            raise InputError(
                f"{path} has {file_weights} weights, but no {weights} weights; set weights to {file_weights!r}, or "
                f"convert the original checkpoint with d2v convert-teacher --weights {weights}"
            )
        teacher = build_loaded(path, lambda: Data2Vec2(config, stored.provenance), stored.tensors)
    with errors_of(str(path)):
        return teacher.identify()


def convert_teacher(
    source: str | Path,
    out: Path,
    weights: Weights = "model",
    dtype: torch.dtype = torch.float32,
    license: str | None = None,
    embedding: str | None = None,
    **spectrogram: float,
) -> tuple[Data2Vec2, list[str]]:
    """Convert a fairseq checkpoint to a safetensors file.

    Returns:
        The teacher, and the names of the tensors that are left out because only pre-training uses them.
    """
    file = fetch_model(source)
    if is_safetensors(file):
        raise InputError(f"{source} is already a safetensors file; expected a fairseq checkpoint")
    teacher, left = read_fairseq_checkpoint(source, file, weights)
    if spectrogram and not isinstance(teacher.encoder.config, EatEncoderConfig):
        raise InputError(f"{source} is not an EAT checkpoint; leave out {', '.join(spectrogram)}")
    with errors_of(str(source)):
        teacher.encoder.config = teacher.encoder.config.changed(**spectrogram)
        teacher.name_embedding(embedding)
        teacher.config = teacher.config.changed(encoder=teacher.encoder.config)
        teacher.identify()
    teacher.provenance |= {
        "dtype": str(dtype).removeprefix("torch."),
        "license": license or teacher.provenance["license"],
        "converted": datetime.date.today().isoformat(),
        **({} if embedding is None else {"embedding": embedding}),
    }
    tensors = {name: tensor.to(dtype) for name, tensor in teacher.state_dict().items()}
    write_model_file(out, "teacher", teacher.config.model_dump(mode="json"), teacher.provenance, tensors)
    return teacher, left
