"""An exported student as a timm model: ``timm.create_model("d2v2_student", checkpoint_path="student.safetensors")``.

Importing this module registers the model. Shapes: B images, S pixels a side, T time steps, D channels.
"""

from collections.abc import Mapping
from typing import Any, get_args

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn
from typing_extensions import Self

from d2v_composer.checkpoints.check_tensors import check_tensors
from d2v_composer.checkpoints.headline import DEFAULT_HEADLINE, Headline
from d2v_composer.checkpoints.stored_config import (
    CONFIG_TENSOR,
    StoredEncoderConfig,
    build_encoder,
    check_student,
    config_tensor,
    parse_config_tensor,
    sizes_of,
)
from d2v_composer.models.image_encoder import ImageEncoderConfig
from d2v_composer.models.names import Pooling, Representation
from d2v_composer.models.sizes import height_and_width
from d2v_composer.models.student import Student, StudentConfig
from d2v_composer.system.errors import InputError
from d2v_composer.system.retry import reason

__all__ = ["POOLINGS", "TimmStudent", "d2v2_student"]

# The paper's sizes; loading a file replaces them.
PAPER_ENCODER = ImageEncoderConfig(prenet_depth=2, num_extra_tokens=1)
# timm's names of poolings; it has none for the mean of all time steps.
POOLINGS: dict[str, Pooling] = {"token": "cls", "avg": "mean_patches", "mean": "mean"}


class TimmStudent(Student):
    """timm's interface to a student: features, pooling, a classifier to fine-tune.

    The encoder stays frozen; the blocks and the head train. Loading a file of ``recipes/export_student.py`` changes the
    model to the file's sizes and keeps the head.

    Args:
        encoder_config: The encoder's sizes.
        student_config: The blocks' sizes.
        num_classes: Outputs of the head; 0: no head, the pooled features are the output.
        global_pool: ``token``: CLS; ``avg``: the mean of the patches; ``mean``: of all time steps. Default: the
            file's headline.
        representation: The features: ``output`` of the last block, or ``layer_mean``. Default: the file's headline.
    """

    def __init__(
        self,
        encoder_config: StoredEncoderConfig = PAPER_ENCODER,
        student_config: StudentConfig | None = None,
        num_classes: int = 0,
        global_pool: str | None = None,
        representation: Representation | None = None,
    ) -> None:
        super().__init__(build_encoder(encoder_config), student_config or StudentConfig())
        self.num_features = self.head_hidden_size = encoder_config.embed_dim
        self.pretrained_cfg = self.default_cfg = pretrained_cfg(encoder_config)
        self.asked_pool = global_pool
        self.asked_representation: Representation | None = representation
        self.register_buffer(CONFIG_TENSOR, None)  # saved with the tensors
        self.set_features(DEFAULT_HEADLINE)
        self.reset_classifier(num_classes)

    def set_features(self, headline: Headline) -> None:
        """Compute a headline's embedding, except for what was asked for.

        Raises:
            ValueError: What was asked for is unknown, or needs a CLS token that the model lacks.
        """
        if self.asked_representation not in (None, *get_args(Representation)):
            raise ValueError(
                f"representation must be {' or '.join(get_args(Representation))}, got {self.asked_representation!r}"
            )
        self.representation: Representation = self.asked_representation or headline.representation
        pool = next(name for name, pooling in POOLINGS.items() if pooling == headline.pooling)
        pool = "avg" if pool == "token" and not self.has_cls_token else pool
        self.set_pool(self.asked_pool or pool)
        # No FFN output depends on the last norm, and DDP refuses trainable parameters without gradient.
        self.block_list[-1].norm2.requires_grad_(self.representation == "output")

    def set_pool(self, global_pool: str) -> None:
        """Choose the pooling; saved with the tensors, so that a loaded model has the same.

        Raises:
            ValueError: It is unknown, or needs a CLS token that the model lacks.
        """
        if global_pool not in POOLINGS or (global_pool == "token" and not self.has_cls_token):
            allowed = "token, avg or mean" if self.has_cls_token else "avg or mean, since there is no CLS token"
            raise ValueError(f"global_pool must be {allowed}, got {global_pool!r}")
        self.global_pool = global_pool
        headline = Headline(self.representation, POOLINGS[global_pool])
        stored = config_tensor(sizes_of(self), headline)
        setattr(self, CONFIG_TENSOR, stored.to(self.encoder.image_mean.device))

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by a new one of zeros; remove it for 0 classes.

        Raises:
            ValueError: The pooling is unknown, or needs a CLS token that the model lacks.
        """
        if global_pool is not None:
            self.set_pool(global_pool)
        self.num_classes = num_classes
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        for parameter in self.head.parameters():
            nn.init.zeros_(parameter)

    def get_classifier(self) -> nn.Module:
        return self.head

    def forward_features(self, x: Tensor) -> Tensor:
        """Map images, (B, 3, S, S), normalised as in ``pretrained_cfg``, to the representation, (B, T, D)."""
        if self.representation == "output":
            return self.forward_blocks(self.encode(x))[0]
        return self.norm_mean(self.ffn_outputs(self.encode(x)), normalisation=self.normalisation)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map features to logits, (B, num_classes), or pooled features, (B, D), with ``pre_logits`` or no head."""
        first = 0 if self.global_pool == "mean" else self.num_extra_tokens
        pooled = x[:, 0] if self.global_pool == "token" else x[:, first:].mean(dim=1)
        return pooled if pre_logits else self.head(pooled)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.checkpoint_activations(enable)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load an exported student's tensors, or this model's; checked as in :func:`load_student`, strict or not.

        Raises:
            InputError: The file is too old to have sizes, or its tensors do not fit them.
            ValueError: The pooling asked for needs a CLS token that the file's model lacks.
        """
        tensors = dict(state_dict)
        stored = tensors.pop(CONFIG_TENSOR, None)
        if stored is None:
            raise InputError(
                f"no tensor {CONFIG_TENSOR}: not a file of recipes/export_student.py, or from an old version"
            )
        try:
            sizes, headline = parse_config_tensor(stored)
        except ValueError as error:
            raise InputError(f"{CONFIG_TENSOR}: unusable sizes ({reason(error)})") from error
        head = {name: tensors.pop(name) for name in list(tensors) if name.startswith("head.")}
        self._become(*check_student(CONFIG_TENSOR, sizes, tensors))
        self.set_features(headline)
        own_head = {f"head.{name}": tensor for name, tensor in self.head.state_dict().items()}
        head = own_head | head
        check_tensors(CONFIG_TENSOR, {name: tuple(tensor.shape) for name, tensor in own_head.items()}, head)
        tensors |= head
        tensors[CONFIG_TENSOR] = getattr(self, CONFIG_TENSOR)
        return super().load_state_dict(tensors, strict, assign)

    def _become(self, encoder_config: StoredEncoderConfig, student_config: StudentConfig) -> Self:
        """Change to other sizes."""
        if (encoder_config, student_config) != (self.encoder.config, self.config):
            asked = self.asked_pool, self.asked_representation
            TimmStudent.__init__(self, encoder_config, student_config, self.num_classes, *asked)
        return self


def pretrained_cfg(config: StoredEncoderConfig) -> dict[str, Any]:
    """Return the preprocessing for timm's ``resolve_data_config``."""
    return {
        "architecture": "d2v2_student",
        "input_size": (config.in_chans, *height_and_width(config.image_size)),
        "fixed_input_size": True,
        "interpolation": config.interpolation,
        "crop_pct": 1.0,
        "mean": config.image_mean,
        "std": config.image_std,
        "num_classes": 0,
        "first_conv": "encoder.local_encoder.proj" if isinstance(config, ImageEncoderConfig) else None,
        "classifier": "head",
    }


default_cfgs = generate_default_cfgs({"d2v2_student": pretrained_cfg(PAPER_ENCODER)})


@register_model
def d2v2_student(pretrained: bool = False, **kwargs: Any) -> TimmStudent:
    """Build the paper's student; loading a file changes its sizes, see :class:`TimmStudent`."""
    not_ours: Any = ("in_chans", "img_size")  # timm's defaults; the file has its own
    return build_model_with_cfg(TimmStudent, "d2v2_student", pretrained, kwargs_filter=not_ours, **kwargs)
