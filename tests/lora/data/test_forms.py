"""Files of every form, directories and names: the same rows come out, and what is wrong is said."""

from __future__ import annotations

import csv
import gzip
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest

from lora.config.data_section import SourceConfig
from lora.data.examples import Examples
from lora.data.loading import DataSets, load_examples
from lora.data.sources import is_file_name, open_source
from lora.shaders.errors import InputError
from tests.support.fake_tokenizer import FakeTokenizer, assistant, settings, user

ROWS = [
    {"instruction": "Say when.", "input": "", "output": "2026-11-21"},
    {"instruction": "Say, \"hm\"", "input": "a\nb", "output": "007"},
    {"instruction": "Grüße", "input": "x", "output": "NA"},
]  # fmt: skip


def texts(source: Any, **values: Any) -> list[str]:
    examples, _ = load_examples(settings(train=source, **values), FakeTokenizer())
    return [FakeTokenizer().decode(example.ids.tolist()) for example in examples]


def refusal(source: Any, **values: Any) -> str:
    with pytest.raises(InputError) as caught:
        load_examples(settings(train=source, **values), FakeTokenizer())
    return str(caught.value)


def lines(rows: Sequence[Any]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def table(path: Path, delimiter: str, rows: Sequence[dict[str, str]] = ROWS) -> None:
    with open(path, "w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)


def write(path: Path) -> str:
    """Writes ROWS in the form that a file's name says."""
    name = path.name
    if name.endswith(".gz"):
        inner = Path(write(path.with_suffix("")))
        path.write_bytes(gzip.compress(inner.read_bytes()))
    elif name.endswith(".zst"):
        inner = Path(write(path.with_suffix("")))
        path.write_bytes(pa.compress(inner.read_bytes(), "zstd", asbytes=True))
    elif name.endswith((".csv", ".tsv")):
        table(path, "," if name.endswith(".csv") else "\t")
    elif name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    elif name.endswith(".arrow"):
        rows = pa.Table.from_pylist(ROWS)
        maker = pa.ipc.new_stream if "stream" in name else pa.ipc.new_file
        with pa.OSFile(str(path), "wb") as file, maker(file, rows.schema) as writer:
            writer.write_table(rows)
    elif name.endswith(".json"):
        path.write_text(json.dumps(ROWS, indent=2 if "indented" in name else None))
    else:
        path.write_bytes(lines(ROWS))
    return str(path)


@pytest.mark.parametrize(
    "name",
    [
        "a.jsonl", "a.ndjson", "a.json", "indented.json", "a.csv", "a.tsv", "a.parquet",
        "file.arrow", "stream.arrow", "a.jsonl.gz", "a.json.zst", "a.csv.gz", "a.parquet.zst",
        "a.data",
    ],
)  # fmt: skip
def test_every_form_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    """No type is guessed: dates, leading zeros and NA stay what they are."""
    path = write(tmp_path / name)
    assert texts(path) == texts(write(tmp_path / "same.jsonl"))
    assert "2026-11-21" in texts(path)[0] and "007" in texts(path)[1] and "NA" in texts(path)[2]


def test_places_are_found_in_every_form(tmp_path: Path) -> None:
    wrong = [*ROWS[:2], {"instruction": 3, "output": "x"}]
    array = tmp_path / "a.json"
    array.write_text(json.dumps(wrong))
    assert refusal(str(array)) == f"{array}, item 3: instruction is 3; it must be a string."
    parquet = tmp_path / "a.parquet"
    rows = [{"text": "a"}, {"text": "b"}, {"text": None}]
    pq.write_table(pa.Table.from_pylist(rows), parquet)
    assert refusal(str(parquet)).startswith(f"{parquet}, row 2: lacks text, which the format text")
    spread = tmp_path / "a.csv"  # the second row begins in line 3 of the file and ends in line 4
    spread.write_text('text,weight\nx,1\n"a\nb",1\ny,7\n')
    assert refusal(str(spread)) == (
        f"{spread}, line 5: weight is 7; a weight is 0 (not trained) or 1; others are not "
        "supported."
    )


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", "a,b\n1\n", ", line 2: has 1 fields, but the first line names 2 columns."),
        ("a.csv", "a,a\n1,2\n", ", line 1: names the column 'a' twice."),
        ("a.csv", 'a,b\n"x,1\n', ", line 2: not CSV (unexpected end of data)."),
        ("a.csv", "", ": holds no rows."),
        ("a.json", "[]", ": holds no rows."),
        ("a.json", '[{"text": "a"}, {"text"', ", item 2: not JSON ("),
        ("a.json", '[{"text": "a"}] x', ": something stands behind the array's end."),
        ("a.json", "[1, 2]", ", item 1: got 1; each row is an object with columns."),
        ("a.json", '{\n "text": "a"\n}', ", line 1: not JSON ("),
        ("a.parquet", "hello", ": not what .parquet says ("),
        ("a.arrow", "hello", ": not what .arrow says ("),
        ("a.jsonl.gz", "hello", ": not what .gz says ("),
        ("a.jsonl.zst", "hello", ": cannot be read ("),
        ("a.xlsx", "hello", ": its ending says nothing about what it holds; known are .jsonl"),
        ("a.txt", "\n \n", ": holds no rows."),
    ],
)
def test_files_that_are_not_what_they_say(
    tmp_path: Path, name: str, content: str, words: str
) -> None:
    path = tmp_path / name
    path.write_text(content)
    assert refusal(str(path)).startswith(f"{path}{words}")


def test_what_is_no_data_set_is_said_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is asked of the network for a missing file or a URL, nor anything twice."""
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for name in ("nowhere.csv", "data/nowhere.parquet", str(tmp_path / "x"), "./x", "a/b/c"):
        assert refusal(name) == f"{name}: there is no such file (data.train, data.eval)."
    for url in ("https://example.org/a.jsonl", "s3://bucket/a.jsonl", "hf://datasets/a/b"):
        assert refusal(url) == (
            f"{url}: is a URL, and nothing is fetched from there; download it, and name the file."
        )


def test_a_hub_that_cannot_be_reached_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked = []

    def dataset_info(self: object, name: str, timeout: float) -> None:
        asked.append(name)
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
    started = time.monotonic()
    message = refusal("nobody/nothing")
    assert message.endswith("the hub can't be reached, and the cache has none of that name.")
    assert asked == ["nobody/nothing"] and time.monotonic() - started < 20


def test_text_by_paragraphs_lines_and_documents(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("One\nstill one.\n\n\n  \nTwo.\nThree\n")
    assert texts(str(path)) == ["One\nstill one.", "Two.\nThree"]  # no EOS: the text goes on
    assert texts(str(path), append_eos="on")[0] == "One\nstill one.<|im_end|>"
    by_line = texts({"path": str(path), "sample_by": "line"})
    assert by_line == ["One", "still one.", "Two.", "Three"]
    whole = texts({"path": str(path), "sample_by": "document"})
    assert whole == [path.read_text() + "<|im_end|>"]
    places = DataSets(settings(train=str(path)), FakeTokenizer()).load("train").places
    assert places[:] == [f"{path}, line 1", f"{path}, line 6"]


def test_a_table_of_semicolons_and_a_weight(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("prompt;completion;weight\na;b, c;1\nd;e;0\n")
    assert texts(str(path)) == ["ab, c<|im_end|>"]


def test_two_sources_of_different_formats(tmp_path: Path) -> None:
    chats, plain = tmp_path / "a.jsonl", tmp_path / "b.txt"
    chats.write_bytes(lines([{"messages": [user("a"), assistant("b")]}]))
    plain.write_text("cc\n\ndd\n\nee")
    examples, summary = load_examples(
        settings(train=[str(chats), {"path": str(plain), "max_samples": 2}]), FakeTokenizer()
    )
    assert [example.row for example in examples] == [0, 1, 2]
    assert [FakeTokenizer().decode(e.ids.tolist()) for e in examples[1:]] == ["cc", "dd"]
    assert summary.data_format == "chat and text" and summary.n_rows == 3


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("train[:20%]", [0, 1]),
        ("train[-2:]", [8, 9]),
        ("train[3:5]+train[80%:]", [3, 4, 8, 9]),
        ("train", list(range(10))),
    ],
)
def test_splits_of_a_file(tmp_path: Path, split: str, expected: list[int]) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines([{"text": f"row {i}"} for i in range(10)]))
    found = texts({"path": str(path), "split": split}, append_eos="off")
    assert found == [f"row {i}" for i in expected]


def test_splits_and_configs_that_are_not_there(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines([{"text": "a"}]))
    one = f"{path}: a file has no "
    assert refusal({"path": str(path), "split": "test"}) == one + "split test; it is all of one " \
        "split, train."  # fmt: skip
    assert refusal({"path": str(path), "config": "en"}).startswith(one + "config en")
    assert refusal({"path": str(path), "split": "train[a:"}).startswith("split: got 'train[a:'; wr")


# Data sets: a directory stands in for the hub; both are resolved by the same call.


@pytest.fixture
def data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    import datasets  # type: ignore[import-untyped]

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    folder = tmp_path / "set"
    (folder / "data").mkdir(parents=True)
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: dates\n  data_files:\n  - split: train\n"
        "    path: data/a-*.jsonl\n  - split: test\n    path: data/b.jsonl\n"
        "- config_name: other\n  data_files: data/b.jsonl\n---\n"
    )
    for number in (1, 2):
        (folder / f"data/a-{number}.jsonl").write_bytes(lines([{"text": "2026-11-21"}] * number))
    (folder / "data/b.jsonl").write_bytes(lines([{"text": "held out"}]))
    return folder


def test_a_data_set_with_configs_and_splits(data_set: Path) -> None:
    source = {"name": str(data_set), "config": "dates"}
    assert texts(source, append_eos="off") == ["2026-11-21"] * 3
    part = {**source, "split": "train[:67%]+test"}
    assert texts(part, append_eos="off") == ["2026-11-21"] * 2 + ["held out"]
    examples, _ = load_examples(settings(eval=source), FakeTokenizer(), "eval")
    assert len(examples) == 1  # the test split
    assert refusal(str(data_set)) == (
        f"{data_set}: name one of its configs with config: ['dates', 'other']."
    )
    assert refusal({**source, "split": "dev"}) == (
        f"{data_set}: the data set has no split dev; it has train, test."
    )


def test_a_data_set_that_was_saved_to_disk(tmp_path: Path) -> None:
    import datasets

    datasets.disable_progress_bars()
    folder = tmp_path / "saved"
    datasets.Dataset.from_list([{"text": "2026-11-21"}]).save_to_disk(str(folder))
    assert texts(str(folder), append_eos="off") == ["2026-11-21"]


def test_a_share_for_evaluation_by_the_seed(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines([{"text": f"{i:02}"} for i in range(40)] + [{"text": ""}]))

    def shares(seed: int) -> tuple[Examples, Examples]:
        data = DataSets(settings(train=str(path), eval_share=0.1), FakeTokenizer(), seed=seed)
        return data.examples("train")[0], data.examples("eval")[0]

    train, held_out = shares(0)
    assert (len(train), len(held_out)) == (36, 4)
    assert sorted([*train.rows, *held_out.rows]) == list(range(40))
    assert [e.index for e in held_out] == [0, 1, 2, 3]
    assert shares(0)[1].rows.tolist() == held_out.rows.tolist() != shares(1)[1].rows.tolist()
    short = tmp_path / "b.jsonl"
    short.write_bytes(lines([{"text": "a"}]))
    with pytest.raises(InputError, match="data.eval_share: 0.5 of 1 rows leaves none to train on"):
        DataSets(settings(train=str(short), eval_share=0.5), FakeTokenizer()).load("train")


def test_what_names_a_file(tmp_path: Path) -> None:
    names = {"a.csv": True, "org/set": False, "set": False, "./set": True, str(tmp_path): False}
    assert {name: is_file_name(name) for name in names} == names


def test_what_would_do_nothing_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv")
    assert refusal({"path": path, "sample_by": "line"}) == (
        f"{path}: sample_by says what a row of plain text is, and this is no plain text; leave it "
        "out."
    )


def test_a_line_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small compressed file can be a line of gigabytes."""
    monkeypatch.setattr("lora.data.readers._MOST_LINE", 1 << 20)
    path = tmp_path / "long.jsonl.gz"
    with gzip.open(path, "wb") as file:
        file.write(b'{"text": "ok"}\n{"text": "' + b"a" * (3 << 20) + b'"}\n')
    source = open_source(SourceConfig(path=str(path)), "train")
    with pytest.raises(InputError, match=r"long\.jsonl\.gz, line 2: longer than 1 MiB"):
        list(source.pieces())


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "txt"])
@pytest.mark.parametrize("packed", ["gz", "zst"])
def test_a_row_without_end_in_a_compressed_file(
    ending: str, packed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused once a row takes more than its bound; many short rows of more in all are read."""
    monkeypatch.setattr("lora.data.readers._MOST_LINE", 1 << 20)
    begin, row, end = {
        "jsonl": (b"", b'{"text": "%s"}\n', b""),
        "json": (b'[{"text": "first"}', b', {"text": "%s"}', b"]"),
        "csv": (b"text\n", b'"%s"\n', b""),
        "txt": (b"", b"%s\n\n", b""),
    }[ending]
    for name, rows in (("many", [b"a" * 1000] * 5000), ("long", [b"a" * (5 << 20)])):
        path = tmp_path / f"{name}.{ending}.{packed}"
        content = begin + b"".join(row % text for text in rows) + end
        if packed == "gz":
            path.write_bytes(gzip.compress(content))
        else:
            with pa.output_stream(str(path), compression="zstd") as file:
                file.write(content)
        source = open_source(SourceConfig(path=str(path)), "train")
        if name == "many":
            assert sum(len(piece.rows) for piece in source.pieces()) in (5000, 5001)
            continue
        with pytest.raises(InputError, match="longer than 1 MiB"):
            list(source.pieces())
