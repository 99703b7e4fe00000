"""Trains on rows that a script makes, and asks the adapter something.

    python examples/own_data.py configs/quickstart.yaml --output runs/own-data

The config says everything but the rows: model, adapter, steps. `examples` takes any iterable of
rows; one without a length (a generator) is streamed, and needs train.steps.
"""

from __future__ import annotations

import argparse

from lora import TrainingSession


def rows() -> list[dict[str, object]]:
    """Sums as pairs of prompt and completion; {"messages": [...]} would be chats."""
    return [
        {"prompt": f"{a} + {b} =", "completion": f" {a + b}"} for a in range(8) for b in range(8)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config")
    parser.add_argument("--output", default="runs/own-data")
    parser.add_argument("--steps", type=int, default=20)
    given = parser.parse_args()
    overrides = [f"train.steps={given.steps}", "data.eval=null", "data.format=auto"]
    with TrainingSession.from_config(given.config, overrides, examples=rows()) as session:
        for metrics in session.train():
            print(f"step {metrics.step}: loss {metrics.loss:.4f}")
        session.save(given.output)  # a PEFT adapter directory
        print(repr(session.generate("3 + 4 =", max_tokens=4)))


if __name__ == "__main__":
    main()
