"""Is the run healthy? What a loss does not show, and a warning by name when something goes wrong.

Shapes: B images, T time steps, N patches of them, D channels, L layers of the teacher.
"""

import logging
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from composer.core import Callback, Event, State, Time, TimeUnit, get_precision_context
from composer.loggers import Logger
from composer.utils import dist
from torch import Tensor
from torch.nn.functional import cosine_similarity

from d2v_composer.callbacks.trainer_state import due_every, loss_scale, unwrapped
from d2v_composer.models.targets import Regression

__all__ = ["Health", "effective_rank"]

# A prediction that varies so much less than its target over the images of a batch is one for all of them.
COLLAPSED_SHARE = 0.01
# So many times its lowest mean, the loss has not merely been unlucky.
DIVERGED_RATIO = 1.5

STATES = ("collapse", "dead", "diverging", "non_finite", "scaler_skips")

log = logging.getLogger(__name__)


def effective_rank(embeddings_BD: Tensor) -> Tensor:
    """How many directions the embeddings of a batch fill, a scalar from 1 to min(B - 1, D); 0 where all are the same.

    exp of the entropy of the centred singular values' shares (Roy and Vetterli 2007, "The effective rank").
    """
    embeddings = embeddings_BD.float()
    if not embeddings.isfinite().all():
        return embeddings.new_tensor(math.nan)
    centred = embeddings - embeddings.mean(dim=0)
    singular_values = torch.linalg.svdvals(centred)
    total = singular_values.sum()
    # What rounding leaves of a batch of equal images is no direction.
    if total <= 1e-5 * embeddings.norm():
        return total.new_zeros(())
    shares = singular_values / total
    return torch.special.entr(shares).sum().exp()


class Health(Callback):
    """Measure every ``interval`` batches, on rank 0's last microbatch, what the loss does not show; and warn.

    Logged, below ``health/``:

    - ``prediction_variance``, ``target_variance``: over the images, mean of all time steps and channels; the target's
      is what the best prediction that is the same for all images would cost;
    - ``effective_rank`` of the predictions' means over time, see :func:`effective_rank`;
    - ``cosine/cls``, ``cosine/patch``: of prediction and target, mean over images and time steps of the kind;
    - ``cosine/layer_{i}``: of the prediction and each of the teacher's layers by itself, instance-normalised;
    - ``collapse``, ``dead``, ``diverging``, ``non_finite``, ``scaler_skips``: 1 where it is so, else 0.

    A state that begins is logged as a warning: *collapse*, the prediction hardly varies over the images; *dead*, after
    ``grace`` the loss is no better than such a prediction's; *diverging*, the mean loss since the last measurement is
    more than 1.5 times the lowest such mean; *non_finite*, there are infinities or NaN; *scaler_skips*, the loss scaler
    came down, and left out a step each time it did.

    What it needs of a model, in anybody's Composer run: outputs that are a
    :class:`~d2v_composer.models.targets.Regression`, or ``regression`` to make one of them. The layers' cosines are
    there for a model with a method ``layer_cosines(batch, num_images)``, which costs a forward pass of so many
    images: 1 % of the training at most, with the default interval.

    Args:
        interval: Composer time string.
        grace: How long the loss may be as bad as a constant's, a Composer time string: longer than the warm-up;
            '0.2dur' is a fifth of the run.
        regression: (outputs, batch) → prediction and target, where the outputs are not that; of the last microbatch,
            both on the model's device.
        num_extra_tokens: How many time steps in front are not patches; default the model's own number, or 0.
    """

    def __init__(
        self,
        interval: str = "100ba",
        grace: str = "0.2dur",
        regression: Callable[[Any, Any], Regression] | None = None,
        num_extra_tokens: int | None = None,
    ) -> None:
        if regression is not None and not callable(regression):
            raise TypeError(f"regression must be a function, got {regression!r}")
        if num_extra_tokens is not None and (not isinstance(num_extra_tokens, int) or num_extra_tokens < 0):
            raise ValueError(f"num_extra_tokens must be at least 0, got {num_extra_tokens!r}")
        self.is_due = due_every(interval)
        self.grace = Time.from_timestring(grace)
        self.regression = regression
        self.num_extra_tokens = num_extra_tokens
        self.losses: list[float] = []
        self.lowest_loss = math.inf
        self.scale = self.previous_scale = 0.0
        self.present: set[str] = set()
        self.microbatch: Any = None

    def after_forward(self, state: State, logger: Logger) -> None:
        # On the device, and of the outputs' images. At a batch's end Composer gives the whole batch, on the host.
        self.microbatch = state.batch

    def batch_end(self, state: State, logger: Logger) -> None:
        self.losses.append((state.total_loss_dict or {}).get("loss/train/total", math.nan))
        if self.is_due(state, Event.BATCH_END):
            self.measure(state, logger)
        self.microbatch = None

    def state_dict(self) -> dict[str, Any]:
        return {"lowest_loss": self.lowest_loss}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.lowest_loss = state["lowest_loss"]

    @torch.no_grad()
    def measure(self, state: State, logger: Logger) -> None:
        """Measure, log, and warn of what was not so at the last measurement."""
        outputs = state.outputs if self.regression is None else self.regression(state.outputs, self.microbatch)
        assert isinstance(outputs, Regression)
        metrics = self.compare(outputs, self.extra_tokens(state))
        metrics |= self.compare_layers(state, len(outputs.target))
        # One wait for the device, for all of them.
        values = dict(zip(metrics, torch.stack(list(metrics.values())).tolist(), strict=True))
        loss = sum(self.losses) / len(self.losses)
        self.losses = []
        self.previous_scale, self.scale = self.scale, loss_scale(state)
        present = dict(self.diagnose(values, loss, state))
        if math.isfinite(loss):
            self.lowest_loss = min(self.lowest_loss, loss)
        values |= {name: float(name in present) for name in STATES}
        logger.log_metrics({f"health/{name}": value for name, value in values.items()})
        begun = present.keys() - self.present if dist.get_global_rank() == 0 else ()
        for name in begun:
            log.warning("health: %s at batch %d: %s", name, int(state.timestamp.batch), present[name])
        self.present = set(present)

    def extra_tokens(self, state: State) -> int:
        if self.num_extra_tokens is not None:
            return self.num_extra_tokens
        student = getattr(unwrapped(state), "student", None)
        return getattr(student, "num_extra_tokens", 0)

    def compare(self, outputs: Regression, num_extra_tokens: int) -> dict[str, Tensor]:
        """Prediction against target; (B, D) counts as one patch."""
        prediction, target = (
            tensor.float() if tensor.ndim == 3 else tensor.float()[:, None]
            for tensor in (outputs.prediction, outputs.target)
        )
        cosine_BT = cosine_similarity(prediction, target, dim=2)
        num_extra_tokens = 0 if outputs.cls_prediction is not None else num_extra_tokens  # they are dropped there
        metrics = {"cosine/patch": cosine_BT[:, num_extra_tokens:].mean()}
        if num_extra_tokens:
            metrics["cosine/cls"] = cosine_BT[:, 0].mean()
        metrics["effective_rank"] = effective_rank(prediction.mean(dim=1))
        if len(target) > 1:  # one image does not vary
            metrics["prediction_variance"] = prediction.var(dim=0).mean()
            metrics["target_variance"] = target.var(dim=0).mean()
        return metrics

    def compare_layers(self, state: State, num_images: int) -> dict[str, Tensor]:
        """Each of the teacher's layers, in the run's precision; on all ranks, because of FSDP."""
        layer_cosines = getattr(unwrapped(state), "layer_cosines", None)
        if layer_cosines is None:
            return {}
        with get_precision_context(state.precision, state.precision_config):
            return {f"cosine/layer_{i}": each for i, each in enumerate(layer_cosines(self.microbatch, num_images))}

    def diagnose(self, values: dict[str, float], loss: float, state: State) -> Iterator[tuple[str, str]]:
        """The name of each state that the run is in, and in what way."""
        prediction, target = (values.get(f"{name}_variance", math.nan) for name in ("prediction", "target"))
        if prediction < COLLAPSED_SHARE * target:
            yield "collapse", f"over the images the prediction varies by {prediction:.2g}, its target by {target:.2g}"
        if math.isfinite(loss) and loss >= target and self.is_past_grace(state):
            yield "dead", f"the loss {loss:.4g} is no better than {target:.4g}, that of one prediction for all images"
        if math.isfinite(loss) and loss > DIVERGED_RATIO * self.lowest_loss:
            yield "diverging", f"the loss {loss:.4g} is over {DIVERGED_RATIO} times its lowest, {self.lowest_loss:.4g}"
        if not_finite := [name for name, value in {"loss": loss, **values}.items() if not math.isfinite(value)]:
            yield "non_finite", f"not finite: {', '.join(not_finite)}"
        if self.scale < self.previous_scale:
            yield "scaler_skips", f"the loss scaler came down from {self.previous_scale:g} to {self.scale:g}"

    def is_past_grace(self, state: State) -> bool:
        if self.grace.unit == TimeUnit.DURATION:
            elapsed = state.get_elapsed_duration()
            return elapsed is not None and elapsed >= self.grace
        return state.timestamp.get(self.grace.unit) >= self.grace
