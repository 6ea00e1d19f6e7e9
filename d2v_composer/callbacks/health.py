"""Measure a run's health, and warn of problems.

Shapes: B samples, T tokens, D channels.
"""

import logging
import math
from collections.abc import Iterator, Mapping

import torch
from composer.core import Callback, Event, State, Time, TimeUnit
from composer.loggers import Logger
from composer.utils import dist
from torch import Tensor

from d2v_composer.callbacks.trainer_state import due_every, loss_scale
from d2v_composer.evaluation.run_log import HEALTH_STATES
from d2v_composer.models.features import mean_over_time
from d2v_composer.models.provenance import Record
from d2v_composer.objectives.objective import Regression
from d2v_composer.objectives.tokens import regression_loss

# Below this share of the target's variance, the prediction counts as the same for all inputs.
COLLAPSED_SHARE = 0.01
# Above this ratio to its lowest mean, the loss counts as diverging.
DIVERGED_RATIO = 1.5

log = logging.getLogger(__name__)


def variance_over_inputs(x_BTD: Tensor, padding_mask: Tensor | None) -> Tensor:
    """Return the variance of x over the batch, a scalar, averaged over channels and tokens.

    Args:
        x_BTD: A prediction or a target, (B, T, D).
        padding_mask: (B, T) bool, True for padding; tokens that are padding in any sample are left out.
    """
    mask = None if padding_mask is None else padding_mask.any(dim=0, keepdim=True)
    return mean_over_time(x_BTD.var(dim=0, keepdim=True), padding_mask=mask).mean()


class Health(Callback):
    """Measure the model's prediction for rank 0's last microbatch, and warn of problems.

    Logged with the prefix ``health/``:

    - ``prediction_variance`` and ``target_variance``: variance over the samples, averaged over tokens and channels;
    - ``prediction_error``: mean squared error;
    - ``collapse``: 1 if the prediction's variance is below 1 % of the target's variance, else 0;
    - ``dead``: 1 if, after ``grace``, the mean squared error is not below the target's variance, else 0;
    - ``diverging``: 1 if the mean loss since the last measurement is over 1.5 times the lowest earlier mean, else 0;
    - ``non_finite``: 1 if the loss or one of the first three numbers is infinite or NaN, else 0;
    - ``scaler_skips``: 1 if the loss scale has fallen since the last measurement, else 0.

    When one of the last five numbers changes from 0 to 1, a warning is logged.

    The model must return a :class:`~d2v_composer.objectives.objective.Regression`, or a dict whose first value is one;
    for other models, override :meth:`regression`.

    Args:
        interval: Time between measurements, a Composer time string.
        grace: Time before which ``dead`` is 0, a Composer time string; '0.2dur' is a fifth of the run.

    Example:
        >>> from d2v_composer.callbacks import Health
        >>> health = Health(interval="500ba", grace="0.1dur")  # Trainer(model, callbacks=[health])
    """

    def __init__(self, interval: str = "100ba", grace: str = "0.2dur") -> None:
        self.is_due = due_every(interval)
        self.grace = Time.from_timestring(grace)
        self.losses: list[float] = []
        self.lowest_loss = math.inf
        self.scale = 0.0
        self.present: set[str] = set()
        self.microbatch: object = None

    def regression(self, outputs: object, batch: object) -> Regression:
        """Return the prediction and the target of the last microbatch, on the model's device.

        Args:
            outputs: Result of the model's ``forward`` for the microbatch.
            batch: The microbatch, on the model's device.

        Raises:
            TypeError: The outputs are neither a Regression nor a dict of regressions.
        """
        if isinstance(outputs, Mapping):
            outputs = next(iter(outputs.values()), None)
        if not isinstance(outputs, Regression):
            raise TypeError(f"Health: the model must return one Regression or several, got {type(outputs).__name__}")
        return outputs

    def after_forward(self, state: State, logger: Logger) -> None:
        # On the device, with the inputs of the outputs. At BATCH_END state.batch is the whole batch, on the host.
        self.microbatch = state.batch

    def batch_end(self, state: State, logger: Logger) -> None:
        self.losses.append((state.total_loss_dict or {}).get("loss/train/total", math.nan))
        if self.is_due(state, Event.BATCH_END):
            self.measure(state, logger)
        self.microbatch = None

    def state_dict(self) -> Record:
        return {"lowest_loss": self.lowest_loss}

    def load_state_dict(self, state: Record) -> None:
        self.lowest_loss = state["lowest_loss"]

    @torch.no_grad()
    def measure(self, state: State, logger: Logger) -> None:
        """Measure and log the numbers, and warn of each bad state that has begun since the last measurement."""
        metrics = self.compare(self.regression(state.outputs, self.microbatch))
        values = {name: value.item() for name, value in metrics.items()}
        loss = sum(self.losses) / len(self.losses)
        self.losses = []
        present = dict(self.diagnose(values, loss, state))
        if math.isfinite(loss):
            self.lowest_loss = min(self.lowest_loss, loss)
        values |= {name: float(name in present) for name in HEALTH_STATES}
        logger.log_metrics({f"health/{name}": value for name, value in values.items()})
        begun = present.keys() - self.present if dist.get_global_rank() == 0 else ()
        for name in begun:
            log.warning("health: %s at batch %d: %s", name, int(state.timestamp.batch), present[name])
        self.present = set(present)

    def compare(self, outputs: Regression) -> dict[str, Tensor]:
        """Return name → scalar: the mean squared error and, for more than one sample, the variances."""
        prediction, target = outputs.prediction.float(), outputs.target.float()
        error = regression_loss(Regression(prediction, target, padding_mask=outputs.padding_mask))
        return {"prediction_error": error} | {
            f"{name}_variance": variance_over_inputs(x if x.ndim == 3 else x[:, None], outputs.padding_mask)
            for name, x in {"prediction": prediction, "target": target}.items()
            if len(x) > 1  # one input has no variance
        }

    def diagnose(self, values: dict[str, float], loss: float, state: State) -> Iterator[tuple[str, str]]:
        """Yield the name and the warning's text of each bad state that the run is in."""
        prediction, target = (values.get(f"{name}_variance", math.nan) for name in ("prediction", "target"))
        error = values["prediction_error"]
        if prediction < COLLAPSED_SHARE * target:
            yield (
                "collapse",
                f"the prediction's variance over the microbatch is {prediction:.2g}, but the target's is {target:.2g}",
            )
        in_parts = self.grace.unit == TimeUnit.DURATION
        elapsed = state.get_elapsed_duration() if in_parts else state.timestamp.get(self.grace.unit)
        if math.isfinite(error) and error >= target and elapsed is not None and elapsed >= self.grace:
            yield "dead", f"the mean squared error {error:.4g} is no better than a constant prediction's, {target:.4g}"
        if math.isfinite(loss) and loss > DIVERGED_RATIO * self.lowest_loss:
            yield (
                "diverging",
                f"the mean loss {loss:.4g} exceeds {DIVERGED_RATIO} times its lowest value yet, {self.lowest_loss:.4g}",
            )
        if not_finite := [name for name, value in {"loss": loss, **values}.items() if not math.isfinite(value)]:
            yield "non_finite", f"infinite or NaN: {', '.join(not_finite)}"
        before, self.scale = self.scale, loss_scale(state)
        if self.scale < before:
            yield "scaler_skips", f"the loss scale fell from {before:g} to {self.scale:g}"
