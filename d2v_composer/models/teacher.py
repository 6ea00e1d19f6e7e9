"""The base of teachers, frozen models that compute targets and build students.

Shapes: B inputs, E extra tokens, N patches or frames, T = E + N tokens, D channels.
"""

from collections.abc import Mapping, Sequence
from reprlib import repr as short  # a list in a file may hold another one a million times
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from d2v_composer.models.backbone import Backbone, hash_tensors
from d2v_composer.models.configs import StudentConfig, TargetConfig, TimmNetworkConfig
from d2v_composer.models.encoder import Encoder, Freezable, Tokens
from d2v_composer.models.names import ExtraTokens, Normalization, check_choice
from d2v_composer.models.provenance import Record
from d2v_composer.models.student import Init, Student
from d2v_composer.models.targets import target_of


class Teacher(Backbone, Freezable):
    """Base of teachers. A subclass calls :meth:`freeze` at the end of its ``__init__``.

    Args:
        encoder: The encoder.
        config: The teacher's sizes.
        provenance: Origin of the weights: ``source``, ``license`` and, optionally, ``embedding``, the name of the
            teacher's embedding.
    """

    made_by = "teacher"

    def name_embedding(self, name: str | None) -> None:
        """Make the raw embedding of this name the teacher's embedding; ``None`` changes nothing.

        Raises:
            ValueError: The teacher has no embedding of this name.
        """
        if name is not None and name not in self.raw_names:
            raise ValueError(f"embedding must be one of {', '.join(self.raw_names)}, got {short(name)}")
        self.raw_embedding = name or self.raw_embedding

    def student_encoder(self) -> Encoder:
        """Return the encoder for a student's blocks: this teacher's encoder, or a new encoder to be trained.

        Raises:
            ValueError: No encoder can be built for this teacher's grid of patches.
        """
        return self.encoder

    def identify(self, weights: Mapping[str, Tensor] | None = None) -> Self:
        """Record in the provenance a hash of the teacher's weights and preprocessing, and a few outputs of the teacher.

        A hash that the provenance already has is kept.

        Args:
            weights: The weights to hash; default: this model's.

        Raises:
            ValueError: The teacher's outputs are not finite.
        """
        if not (outputs := self.sample_outputs()):
            raise ValueError("the teacher's outputs are not finite")
        self.provenance["outputs"] = [float(f"{output:.3g}") for output in outputs]
        if "sha256" not in self.provenance:
            config = self.encoder.config
            preprocessing = [(name, getattr(config, name)) for name in config.preprocessing]
            self.provenance["sha256"] = hash_tensors(self.state_dict() if weights is None else weights, preprocessing)
        return self

    def init_sources(self, init: Init) -> Sequence[nn.Module]:
        """Return the attention modules or blocks from which a student's blocks can be initialized.

        Raises:
            ValueError: The teacher has no modules that a student's blocks can copy.
        """
        raise ValueError(f"init: must be random, because this teacher's blocks cannot be copied; got {init}")

    @torch.no_grad()
    def targets(
        self, x: Tensor, extra_tokens: ExtraTokens = "regress", padding_mask: Tensor | None = None, **options: Any
    ) -> Tensor:
        """Compute the regression targets: the mean of the teacher's normalized last layers.

        Args:
            x: Tokens, (B, T, D), from :meth:`encode`.
            extra_tokens: ``regress``: return targets for CLS and registers, too. ``drop``: leave CLS and registers
                out of the targets and of InstanceNorm's statistics.
            padding_mask: From :meth:`padding_mask`, (B, T), true for padding; targets for padding are meaningless.
            **options: Further fields of :class:`~d2v_composer.models.configs.TargetOptions`.

        Returns:
            Targets, (B, T, D) float32; with ``extra_tokens="drop"``, (B, N, D).

        Raises:
            ValueError: An option is unknown or out of range.

        Example:
            >>> y = teacher.targets(teacher.encode(images))
            >>> y.shape
            torch.Size([2, 65, 192])
        """
        config = TargetConfig(extra_tokens=extra_tokens, **options)
        layer_mean = self.layer_mean.changed(config.normalization, config.final_layer_norm)
        top_k = config.average_top_k_layers or self.config.average_top_k_layers
        return target_of(self.features(Tokens(x, padding_mask)), config, top_k, layer_mean)

    def build_student(
        self,
        init: Init = "random",
        model: str | None = None,
        pretrained: bool = False,
        freeze_copied: bool = False,
        *,
        depth: int | None = None,
        mlp_ratio: float | None = None,
        alibi: bool | None = None,
        embed_dim: int | None = None,
        normalization: Normalization | None = None,
        final_layer_norm: bool | None = None,
    ) -> Backbone:
        """Build a trainable student: blocks on :meth:`student_encoder`, or a timm model.

        Args:
            init: ``random``, or what to copy from the teacher's first blocks after the encoder: ``teacher_attention``
                or ``teacher_blocks``.
            model: ``timm/NAME``, a timm model whose features have a grid; all of the model is trained. Default: blocks
                on :meth:`student_encoder`.
            pretrained: Start from timm's weights of ``model``.
            freeze_copied: Freeze the attention that ``init="teacher_attention"`` copies.
            depth, mlp_ratio, alibi, embed_dim, normalization, final_layer_norm: Fields of
                :class:`~d2v_composer.models.configs.StudentConfig`; with ``model``, only the last two.

        Returns:
            A :class:`~d2v_composer.models.student.Student`, or with ``model`` a
            :class:`~d2v_composer.models.timm_network.TimmStudent`.

        Raises:
            ValueError: An option is unknown or out of range, or does not fit the teacher or another option; or timm
                cannot build ``model``.

        Example:
            >>> student = teacher.build_student(depth=2, mlp_ratio=3.0)
            >>> student.encoder is teacher.encoder
            True
        """
        check_choice("init", init, Init)
        fields = {
            "depth": depth,
            "mlp_ratio": mlp_ratio,
            "alibi": alibi,
            "embed_dim": embed_dim,
            "normalization": normalization,
            "final_layer_norm": final_layer_norm,
        }
        sizes = {name: value for name, value in fields.items() if value is not None}
        if freeze_copied and init != "teacher_attention":
            raise ValueError("freeze_copied: must be false unless init is teacher_attention")
        if model is not None:
            return self.build_network(model, pretrained, sizes | ({} if init == "random" else {"init": init}))
        if pretrained:
            raise ValueError("pretrained: must be false unless model is timm/NAME")
        config = StudentConfig(**{"final_layer_norm": self.layer_mean.final_layer_norm, **sizes})
        encoder = self.student_encoder()
        provenance = {"teacher": self.provenance, "student": {"own_encoder": encoder is not self.encoder}}
        student = Student(encoder, config, provenance)
        if self.raw_embedding in student.raw_names:
            student.raw_embedding = self.raw_embedding
        if init != "random":
            self._initialize(student, init, freeze_copied)
        return student

    def _initialize(self, student: Student, init: Init, freeze_copied: bool) -> None:
        sources, depth = self.init_sources(init), len(student.blocks)
        if depth > len(sources):
            raise ValueError(
                f"init {init} needs a depth of at most {len(sources)}, the number of the teacher's blocks after the "
                f"shared encoder; got {depth}"
            )
        try:
            for block, source in zip(student.block_list, sources, strict=False):
                copied = block.attn if init == "teacher_attention" else block
                copied.load_state_dict(source.state_dict())
                copied.requires_grad_(not freeze_copied)
        except RuntimeError as error:  # the message's first line is a title
            fault = str(error).splitlines()[1].strip()
            raise ValueError(f"init {init} needs a student with the teacher's sizes: {fault}") from error

    def build_network(self, model: str, pretrained: bool, options: Record) -> Backbone:
        """Build a student that is a timm model; see :meth:`build_student`."""
        defaults = {name: field.default for name, field in StudentConfig.model_fields.items()}
        options = {
            name: value for name, value in options.items() if name == "normalization" or value != defaults.get(name)
        }
        if not_its := sorted(options.keys() - {"normalization", "final_layer_norm"}):
            raise ValueError(f"{not_its[0]}: cannot be set for a student that is a timm model ({model}); leave it out")
        sizes = self.encoder.config
        if sizes.modality != "image":
            raise ValueError(f"model: {model} takes images, but this teacher takes {sizes.modality}")
        with torch.device("cpu"):  # torch._dynamo cannot be imported on the meta device
            from timm import __version__  # takes seconds to import

            from d2v_composer.models.timm_network import TimmStudent

        names = ("image_size", "in_chans", "image_mean", "image_std", "interpolation")
        preprocessing = {name: getattr(sizes, name) for name in names}
        config = TimmNetworkConfig(model=model, timm=__version__, **preprocessing, **options)
        start = {"config": {"student": {"pretrained": pretrained}}, "student": {"own_encoder": True}}  # as in a record
        try:
            return TimmStudent(config, {"teacher": self.provenance, **start}, pretrained)
        except ValueError as error:
            raise ValueError(f"model: {error}") from error
