"""Export a student to ONNX or torch.export, and as a timm model that loads its file."""

import copy
import io
import json
import logging
import warnings
from collections.abc import Mapping, Set
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from timm.models import build_model_with_cfg
from torch import Tensor, nn

from d2v_composer.checkpoints import check_program
from d2v_composer.checkpoints.kinds import CONFIG_TENSOR, build_encoder, build_student, config_tensor, sizes_of
from d2v_composer.checkpoints.load import load_student
from d2v_composer.checkpoints.student_file import PrimaryEmbedding, choose_embedding, parse_object, read_config
from d2v_composer.models.attention import Alibi
from d2v_composer.models.backbone import Backbone
from d2v_composer.models.configs import EncoderConfig, StudentSizes, check_choice
from d2v_composer.models.encoder import Tokens
from d2v_composer.models.images import is_same
from d2v_composer.models.names import Pooling, Representation
from d2v_composer.models.student import Student
from d2v_composer.system.errors import InputError, reading
from d2v_composer.system.files import out_file

OPSET = 18
# Control flow, and operators whose outputs' shapes depend on data.
DATA_DEPENDENT = {"If", "Loop", "Scan", "NonZero", "Unique", "Compress", "NonMaxSuppression"}
FLOAT64 = 11  # in ONNX
MAX_ONNX = 2_000_000_000  # bytes of weights in a file
# How a file says that its program takes pixels.
PIXELS = "uint8, (B, H, W, channels)"

log = logging.getLogger(__name__)


class TracedAlibi(Alibi):
    """ALiBi whose bias the program computes, for any number of tokens and on any device."""

    slopes_of_heads: Tensor

    def __init__(self, alibi: Alibi) -> None:
        heads = {"num_heads": alibi.num_heads, "num_alibi_heads": alibi.num_alibi_heads}
        super().__init__(alibi.num_columns, **heads, num_extra_tokens=alibi.num_extra_tokens)
        self.register_buffer("slopes_of_heads", alibi.slopes())

    def unscaled(self, num_tokens: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        return self.build(num_tokens, self.slopes_of_heads).to(dtype)


class Embedder(nn.Module):
    """A copy of a student that maps inputs to embeddings, (B, D) float32.

    Inputs are normalized images, (B, 3, S, S) float; or waveforms of any but equal length, (B, L) float in [-1, 1] at
    16 kHz: a program knows no padding.

    Args:
        student: Copied.
        primary: The embedding.
        takes_pixels: Inputs are images as decoders and cameras give them: (B, S, S, 3) uint8.
    """

    def __init__(self, student: Backbone, primary: PrimaryEmbedding, takes_pixels: bool = False) -> None:
        super().__init__()
        self.original = student.embed
        self.student = copy.deepcopy(student).cpu().requires_grad_(False).eval()
        parts: Any = (self.student, self.student.encoder)
        for part in parts:
            if getattr(part, "alibi", None) is not None:
                part.alibi = TracedAlibi(part.alibi)
        self.primary = primary
        self.takes_pixels = takes_pixels

    def example(self, count: int) -> Tensor:
        """Return inputs of zeros."""
        inputs = self.student.encoder.example(count)
        return inputs.movedim(1, -1).to(torch.uint8).contiguous() if self.takes_pixels else inputs

    def forward(self, inputs: Tensor) -> Tensor:
        if self.takes_pixels:
            inputs = inputs.movedim(-1, 1)
        return self.student.embed(inputs, self.primary.pooling, self.primary.representation)

    @property
    def description(self) -> dict[str, str]:
        """What :func:`describe` says of this program."""
        return describe(self.student, self.primary.name, self.takes_pixels)

    def check(self, path: Path, partial: Path) -> None:
        """Check that a program, in ``partial`` until it has its name, computes what the student does, on one input.

        Raises:
            InputError: It does not.
        """
        program = check_program.load("onnxruntime" if path.suffix == ".onnx" else "torch.export", str(partial), "")
        inputs = self.example(1)
        inputs = torch.randint_like(inputs, 256) if self.takes_pixels else torch.randn_like(inputs)
        images = inputs.movedim(-1, 1) if self.takes_pixels else inputs
        expected = self.original(images, self.primary.pooling, self.primary.representation)
        if not is_same(torch.from_numpy(program(inputs.numpy())), expected):
            raise InputError(f"{path}: the program would compute something else than the student")


def describe(student: Backbone, embedding: str, takes_pixels: bool) -> dict[str, str]:
    """Return the preprocessing of inputs that a student's program expects, as JSON, and the name of the embedding."""
    config = student.encoder.config
    preprocessing = {name: getattr(config, name) for name in config.preprocessing}
    if takes_pixels:
        del preprocessing["image_mean"], preprocessing["image_std"]
        preprocessing["inputs"] = PIXELS
    return {"preprocessing": json.dumps(preprocessing), "embedding": embedding}


def read_description(path: Path, student: Backbone) -> tuple[str, bool, bool]:
    """Return which embedding a student's exported file computes, whether in int8, and whether from pixels.

    Raises:
        InputError: It cannot be read, the student has no such embedding, or the file's preprocessing is another.
    """
    stored, is_int8 = {"embedding": "", "preprocessing.json": ""}, False
    with reading(path):
        if path.suffix == ".onnx":
            check_packages(path, "onnx")
            import onnx

            model = onnx.load(path)
            stored |= {each.key: each.value for each in model.metadata_props}
            is_int8 = any(node.op_type == "DequantizeLinear" for node in model.graph.node)
        elif path.suffix == ".pt2":
            torch.export.load(path, extra_files=stored)
        elif path.suffix == ".safetensors":
            stored |= describe(load_student(path), choose_embedding(student, None, None).name, takes_pixels=False)
    if (embedding := stored["embedding"]) not in student.embedding_names:
        raise InputError(f"{path} must be an .onnx, .pt2 or .safetensors file that d2v export wrote from this student")
    preprocessing = stored.get("preprocessing") or stored["preprocessing.json"]
    takes_pixels = PIXELS in preprocessing
    if preprocessing != (expected := describe(student, embedding, takes_pixels)["preprocessing"]):
        raise InputError(f"{path}: its preprocessing is {preprocessing}, but the student's is {expected}")
    return embedding, is_int8, takes_pixels


def export_onnx(embedder: Embedder, path: Path) -> None:
    """Write ONNX, opset 18: ``images`` or ``waveforms``, as :class:`Embedder` takes them → ``embedding`` (batch, D).

    The metadata are ``preprocessing`` and ``embedding`` of :func:`describe`.

    Raises:
        InputError: A package of the extra ``onnx`` is not installed, the student is too large, or as
            :meth:`Embedder.check`.
        RunError: The disk is full.
    """
    check_packages(path, "onnx", "onnxruntime", "onnxscript")
    import onnx

    if (size := sum(tensor.nbytes for tensor in embedder.state_dict().values())) > MAX_ONNX:
        raise InputError(f"{path}: an ONNX file holds at most 2 GB, and this student has {size / 1e9:.1f}; export .pt2")
    free_axes = embedder.student.encoder.free_axes
    with warnings.catch_warnings():  # torch 2.13 warns of its own LeafSpec
        warnings.filterwarnings("ignore", ".*LeafSpec", FutureWarning)
        program = torch.onnx.export(
            trace(embedder),
            input_names=[embedder.student.encoder.input_name],
            output_names=["embedding"],
            dynamic_shapes={"inputs": {axis: name for axis, (name, *_) in free_axes.items()}},
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    assert program is not None  # without a file name, torch returns the program
    program.model.metadata_props.update(embedder.description)
    if faults := lint(model := program.model_proto, free_axes.keys()):
        log.warning("%s: some runtimes refuse or miscompute this: %s", path, "; ".join(faults))
    with out_file(path) as partial:
        onnx.save(model, partial)  # torch would write weights beside it
        embedder.check(path, partial)


def lint(model: Any, free_axes: Set[int]) -> list[str]:
    """List what some runtimes refuse or miscompute in an ONNX model.

    Args:
        model: An ``onnx.ModelProto``.
        free_axes: The axes of its input that may have any size.
    """
    graph, faults = model.graph, [f"operators of {each.domain}" for each in model.opset_import if each.domain]
    faults += sorted(DATA_DEPENDENT.intersection(node.op_type for node in graph.node))
    sizes = enumerate(graph.input[0].type.tensor_type.shape.dim)
    if (free := {axis for axis, size in sizes if not size.HasField("dim_value")}) != free_axes:
        faults.append(f"axes {sorted(free)} of any size, expected {sorted(free_axes)}")
    types = [each.type.tensor_type.elem_type for each in graph.value_info]
    if FLOAT64 in types + [each.data_type for each in graph.initializer]:
        faults.append("float64")
    # Not those that are all zeros, ones or a mask.
    large = [each.raw_data for each in graph.initializer if len(set(each.raw_data[1024:4096])) > 9]
    return faults + ["weights stored twice"] * (len(set(large)) < len(large))


def check_packages(path: Path, *names: str) -> None:
    """Check that the packages needed to write a file are installed.

    Raises:
        InputError: One is not.
    """
    if missing := [name for name in names if find_spec(name) is None]:
        raise InputError(f"{path} needs {' and '.join(missing)}: pip install {' '.join(missing)}")


def export_program(embedder: Embedder, path: Path) -> None:
    """Write a program for ``torch.export.load(path).module()``; the entries of :func:`describe` are its extra files.

    Raises:
        InputError: As :meth:`Embedder.check`.
        RunError: The disk is full.
    """
    extra = embedder.description
    extra["preprocessing.json"] = extra.pop("preprocessing")
    archive = io.BytesIO()  # on a full disk, the writer of torch 2.13 would abort the process
    torch.export.save(trace(embedder), archive, extra_files=extra)
    with out_file(path) as partial:
        partial.write_bytes(archive.getbuffer())
        embedder.check(path, partial)


def trace(embedder: Embedder) -> torch.export.ExportedProgram:
    """Trace the program for any number of inputs, and for waveforms of any length."""
    free_axes = embedder.student.encoder.free_axes
    free = {axis: torch.export.Dim(name, min=low, max=high) for axis, (name, low, high) in free_axes.items()}
    inputs = embedder.example(2)  # torch.export treats a batch size of one as constant
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Unable to find the path of the module")  # timm's, and it does not matter
        return torch.export.export(embedder, (inputs,), dynamic_shapes={"inputs": free}, strict=False)


# timm's names of poolings; it has none for the mean of all time steps.
POOLINGS: dict[str, Pooling] = {"token": "cls", "avg": "mean_patches", "mean": "mean"}


class TimmStudent(Student):
    """timm's interface to a student: features, pooling, a classifier to fine-tune.

    It is empty until it loads a file of ``d2v export``, which has the sizes. The encoder stays frozen; the blocks and
    the head train.

    Args:
        num_classes: Outputs of the head; 0: no head, the pooled features are the output.
        global_pool: ``token``: CLS; ``avg``: the mean of the patches; ``mean``: of all time steps. Default: the
            file's primary embedding.
        representation: The features: ``output`` of the last block, or ``layer_mean``; ``projected``: the output, which
            the file's projection pools. Default: the file's own.
    """

    def __init__(
        self, num_classes: int = 0, global_pool: str | None = None, representation: Representation | None = None
    ) -> None:
        nn.Module.__init__(self)
        self.num_classes, self.asked_pool = num_classes, global_pool
        self.asked_representation: Representation | None = representation
        self.loaded: Any = None

    def set_features(self) -> None:
        """Choose what the head reads: what was asked for, or else the file's primary embedding.

        Raises:
            ValueError: It is unknown, or the model has no such embedding.
        """
        check_choice("global_pool", self.asked_pool or "token", Literal["token", "avg", "mean"])
        check_choice("representation", self.asked_representation or "output", Representation)
        pooling = None if self.asked_pool is None else POOLINGS[self.asked_pool]
        self.embedding = choose_embedding(self, pooling, self.asked_representation)
        representation, pooling = self.embedding
        self.global_pool = next(name for name in POOLINGS if POOLINGS[name] == pooling)
        is_projected = representation == "projected"
        self.num_features = self.head_hidden_size = self.projected_width if is_projected else self.embed_dim
        # DDP refuses trainable parameters without gradient.
        self.train_what_is_read(output=representation != "layer_mean", pooled=False)
        if self.projection is not None and not self.projection.is_frozen:
            self.projection.requires_grad_(is_projected)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head with a zero-initialized one, or remove it if there are 0 classes.

        Raises:
            ValueError: As :meth:`set_features`.
        """
        self.asked_pool = global_pool or self.asked_pool
        self.set_features()
        self.num_classes = num_classes
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        for parameter in self.head.parameters():
            nn.init.zeros_(parameter)

    def get_classifier(self) -> nn.Module:
        return self.head

    def forward_features(self, x: Tensor) -> Tensor:
        """Map images, (B, 3, S, S), normalized as in ``pretrained_cfg``, or waveforms to features, (B, T, D)."""
        return self.represent(self.features(Tokens(self.encode(x))), self.embedding.representation)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map features to logits, (B, num_classes), or with ``pre_logits`` or no head to pooled features, (B, D)."""
        features, (representation, pooling) = self.features(Tokens(x)), self.embedding
        is_projected = representation == "projected"
        pooled = self.project(features, x) if is_projected else features.poolings(x)[pooling]
        return pooled if pre_logits else self.head(pooled)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.checkpoint_activations(enable)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Save the sizes and the embedding with the tensors, so that a loaded model has the same."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + CONFIG_TENSOR] = config_tensor(sizes_of(self), self.embedding)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load the tensors of an exported student or of this model, which take the file's sizes; all are checked.

        Raises:
            InputError: There are no sizes, or the tensors do not fit them.
            ValueError: As :meth:`set_features`.
        """
        tensors = dict(state_dict)
        if (stored := tensors.pop(CONFIG_TENSOR, None)) is None:
            raise InputError(f"no tensor {CONFIG_TENSOR}: not a file written by d2v export")
        with reading(CONFIG_TENSOR):
            config = parse_object(stored.cpu().numpy().tobytes())
            primary = PrimaryEmbedding.parse(config.pop("primary"))
            sizes = read_config(StudentSizes, config)
        head = {name: tensors.pop(name) for name in [*tensors] if name.startswith("head.")}
        build_student(CONFIG_TENSOR, sizes, tensors)
        if self.loaded != (sizes, primary):
            self.loaded = sizes, primary
            super().__init__(build_encoder(sizes.encoder), sizes.student, {"model": primary._asdict()})
            self.pretrained_cfg = self.default_cfg = pretrained_cfg(sizes.encoder)
            self.reset_classifier(self.num_classes)
        own_head = {f"head.{name}": tensor for name, tensor in self.head.state_dict().items()}
        return super().load_state_dict(tensors | own_head | (head if own_head else {}), strict, assign)


def pretrained_cfg(config: EncoderConfig | None) -> dict[str, Any]:
    """Return timm's record of the model, with the preprocessing for timm's ``resolve_data_config``."""
    preprocessing = {} if config is None else config.timm_preprocessing
    return {"architecture": "d2v2_student", "num_classes": 0, "classifier": "head", **preprocessing}


def build_timm_student(pretrained: bool = False, **kwargs: Any) -> TimmStudent:
    """Build a student for timm, to load a file into (see :class:`TimmStudent`)."""
    not_ours: Any = ("in_chans", "img_size")  # timm's defaults; the file has its own
    kwargs["pretrained_cfg"] = kwargs.get("pretrained_cfg") or pretrained_cfg(None)  # timm gives None
    return build_model_with_cfg(TimmStudent, "d2v2_student", pretrained, kwargs_filter=not_ours, **kwargs)
