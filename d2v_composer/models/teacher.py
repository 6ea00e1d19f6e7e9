"""The base of teachers: frozen blocks on an encoder, regression targets, students on the same encoder.

Shapes: B inputs, E extra tokens, N patches, T = E + N tokens, D channels.
"""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor, nn

from d2v_composer.models.attention import FfnBlock
from d2v_composer.models.encoder import Encoder, Frozen
from d2v_composer.models.sizes import TeacherConfig, check_choice, check_whole
from d2v_composer.models.student import Init, Student, StudentConfig
from d2v_composer.models.targets import Normalization
from d2v_composer.models.transformer import Transformer

ExtraTokens = Literal["regress", "drop", "only"]
TargetSource = Literal["ffn", "block"]


class Teacher(Transformer, Frozen):
    """A teacher, in eval mode. Call :meth:`freeze` once the parameters exist.

    Args:
        encoder: Shared with the students.
        blocks: The blocks after it.
        config: The sizes.
        provenance: Origin of the weights, stored with what is derived from them; at least ``source``, ``sha256`` and
            ``licence``.
    """

    def __init__(
        self, encoder: Encoder, blocks: Sequence[FfnBlock], config: TeacherConfig, provenance: dict[str, Any] | None
    ) -> None:
        super().__init__(encoder, blocks, final_layer_norm=config.final_layer_norm)
        self.config: Any = config  # of the subclass's kind
        self.provenance = provenance or {}

    @abstractmethod
    def init_sources(self, init: Init) -> Sequence[nn.Module]:
        """Return the attention modules or blocks from which a student's can be initialized.

        Raises:
            ValueError: The student's are of another kind.
        """

    def follow(self, student: Student) -> None:
        """Normalize targets and ``layer_mean`` as a student does, so that they compare."""
        self.normalization, self.final_layer_norm = student.normalization, student.final_layer_norm

    def target_layers(self, x: Tensor, source: TargetSource, padding_mask: Tensor | None = None) -> Iterator[Tensor]:
        """Return each block's FFN output, or its output, (B, T, D): the layers of the target.

        Raises:
            ValueError: ``source`` is unknown.
        """
        check_choice("source", source, TargetSource)
        if source == "ffn":
            return self.ffn_outputs(x, padding_mask)
        return (output for output, _ in self.iterate_blocks(x, padding_mask=padding_mask))

    @torch.no_grad()
    def targets(
        self,
        x: Tensor,
        extra_tokens: ExtraTokens = "regress",
        average_top_k_layers: int | None = None,
        source: TargetSource = "ffn",
        normalization: Normalization | None = None,
        final_layer_norm: bool | None = None,
        padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Compute the regression targets: norm_mean of the last blocks' FFN outputs.

        Args:
            x: (B, T, D), from :meth:`encode`.
            extra_tokens: ``regress`` them like patches, ``drop`` them before InstanceNorm, as data2vec 2.0's
                pre-training does, or regress them ``only``.
            average_top_k_layers: Number of last blocks; default the config's. For data2vec 2.0 that is the
                checkpoint's (all of base's, 18 of large's 24, 24 of huge's 32), for others all.
            source: ``ffn``, or ``block`` for the blocks' outputs.
            normalization: Normalization of each layer: ``instance`` over tokens, or ``layer`` over channels; default
                this teacher's.
            final_layer_norm: End with a LayerNorm; default this teacher's: as in its pre-training, false for data2vec
                2.0's audio models.
            padding_mask: (B, T), true for padding, from :meth:`padding_mask`; its targets mean nothing.

        Returns:
            (B, T, D) float32; (B, N, D) without the extra tokens, (B, E, D) of these only.

        Raises:
            ValueError: There are fewer blocks, or ``source`` or ``normalization`` is unknown.

        Example:
            >>> y = teacher.targets(teacher.encode(images))
            >>> y.shape
            torch.Size([2, 65, 192])
        """
        depth = self.config.depth
        top_k = self.config.average_top_k_layers if average_top_k_layers is None else average_top_k_layers
        check_whole("average_top_k_layers", top_k, 1, depth)
        normalization = self.normalization if normalization is None else normalization
        final_layer_norm = self.final_layer_norm if final_layer_norm is None else final_layer_norm
        layers = islice(self.target_layers(x, source, padding_mask), depth - top_k, None)
        if extra_tokens == "drop":
            layers = (layer_BTD[:, self.num_extra_tokens :] for layer_BTD in layers)
            padding_mask = None if padding_mask is None else padding_mask[:, self.num_extra_tokens :]
        target = self.norm_mean(layers, 0, normalization, final_layer_norm, padding_mask)
        return target[:, : self.num_extra_tokens] if extra_tokens == "only" else target

    def build_student(
        self,
        depth: int = 5,
        mlp_ratio: float = 3.0,
        alibi: bool = True,
        init: Init = "random",
        normalization: Normalization = "instance",
        embed_dim: int | None = None,
        final_layer_norm: bool | None = None,
    ) -> Student:
        """Build a trainable student that shares this teacher's encoder.

        Args:
            depth: Number of blocks.
            mlp_ratio: Hidden width of their MLPs over their channels.
            alibi: Add the ALiBi bias to the attention, as in the chapter, even if the teacher has none.
            init: ``random`` (the chapter), or copy the teacher's first blocks: ``teacher_attention``, or
                ``teacher_blocks`` if the MLP ratios agree.
            normalization: Normalization of each layer in the prediction and in ``layer_mean``: ``instance`` over
                tokens, as in the chapter, or ``layer`` over channels.
            embed_dim: Channels of its blocks and embeddings, at most D; default D.
            final_layer_norm: End target, prediction and ``layer_mean`` with a LayerNorm; default the teacher's.

        Raises:
            ValueError: A size is out of range or, for a copy, differs from the teacher's; or an option is unknown.

        Example:
            >>> student = teacher.build_student(depth=2, mlp_ratio=3.0)
            >>> student.encoder is teacher.encoder
            True
        """
        check_choice("init", init, Init)
        config = StudentConfig(
            depth=depth,
            mlp_ratio=mlp_ratio,
            alibi=alibi,
            normalization=normalization,
            embed_dim=embed_dim,
            final_layer_norm=self.config.final_layer_norm if final_layer_norm is None else final_layer_norm,
        )
        student = Student(self.encoder, config, provenance={"teacher": self.provenance})
        if init == "random":
            return student
        sources = self.init_sources(init)
        if depth > len(sources):
            raise ValueError(
                f"init {init} needs a depth of at most {len(sources)}, the number of the teacher's blocks; got {depth}"
            )
        try:
            for block, source in zip(student.block_list, sources, strict=False):
                (block.attn if init == "teacher_attention" else block).load_state_dict(source.state_dict())
        except RuntimeError as error:  # its first line is a title
            raise ValueError(f"init {init} needs the teacher's sizes: {str(error).splitlines()[1].strip()}") from error
        return student
