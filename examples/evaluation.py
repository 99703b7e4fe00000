"""Scores an adapter against the bare model, on data.eval and on rows of a script.

    python examples/evaluation.py configs/quickstart.yaml --adapter runs/quickstart

`evaluate` gives loss, perplexity, accuracy and exact match; `adapted=False` is the bare model.
"""

from __future__ import annotations

import argparse

from lora import EvalResult, TrainingSession


def show(name: str, result: EvalResult) -> None:
    print(
        f"{name:8} loss {result.loss:.4f}  perplexity {result.perplexity:.3f}  "
        f"accuracy {result.token_accuracy:.1%}  exact {result.n_exact}/{result.n_examples}"
    )
    for part, one in result.sets.items():  # of data.eval as a mapping of names
        show(f"  {part}", one)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config")
    parser.add_argument("--adapter", help="a PEFT directory or a GGUF adapter")
    given = parser.parse_args()
    with TrainingSession.from_config(given.config, train=False) as session:
        show("base", session.evaluate(adapted=False))
        if given.adapter is not None:
            session.load_adapter(given.adapter)
            show("adapter", session.evaluate())
        mine = [{"prompt": "2 + 2 =", "completion": " 4"}]
        show("mine", session.evaluate(mine))


if __name__ == "__main__":
    main()
