"""How long a data set takes until the first step can begin, and what memory it adds.

    python benchmarks/data.py --model models/SmolLM2-135M-Instruct.Q4_1.gguf [--rows 1000000]

Writes completions of 37 tokens and one-turn chats of 68 (with SmolLM2's system message), and starts
three times on each: the first start tokenizes, the second reads what was kept, the third packs it.
A start is a process of its own, from the tokenizer's opening to the first micro-batch. Its memory
is what it has at most beyond what it had before the data, beside what the pool's processes have.
CPU seconds are of all processes: on a machine that others use they say more than the clock does.
Prints a line of JSON a start. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

TEXT = (
    "the of and to in is that it was for on are as with his they be at one have this from or had "
    "by hot but some what there we can out other were all your when up use word how said an each "
    "she which do their time if will way about many then them would write like so these her long "
    "make thing see him two has look more day could go come did my sound no most number who over"
)
KINDS = {"completion": (24, 11), "chat": (24, 12)}  # words of the question and of the answer


def write_rows(path: Path, kind: str, n_rows: int) -> None:
    """Writes a JSONL file of one kind."""
    draw, words = random.Random(0), TEXT.split()
    asked, answered = KINDS[kind]
    with open(path, "w") as file:
        for _ in range(n_rows):
            question = " ".join(draw.choices(words, k=asked)) + "\n"
            answer = " ".join(draw.choices(words, k=answered))
            if kind == "completion":
                row: dict[str, object] = {"prompt": question, "completion": answer}
            else:
                row = {
                    "messages": [
                        {"role": "user", "content": question.strip()},
                        {"role": "assistant", "content": answer},
                    ]
                }
            file.write(json.dumps(row) + "\n")


def memory(name: str) -> float:
    """MiB of this process, by the name in Linux's /proc: VmRSS now, VmHWM at most so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) / 1024


def start(model: str, data: str, packing: bool) -> None:
    """Loads a data set as a session does, and prints what that took; in a process of its own."""
    import resource  # as /proc, Linux's

    from lora.config.data_section import DataConfig
    from lora.data.loading import DataSets
    from lora.data.order import DataStream
    from lora.data.pool import n_processes
    from lora.forward.gguf.file import GGUFFile
    from lora.forward.text.tokenizer import Tokenizer

    settings = DataConfig(train=data, packing=packing, max_length=512)
    began = time.perf_counter()
    tokenizer = Tokenizer.from_gguf(GGUFFile(model))
    before = memory("VmRSS")
    examples, summary = DataSets(settings, tokenizer).examples("train")
    loaded = time.perf_counter() - began
    stream = DataStream(examples, batch_size=8, packing=packing, max_length=512)
    next(stream)
    # The memory of those that have ended; of this process itself it would count whoever started it.
    who = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    own, children = map(resource.getrusage, who)
    cpu_seconds = sum(one.ru_utime + one.ru_stime for one in (own, children))
    values = {
        "rows": summary.n_rows,
        "tokens_a_row": round(summary.n_tokens / summary.n_examples, 1),
        "packing": packing,
        "packing_efficiency": stream.packing_efficiency,
        "processes": n_processes(),
        "seconds_to_load": round(loaded, 2),
        "seconds_to_first_batch": round(time.perf_counter() - began, 2),
        "cpu_seconds": round(cpu_seconds, 1),
        "added_mib": round(memory("VmHWM") - before),
        "mib_of_each_process": round(children.ru_maxrss / 1024),
        "load_average": os.getloadavg()[0],
    }
    print(json.dumps(values), flush=True)


def main() -> None:
    """The whole measurement, or one start of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a GGUF file with a tokenizer")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--folder", type=Path, help="for rows and cache; default: a temporary one")
    parser.add_argument("--start", metavar="FILE", help=argparse.SUPPRESS)
    parser.add_argument("--packing", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.start:
        start(given.model, given.start, given.packing)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, "XDG_CACHE_HOME": str(folder / "cache")}
        for kind in given.kinds:
            path = folder / f"{kind}-{given.rows}.jsonl"
            if not path.exists():
                write_rows(path, kind, given.rows)
            for name, options in (("first", []), ("second", []), ("packed", ["--packing"])):
                print(f"{kind}, {name} start: ", end="", flush=True)
                command = [sys.executable, __file__, "--model", given.model, "--start", str(path)]
                subprocess.run([*command, *options], env=environment, check=True)


if __name__ == "__main__":
    main()
