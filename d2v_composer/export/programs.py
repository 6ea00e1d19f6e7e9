"""Export a student to ONNX, also in int8, or torch.export, and as a timm model that loads its file."""

import copy
import io
import json
import tempfile
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import torch
from torch import Tensor, nn

from d2v_composer.checkpoints.load import load_student
from d2v_composer.checkpoints.model_file import (
    CONFIG_TENSOR,
    build_encoder,
    build_student,
    check_timm_outputs,
    config_tensor,
    parse_object,
    read_config,
)
from d2v_composer.export.check_program import RUNTIMES
from d2v_composer.models.alignment import side_by_side
from d2v_composer.models.attention import Alibi
from d2v_composer.models.backbone import Backbone
from d2v_composer.models.configs import EncoderConfig, StudentSizes, height_and_width
from d2v_composer.models.encoder import Tokens
from d2v_composer.models.features import Features
from d2v_composer.models.images import is_same
from d2v_composer.models.names import EMBEDDING, Representation
from d2v_composer.models.student import Student
from d2v_composer.system.errors import InputError, errors_of, reading
from d2v_composer.system.files import out_file

OPSET = 18
MAX_ONNX = 2_000_000_000  # bytes of weights in a file
# What becomes int8.
QUANTIZED_OPS = ["Conv", "Gemm", "MatMul"]
# How a file says that its program takes pixels.
PIXELS = "uint8, (B, H, W, channels)"
# The files in a .pt2 file that hold the values of :func:`metadata_of`.
EXTRA_FILES = ("preprocessing.json", "embedding")


def build_bias(alibi: Any, num_tokens: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Compute in a program what :meth:`Alibi.unscaled` keeps."""
    return alibi.build(num_tokens, alibi.slopes_of_heads).to(dtype)


class Program(nn.Module):
    """A copy of a student that maps inputs to embeddings, (B, D) float32, to be traced.

    Inputs are normalized images, (B, 3, S, S) float; or waveforms of any but equal length, (B, L) float in [-1, 1] at
    16 kHz: a program knows no padding.

    Args:
        student: The student, which is copied.
        embedding: Name of the embedding that the program computes.
        takes_pixels: Take images as decoders and cameras give them, (B, S, S, 3) uint8, instead of normalized ones.
    """

    def __init__(self, student: Backbone, embedding: str, takes_pixels: bool = False) -> None:
        super().__init__()
        self.original = student.embed_all
        self.student = copy.deepcopy(student).cpu().requires_grad_(False).eval()
        for alibi in self.modules():
            if isinstance(alibi, Alibi):  # the program needs any number of tokens and any device
                alibi.register_buffer("slopes_of_heads", alibi.slopes())
                alibi.unscaled = partial(build_bias, alibi)
        self.embedding = embedding
        self.takes_pixels = takes_pixels

    def example(self, count: int) -> Tensor:
        """Return inputs of zeros."""
        inputs = self.student.encoder.example(count)
        return inputs.movedim(1, -1).to(torch.uint8).contiguous() if self.takes_pixels else inputs

    def forward(self, inputs: Tensor) -> Tensor:
        return self.compute(self.student.embed_all, inputs)

    def compute(self, embed_all: Callable[..., dict[str, Tensor]], inputs: Tensor) -> Tensor:
        """Compute the program's embedding by calling ``embed_all``, a student's method."""
        return embed_all(inputs.movedim(-1, 1) if self.takes_pixels else inputs)[self.embedding]


def export_program(program: Program, path: Path) -> None:
    """Write a program to an .onnx or .pt2 file, after a check on one input that it computes what the student does.

    Raises:
        InputError: The program computes something else, or the student is too large.
        RunError: The disk is full.
    """
    metadata = metadata_of(program.student, program.embedding, program.takes_pixels)
    with out_file(path) as partial, errors_of(str(path), InputError):
        (write_onnx if path.suffix == ".onnx" else write_archive)(program, partial, metadata)
        load = next(runtime.load for runtime in RUNTIMES.values() if runtime.suffix == path.suffix)
        inputs = program.example(1)
        inputs = torch.randint_like(inputs, 256) if program.takes_pixels else torch.randn_like(inputs)
        outputs = torch.from_numpy(load(str(partial))(inputs.numpy()))
        if not is_same(outputs, program.compute(program.original, inputs)):
            raise InputError("the exported model would not compute what the student computes")


def metadata_of(student: Backbone, embedding: str, takes_pixels: bool) -> dict[str, str]:
    """Return the preprocessing of inputs that a student's program expects, as JSON, and the name of the embedding."""
    config = student.encoder.config
    preprocessing = {name: getattr(config, name) for name in config.preprocessing}
    if takes_pixels:
        del preprocessing["image_mean"], preprocessing["image_std"]
        preprocessing["inputs"] = PIXELS
    return {"preprocessing": json.dumps(preprocessing), "embedding": embedding}


def read_metadata(path: Path, student: Backbone) -> tuple[str, bool, bool]:
    """Return which embedding a student's exported file computes, whether in int8, and whether from pixels.

    Raises:
        InputError: The file cannot be read, the student has no such embedding, or the file's preprocessing is another.
    """
    stored, is_int8 = {"embedding": ""}, False
    with reading(path):
        if path.suffix == ".onnx":
            import onnx

            model = onnx.load(path)
            stored |= {entry.key: entry.value for entry in model.metadata_props}
            is_int8 = any(node.op_type == "DequantizeLinear" for node in model.graph.node)
        elif path.suffix == ".pt2":
            torch.export.load(path, extra_files=(stored := dict.fromkeys(EXTRA_FILES, "")))
            stored["preprocessing"] = stored[EXTRA_FILES[0]]
        elif path.suffix == ".safetensors":
            stored = metadata_of(load_student(path), EMBEDDING, takes_pixels=False)
    if (embedding := stored["embedding"]) not in (EMBEDDING, *student.raw_names):
        raise InputError(f"{path} must be an .onnx, .pt2 or .safetensors file that d2v export wrote from this student")
    takes_pixels = PIXELS in stored["preprocessing"]
    expected = metadata_of(student, embedding, takes_pixels)["preprocessing"]
    if stored["preprocessing"] != expected:
        raise InputError(f"{path}: its preprocessing is {stored['preprocessing']}, but the student's is {expected}")
    return embedding, is_int8, takes_pixels


def write_onnx(program: Program, path: Path, metadata: dict[str, str]) -> None:
    """Write ONNX, opset 18: ``images`` or ``waveforms``, as the program takes them → ``embedding`` (batch, D).

    Args:
        program: The program to trace.
        path: The file.
        metadata: The file's metadata, from :func:`metadata_of`.

    Raises:
        InputError: The student is too large.
    """
    import onnx

    if (size := sum(tensor.nbytes for tensor in program.state_dict().values())) > MAX_ONNX:
        raise InputError(f"an ONNX file holds at most 2 GB, and this student has {size / 1e9:.1f}; export .pt2")
    encoder = program.student.encoder
    with warnings.catch_warnings():  # torch 2.13 warns of its own LeafSpec
        warnings.filterwarnings("ignore", ".*LeafSpec", FutureWarning)
        traced = torch.onnx.export(
            trace(program),
            input_names=[encoder.input_name],
            output_names=["embedding"],
            dynamic_shapes={"inputs": {axis: name for axis, (name, *_) in encoder.free_axes.items()}},
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    assert traced is not None  # without a file name, torch returns the program
    traced.model.metadata_props.update(metadata)
    onnx.save(traced.model_proto, path)  # torch would write weights beside it


def write_archive(program: Program, path: Path, metadata: dict[str, str]) -> None:
    """Write a program for ``torch.export.load(path).module()``, with the values of ``metadata`` as extra files."""
    archive = io.BytesIO()  # on a full disk, the writer of torch 2.13 would abort the process
    extra: Any = dict(zip(EXTRA_FILES, metadata.values(), strict=True))
    torch.export.save(trace(program), archive, extra_files=extra)
    path.write_bytes(archive.getbuffer())


def trace(program: Program) -> torch.export.ExportedProgram:
    """Trace the program for any number of inputs, and for waveforms of any length."""
    free_axes = program.student.encoder.free_axes
    free = {axis: torch.export.Dim(name, min=low, max=high) for axis, (name, low, high) in free_axes.items()}
    inputs = program.example(2)  # torch.export treats a batch size of one as constant
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Unable to find the path of the module")  # timm's, and it does not matter
        return torch.export.export(program, (inputs,), dynamic_shapes={"inputs": free}, strict=False)


def quantize(program: Path, out: Path, images: Tensor) -> None:
    """Write an ONNX program whose linear layers and convolutions compute with int8 weights and uint8 inputs.

    Args:
        program: File of the program in float32.
        out: The file to write.
        images: Inputs of the program, which calibrate the range of each layer's inputs.

    Raises:
        RunError: The disk is full.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    feeds = ({"images": batch.numpy()} for batch in images.split(32))
    reader: Any = SimpleNamespace(get_next=lambda: next(feeds, None))
    with tempfile.TemporaryDirectory() as folder, out_file(out) as partial:
        prepared = Path(folder) / "prepared.onnx"
        quant_pre_process(program, prepared, skip_symbolic_shape=True)
        graph = onnx.load(prepared).graph
        weights = {tensor.name for tensor in graph.initializer}
        quantize_static(
            prepared,
            partial,
            reader,
            op_types_to_quantize=QUANTIZED_OPS,
            # Not attention's products of two activations. (The option MatMulConstBOnly has no effect in this format.)
            nodes_to_quantize=[node.name for node in graph.node if weights.intersection(node.input)],
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            extra_options={"OpTypesToExcludeOutputQuantization": QUANTIZED_OPS},
        )


# timm's names of poolings.
POOLINGS = {"token": "cls", "avg": "mean_patches"}


class TimmStudent(Student):
    """timm's interface to a student: features, pooling, a classifier to fine-tune.

    It is empty until it loads a file of ``d2v export``, which has the sizes. The encoder stays frozen; the blocks and
    the head train.

    Args:
        num_classes: Outputs of the head. The width of the file's alignment: the head is the alignment, and the output
            is the embedding. 0: no head, the pooled features are the output. Any other number: a new head of zeros.
        global_pool: ``token``: CLS; ``avg``: the mean of the patches; ``mean``: the mean of all tokens. Default: the
            poolings that the file's alignment reads, side by side; without an alignment, its raw embedding.
        representation: The features: ``output`` of the last block, or ``layer_mean``. Default: those that the
            alignment reads, side by side.
    """

    def __init__(self, num_classes: int = 0, global_pool: Any = None, representation: Any = None) -> None:
        nn.Module.__init__(self)
        self.num_classes, self.global_pool, self.representation = num_classes, global_pool, representation
        self.loaded: Any = None

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head with a zero-initialized one, or remove it if there are 0 classes.

        Raises:
            InputError: The model has no embedding with this pooling and the representation asked for.
        """
        self.global_pool = global_pool or self.global_pool
        pooling: Any = POOLINGS.get(self.global_pool, self.global_pool)
        if pooling or self.representation:
            self.pooled = [self.choose_embedding(pooling, self.representation)]
        else:
            is_raw = self.loaded.embedding.made_by == "raw"
            self.pooled = [self.raw_embedding] if is_raw else self.alignment_inputs
        self.representations: list[Any] = [
            kind for kind in get_args(Representation) if any(name.startswith(kind) for name in self.pooled)
        ]
        # DDP refuses trainable parameters without gradient.
        self.blocks[-1].norm2.requires_grad_("output" in self.representations)
        self.num_features = self.embed_dim * len(self.representations)
        if (sizes := self.encoder.config).modality == "image":
            reduction = height_and_width(sizes.image_size)[0] // sizes.grid_size[0]
            self.feature_info = [{"num_chs": self.num_features, "reduction": reduction, "module": "blocks"}]
        self.head_hidden_size = sum(map(self.width_of, self.pooled))
        self.num_classes = num_classes
        self.head = nn.Linear(self.head_hidden_size, num_classes) if num_classes else nn.Identity()
        for parameter in self.head.parameters():
            nn.init.zeros_(parameter)

    def get_classifier(self) -> nn.Module | None:
        return self.head

    def forward_features(self, x: Tensor) -> Tensor:
        """Map images, (B, 3, S, S), normalized as in ``pretrained_cfg``, or waveforms to features, (B, T, D).

        If the head reads both representations, they are side by side, (B, T, 2 D).
        """
        features = self.features(Tokens(self.encode(x)))
        if len(self.representations) == 1:
            return self.represent(features, *self.representations)
        output_and_mean = features.with_output(lambda layers: self.layer_mean.average(layers, features))
        return torch.cat(output_and_mean, dim=-1)

    def forward_intermediates(
        self, x: Tensor, indices: Any = None, output_fmt: str = "NCHW", intermediates_only: bool = False, **_: Any
    ) -> Any:
        """Return the features and a list with their only scale, for timm's ``features_only``.

        Args:
            x: See :meth:`forward_features`; images.
            indices: Not used: there is one scale.
            output_fmt: ``NCHW``: the scale is (B, C, rows, columns); ``NLC``: (B, rows · columns, C).
            intermediates_only: Return only the list.
        """
        features = self.forward_features(x)
        cells = features[:, self.num_extra_tokens :]
        if output_fmt == "NCHW":
            cells = cells.transpose(1, 2).unflatten(2, self.encoder.config.grid_size)
        return [cells] if intermediates_only else (features, [cells])

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map features to the head's outputs, or with ``pre_logits`` to pooled features, (B, ``head_hidden_size``)."""
        features = Features.of_layer(x, self.num_extra_tokens, self.has_cls_token)
        pooled = dict[str, Tensor]()
        for name, part in zip(self.representations, x.chunk(len(self.representations), dim=-1), strict=True):
            pooled |= features.poolings(part, f"{name}_")
        joined = side_by_side(pooled, self.pooled)
        return joined if pre_logits or self.head is None else self.head(joined)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.checkpoint_activations(enable)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Save the sizes with the tensors, so that a loaded model has the same."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + CONFIG_TENSOR] = config_tensor(self.loaded.model_dump(mode="json"))

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load the tensors of an exported student, or of this model, and take on their sizes; both are checked.

        If the tensors have no head of this model's size, the model keeps its own.

        Raises:
            InputError: The sizes are missing, the tensors do not fit them, or the model lacks the chosen embedding.
        """
        tensors = dict(state_dict)
        if (stored := tensors.pop(CONFIG_TENSOR, None)) is None:
            raise InputError(f"no tensor {CONFIG_TENSOR}: not a file written by d2v export")
        with reading(CONFIG_TENSOR):
            sizes = read_config(StudentSizes, parse_object(stored.cpu().numpy().tobytes()))
        last = {name: tensors.pop(name) for name in [*tensors] if name.startswith(("head.", "alignment."))}
        with_raw = sizes.changed(embedding=sizes.embedding.changed(made_by="raw"))
        check_timm_outputs(CONFIG_TENSOR, build_student(CONFIG_TENSOR, with_raw, tensors))
        if self.loaded != sizes:
            self.loaded = sizes
            super().__init__(build_encoder(sizes.encoder), sizes.student)
            self.raw_embedding = sizes.embedding.raw
            self.pretrained_cfg = self.default_cfg = pretrained_cfg(sizes.encoder)
            self.reset_classifier(self.num_classes)
        if self.num_classes != len(last.get("alignment.bias", ())):
            last = {name: tensor for name, tensor in last.items() if name.startswith("head.") and self.num_classes}
        head = {name.replace("alignment.", "head."): tensor for name, tensor in last.items()}
        return super().load_state_dict(tensors | head, bool(head), assign)


def pretrained_cfg(config: EncoderConfig | None) -> dict[str, Any]:
    """Return timm's record of the model, with the preprocessing for timm's ``resolve_data_config``."""
    preprocessing = {} if config is None else config.timm_preprocessing
    return {"architecture": "d2v2_student", "num_classes": 0, "classifier": "head", **preprocessing}


def build_timm_student(pretrained: bool = False, **kwargs: Any) -> TimmStudent:
    """Build a student for timm, to load a file into (see :class:`TimmStudent`).

    Raises:
        ValueError: ``features_only`` is true, but not ``pretrained``: the sizes of feature maps are in a file.
    """
    from timm.models import build_model_with_cfg  # takes seconds

    if kwargs.get("features_only") and not pretrained:
        raise ValueError("features_only: d2v2_student needs pretrained=True, pretrained_cfg_overlay=dict(file=FILE)")
    kwargs["feature_cfg"] = {"feature_cls": "getter", "out_indices": (0,)}
    not_ours: Any = ("in_chans", "img_size")  # timm's defaults; the file has its own
    kwargs["pretrained_cfg"] = kwargs.get("pretrained_cfg") or pretrained_cfg(None)  # timm gives None
    return build_model_with_cfg(TimmStudent, "d2v2_student", pretrained, kwargs_filter=not_ours, **kwargs)
