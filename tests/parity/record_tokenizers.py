"""Asks llama.cpp again for the ids in tests/forward/text/tokenizer_*.json, whose texts stay.

python -m tests.parity.record_tokenizers
"""

from __future__ import annotations

import json
from pathlib import Path

from tests.parity.llama_cpp import llama_cpp_ids

REPOSITORY = Path(__file__).parents[2]
RECORDS = REPOSITORY / "tests" / "forward" / "text"
RECORDED = {
    "tokenizer_smollm2.json": "SmolLM2-135M-Instruct.Q4_1.gguf",
    "tokenizer_gemma3.json": "gemma-3-270m-q4_k_m.gguf",
}


def record(name: str, texts: list[str]) -> None:
    """Writes the texts with their ids, a line each, so that changes show line by line."""
    ids = llama_cpp_ids(REPOSITORY / "models" / RECORDED[name], texts)
    rows = [json.dumps({"text": text, "ids": row}) for text, row in zip(texts, ids, strict=True)]
    path = RECORDS / name
    path.write_text("[\n" + ",\n".join(rows) + "\n]\n", encoding="utf-8")


if __name__ == "__main__":
    for recorded in RECORDED:
        rows = json.loads((RECORDS / recorded).read_text("utf-8"))
        record(recorded, [row["text"] for row in rows])
