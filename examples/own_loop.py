"""A training loop of one's own: when to evaluate, which rate, when to stop.

    python examples/own_loop.py configs/quickstart.yaml --output runs/own-loop

`session.steps` runs steps and nothing else; where `pause` holds it gives None, with the device at
rest. Here the rate is halved whenever the evaluation gets no better, as PyTorch's
ReduceLROnPlateau does, and the best adapter is saved.
"""

from __future__ import annotations

import argparse
import math

from lora import TrainingSession


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config")
    parser.add_argument("--output", default="runs/own-loop")
    parser.add_argument("--every", type=int, default=10, help="steps between evaluations")
    parser.add_argument("--least-rate", type=float, default=1e-5)
    given = parser.parse_args()
    with TrainingSession.from_config(given.config) as session:
        session.learning_rate = session.config.train.learning_rate
        best = math.inf
        for metrics in session.steps(pause=lambda: session.steps_done % given.every == 0):
            if metrics is not None:
                print(f"step {metrics.step}: loss {metrics.loss:.4f}, {metrics.seconds:.2f} s")
                continue
            result = session.evaluate()
            print(f"step {session.steps_done}: eval loss {result.loss:.4f}")
            if result.loss < best:
                best = result.loss
                session.save(given.output)
            else:
                session.learning_rate /= 2
                print(f"the rate is {session.learning_rate:.2g} now")
            if session.learning_rate < given.least_rate:
                break
        print(f"best eval loss {best:.4f}, in {given.output}")


if __name__ == "__main__":
    main()
