"""Trains with several learning rates and ranks, stops the hopeless ones early, and tells the best.

    python examples/sweep.py configs/quickstart.yaml --output runs/sweep --rates 1e-4 1e-3

Each run has its directory, so that `lora report runs/sweep/*` shows them side by side. One device
is shared: what it has compiled serves all.
"""

from __future__ import annotations

import argparse
import itertools

from lora import Listener, Metrics, TrainingSession, load_config, run_training
from lora.shaders.device import Device


class GiveUp(Listener):
    """Ends a run whose loss has left all bounds: `step` may ask for a stop."""

    def __init__(self, above: float) -> None:
        self._above = above

    def step(self, metrics: Metrics) -> bool:
        return metrics.loss > self._above


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config")
    parser.add_argument("--output", default="runs/sweep")
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-4, 3e-4, 1e-3])
    parser.add_argument("--ranks", type=int, nargs="+", default=[8])
    given = parser.parse_args()
    found: dict[str, float] = {}
    plain = load_config(given.config)
    with Device(plain.device, webgpu=plain.webgpu) as device:
        for rate, rank in itertools.product(given.rates, given.ranks):
            output = f"{given.output}/lr{rate:g}-r{rank}"
            config = load_config(
                given.config,
                [f"train.learning_rate={rate}", f"adapter.rank={rank}", f"output={output}"],
            )
            with TrainingSession(config, device=device) as session:
                run_training(session, listeners=[GiveUp(above=20.0)])
                found[output] = session.evaluate().loss
    for output, loss in sorted(found.items(), key=lambda one: one[1]):
        print(f"{loss:.4f}  {output}")


if __name__ == "__main__":
    main()
