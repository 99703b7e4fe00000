"""Lion, and AdamW with moments of 8 bits."""

from __future__ import annotations

import numpy as np

from lora.checks.references.optim import BETAS, EPSILON
from lora.optim.adamw_8bit import BLOCK, dynamic_codes


class LionReference:
    """Chen et al. 2023, algorithm 2."""

    def __init__(self, parameters: np.ndarray, weight_decay: float) -> None:
        self.p, self.m = parameters.astype(np.float64), np.zeros(parameters.size)
        self.weight_decay = weight_decay

    def step(self, gradient: np.ndarray, rate: np.ndarray | float) -> np.ndarray:
        """One step; returns what the sign was taken of."""
        g = gradient.astype(np.float64)
        update = BETAS[0] * self.m + (1 - BETAS[0]) * g
        self.p = self.p * (1 - rate * self.weight_decay) - rate * np.sign(update)
        self.m = BETAS[1] * self.m + (1 - BETAS[1]) * g
        return update


class AdamW8Reference:
    """Dettmers et al. 2022, as bitsandbytes' blockwise AdamW, in float64 but for the scales."""

    def __init__(self, parameters: np.ndarray, weight_decay: float) -> None:
        self.weight_decay = weight_decay
        self.p, self.n, self.t = parameters.astype(np.float64), parameters.size, 0
        self.tables = [dynamic_codes(signed=s).astype(np.float64) for s in (True, False)]
        self.codes = [np.full(self.n, np.searchsorted(t, 0.0)) for t in self.tables]
        self.scales = [np.zeros(-(-self.n // BLOCK)) for _ in range(2)]

    def moment(self, which: int) -> np.ndarray:
        """What the codes stand for."""
        scales = np.repeat(self.scales[which], BLOCK)[: self.n]
        return self.tables[which][self.codes[which]] * scales

    def step(self, gradient: np.ndarray, rate: np.ndarray | float) -> None:
        """One step."""
        g, self.t = gradient.astype(np.float64), self.t + 1
        m = BETAS[0] * self.moment(0) + (1 - BETAS[0]) * g
        v = BETAS[1] * self.moment(1) + (1 - BETAS[1]) * g * g
        c = np.sqrt(1 - BETAS[1] ** self.t)
        self.p *= 1 - rate * self.weight_decay
        self.p -= rate * c / (1 - BETAS[0] ** self.t) * m / (np.sqrt(v) + c * EPSILON)
        for which, values in enumerate((m, v)):
            self._store(which, values)

    def _store(self, which: int, values: np.ndarray) -> None:
        table = self.tables[which]
        whole = np.zeros(len(self.scales[which]) * BLOCK)
        whole[: self.n] = values
        tops = np.abs(whole).reshape(-1, BLOCK).max(1)
        self.scales[which] = tops.astype(np.float32).astype(np.float64)
        spread = np.repeat(np.where(tops > 0, tops, 1.0), BLOCK)[: self.n]
        normed = values / spread
        codes = np.abs(normed[:, None] - table).argmin(1)
        codes[(values < 0) & (table[codes] >= 0)] -= 1
        if which == 1:
            codes[values > 0] = np.maximum(codes[values > 0], 1)
        self.codes[which] = codes
