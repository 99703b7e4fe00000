"""How training ends badly, in words: numbers that are none, a device that is lost."""

from __future__ import annotations

from dataclasses import dataclass

from lora.optim.guard import GuardState
from lora.shaders.choice import say_once
from lora.shaders.errors import LoraError, is_lost
from lora.training.metrics import Metrics


class DeviceLostError(LoraError):
    """The device is gone: what it held is lost, what is on disk is not."""


class DeviceFullError(DeviceLostError):
    """It has no memory left: what it holds may still be read."""


@dataclass(frozen=True)
class Culprit:
    """The first tensor that went non-finite in a step.

    Attributes:
        kernel: name of its template.
        label: of the launch; the layer stands in it.
        tensor: the kernel's name for what it wrote.
        shape: of the rows in use.
        n_bad: values that are not finite.
        largest: by magnitude, of the finite numbers that the kernel read.
        bad_inputs: the kernel's names for what it read that was not finite already: the adapter
            or a weight, since no kernel before it wrote such a number.
    """

    kernel: str
    label: str
    tensor: str
    shape: tuple[int, ...]
    n_bad: int
    largest: float
    bad_inputs: tuple[str, ...] = ()

    def __str__(self) -> str:
        sizes = " × ".join(map(str, self.shape))
        already = f", as is some of what it read ({', '.join(self.bad_inputs)})"
        return (
            f"{self.label} (the kernel {self.kernel}), whose {self.tensor} [{sizes}] has "
            f"{self.n_bad:,} values that are not finite{already if self.bad_inputs else ''}; the "
            f"largest finite one that it read is {self.largest:.3g}"
        )


class NotFiniteError(LoraError):
    """Several steps in a row had no finite loss or gradient; none of them changed the adapter.

    Attributes:
        first: of those steps, counted from 1.
        culprit: where it began; None where the step, run again, had finite numbers only.
    """

    def __init__(self, first: int, last: Metrics, precision: str, culprit: Culprit | None) -> None:
        self.first, self.culprit = first, culprit
        what = (
            f"Steps {first} to {last.step}: the loss or the gradient's norm was not finite (at "
            f"last {last.loss} and {last.grad_norm}); the adapter stays as step {first - 1} left "
            "it. "
        )
        where = (
            f"It begins in {culprit}. "
            if culprit is not None
            else f"Step {first}, run again, had finite numbers only: the driver or its memory may "
            "be at fault. "
        )
        super().__init__(f"{what}{where}{_advice(precision)}")


def _advice(precision: str) -> str:
    """What to try where numbers are not finite."""
    halves = "set train.precision: f32 (f16 ends at 65504), " if precision == "f16" else ""
    return f"Lower train.learning_rate, {halves}or look for broken rows in the data."


class StepWatch:
    """Says what is odd about steps as their results come in, each kind of it once.

    Args:
        precision: of the run.
    """

    def __init__(self, precision: str) -> None:
        self._precision = precision
        self._counted, self._skipped = 0, 0
        self._said_zero = False

    def halts(self, metrics: Metrics) -> bool:
        """Counts a step; whether it is the one after which the device does no more."""
        if metrics.skipped:
            self._skipped += 1
            if self._skipped == 1:
                tried = ", with any loss scale" if metrics.retried else ""
                say_once(
                    f"Step {metrics.step}: the loss is {metrics.loss:g} and the gradient's norm "
                    f"{metrics.grad_norm:g}{tried}: the adapter stays as it was. Steps like it "
                    "are counted (metrics.jsonl); after "
                    f"{GuardState.MOST_IN_A_ROW} in a row the run ends."
                )
            return metrics.in_a_row == GuardState.MOST_IN_A_ROW
        self._counted += 1
        if metrics.grad_norm == 0.0 and not self._said_zero:
            self._said_zero = True
            say_once(
                f"Step {metrics.step}: the gradient is exactly 0, so that nothing is learned from "
                "it: look at what is trained (lora data CONFIG)."
            )
        return False

    def end(self) -> None:
        """After the last step.

        Raises:
            LoraError: no step counted.
        """
        if self._skipped and not self._counted:
            raise LoraError(
                f"None of the {self._skipped} steps had a finite loss and gradient: nothing was "
                f"trained. {_advice(self._precision)} (lora debug-nan CONFIG says where it begins.)"
            )


LARGE = 1e3  # a parameter of an adapter that works lies far below


def warn_of_growth(largest: float) -> None:
    """Says once that an adapter has grown beyond what any that works has.

    Args:
        largest: by magnitude, of its parameters.
    """
    if largest > LARGE:
        say_once(
            f"The adapter's largest parameter is {largest:.3g}: it grows without bound. Lower "
            "train.learning_rate."
        )


def device_ended(error: Exception, step: int, name: str, *, alone: bool = True) -> LoraError:
    """What became of the device, what likely caused it, and which setting to change.

    Args:
        error: the implementation's, or that of its memory; one that says it already comes back.
        step: that was done last, or is under way.
        name: of the device.
        alone: whether one process trains; with several none goes on by itself.
    """
    if isinstance(error, DeviceLostError):
        return error
    reason = str(error).strip().splitlines()
    told = next((line.strip() for line in reversed(reason) if line.strip()), "no reason given")
    if "memory" in str(error).lower():
        return DeviceFullError(
            f"After step {step}: {name} has no memory left ({told}). Lower train.batch_size or "
            "data.max_length, set train.recompute: on, or close what else uses the GPU."
        )
    if is_lost(error):
        onward = "train.on_device_loss: retry goes on by itself." if alone else "--resume goes on."
        return DeviceLostError(
            f"After step {step}: {name} was lost ({told}). Likely a driver's watchdog ended work "
            "that took too long: set train.max_submission_seconds (0.1, say), or lower "
            "train.batch_size or data.max_length; or the driver was reset, or out of memory. "
            f"{onward}"
        )
    return LoraError(f"After step {step}: {name} refused what it was given ({told}).")
