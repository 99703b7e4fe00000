"""Gradient clipping and AdamW."""

import numpy as np

BETAS = (0.9, 0.999)
EPSILON = 1e-8


def clip_reference(gradient: np.ndarray, max_norm: float | None) -> tuple[float, float]:
    """The norm before clipping, and the factor of torch.nn.utils.clip_grad_norm_."""
    norm = float(np.sqrt((gradient.astype(np.float64) ** 2).sum()))
    return norm, 1.0 if max_norm is None else min(1.0, max_norm / (norm + 1e-6))


class AdamWReference:
    """Loshchilov & Hutter 2019, algorithm 2, in float64."""

    def __init__(self, parameters: np.ndarray, weight_decay: float) -> None:
        self.p = parameters.astype(np.float64)
        self.m = np.zeros_like(self.p)
        self.v = np.zeros_like(self.p)
        self.t = 0
        self.weight_decay = weight_decay

    def step(self, gradient: np.ndarray, learning_rate: float) -> None:
        """One step with a gradient as large as the parameters."""
        g = gradient.astype(np.float64)
        self.t += 1
        self.p *= 1 - learning_rate * self.weight_decay
        self.m = BETAS[0] * self.m + (1 - BETAS[0]) * g
        self.v = BETAS[1] * self.v + (1 - BETAS[1]) * g * g
        m_hat = self.m / (1 - BETAS[0] ** self.t)
        v_hat = self.v / (1 - BETAS[1] ** self.t)
        self.p -= learning_rate * m_hat / (np.sqrt(v_hat) + EPSILON)


class GuardReference:
    """Which steps count, and the loss scale, as `lora.optim.guard.step_guard` decides them.

    The scale as torch.amp.GradScaler has it: halved where a step is skipped, doubled after so many
    that counted, between two limits. Where the loss is finite it falls faster, by 2, 4, 16, … for
    the tries of one step, and as long as it can fall the step is held in place of skipped. Where
    nothing helped it is again what it was.

    Args:
        scaling: begin, growth_interval, least and most; None where the loss is not scaled.
        most_in_a_row: skipped steps after which none counts any more.
    """

    def __init__(self, scaling: tuple[float, int, float, float] | None, most_in_a_row: int) -> None:
        self.scaling, self.most_in_a_row = scaling, most_in_a_row
        self.scale = 1.0 if scaling is None else scaling[0]
        self.first = self.scale
        self.good = self.in_a_row = self.skipped = self.overflows = 0
        self.held = False

    def begin(self, again: bool) -> None:
        """A step begins, or the one that was held; as `scaled_weight` where the loss is scaled."""
        if again:
            self.held = False
        elif not self.held:
            self.overflows, self.first = 0, self.scale

    def step(self, loss: float, norm: float, max_norm: float | None) -> list[float]:
        """The eleven values of the state after a step.

        Args:
            loss: of the step.
            norm: of the gradient as it lies in the buffers, `scale` times too large.
        """
        norm /= self.scale
        factor = (1.0 if max_norm is None else min(1.0, max_norm / (norm + 1e-6))) / self.scale
        halted = self.held or self.in_a_row >= self.most_in_a_row
        counts = bool(np.isfinite(loss) and np.isfinite(norm)) and not halted
        _, interval, least, most = self.scaling or (1.0, 0, 1.0, 1.0)
        if counts:
            self.good, self.in_a_row, self.overflows = self.good + 1, 0, 0
            if self.scaling is not None and self.good >= interval:
                self.scale, self.good = min(2 * self.scale, most), 0
        elif not halted:
            self.held = bool(np.isfinite(loss)) and self.scaling is not None and self.scale > least
            self.good = 0
            if self.held:
                self.scale = max(self.scale / 2.0 ** (2 ** min(self.overflows, 6)), least)
                self.overflows += 1
            else:
                self.scale = self.first if self.overflows else max(self.scale / 2, least)
                self.overflows = 0
                self.in_a_row, self.skipped = self.in_a_row + 1, self.skipped + 1
        return [
            norm, factor, float(counts), 0.0, self.scale, self.good, self.in_a_row, self.skipped,
            self.overflows, float(self.held), self.first,
        ]  # fmt: skip
