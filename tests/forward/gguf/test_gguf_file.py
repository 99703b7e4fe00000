"""GGUFFile against gguf's own reader, and against every way a file can be damaged."""

from __future__ import annotations

import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora.forward.gguf.file import GGUFFile, part_names
from lora.forward.gguf.header import MAX_ARRAY_VALUES, MAX_ENTRIES, MAX_HEADER_BYTES, MAX_NAME_BYTES
from lora.shaders.errors import InputError
from tests.support.tiny_gguf import write_tiny_llama

TYPES = {
    "weight": "Q4_1",
    "token_embd.weight": "Q8_0",
    "attn_v.weight": "F16",
    "ffn_up.weight": "BF16",
    "ffn_gate.weight": "F32",
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_tiny_llama(path, types=TYPES, n_layers=1)
    return path


def _string(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def _header(*, version: int = 3, tensors: int = 0, keys: int = 0, body: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys) + body


def _tensor_info(
    *, name: str = "x", shape: tuple[int, ...] = (32,), kind: int = 0, offset: int = 0
) -> bytes:
    sizes = struct.pack(f"<{len(shape)}Q", *shape[::-1])
    return _string(name) + struct.pack("<I", len(shape)) + sizes + struct.pack("<IQ", kind, offset)


def _error(tmp_path: Path, content: bytes) -> str:
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        GGUFFile(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_metadata_is_what_ggufs_own_reader_finds(tiny: Path) -> None:
    ours = GGUFFile(tiny)
    theirs = gguf.GGUFReader(tiny)
    expected = {
        key: field.contents() for key, field in theirs.fields.items() if not key.startswith("GGUF.")
    }
    assert ours.metadata == expected
    assert ours.version == 3


def test_tensors_are_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    written = write_tiny_llama(path, types=TYPES)
    tensors = GGUFFile(path).tensors
    assert list(tensors) == list(written)
    for name, values in written.items():
        tensor = tensors[name]
        assert tensor.shape == values.shape
        assert np.asarray(tensor.data).dtype == np.uint8
        assert len(tensor.data) == (values.shape[0] if values.ndim == 2 else 1)
        decoded = gguf.quants.dequantize(np.asarray(tensor.data), tensor.type)
        np.testing.assert_array_equal(decoded.reshape(values.shape), values)
    assert tensors["blk.0.attn_norm.weight"].data.shape == (1, 32 * 4)
    assert tensors["blk.0.attn_q.weight"].data.shape == (32, 20)
    assert tensors["blk.0.ffn_down.weight"].data.shape == (32, 40)
    assert tensors["blk.0.attn_v.weight"].type.name == "F16"


def test_three_dimensions_become_rows(tmp_path: Path) -> None:
    values = np.arange(2 * 3 * 32, dtype=np.float32).reshape(2, 3, 32)
    path = tmp_path / "experts.gguf"
    write_tiny_llama(path, tensors={"experts.weight": values})
    tensor = GGUFFile(path).tensors["experts.weight"]
    assert tensor.shape == (2, 3, 32)
    np.testing.assert_array_equal(np.asarray(tensor.data).view(np.float32), values.reshape(6, 32))


def test_truncation_anywhere_is_an_input_error(tiny: Path, tmp_path: Path) -> None:
    content = tiny.read_bytes()
    gguf_file = GGUFFile(tiny)
    start_of_data = len(content) - sum(t.data.nbytes for t in gguf_file.tensors.values())
    last_of_data = len(content) - 32  # the writer pads the last tensor to 32 bytes
    # Every offset of the header's beginning and of the tensor list, a stride through the rest.
    offsets = {
        *range(0, 600),
        *range(600, start_of_data, 37),
        *range(start_of_data - 700, start_of_data),
        *range(start_of_data, last_of_data, 4001),
        last_of_data,
    }
    path = tmp_path / "cut.gguf"
    for offset in sorted(offsets):
        path.write_bytes(content[:offset])
        with pytest.raises(InputError):
            GGUFFile(path)


# An undamaged read of the file (34 KB, 7 KB of it the header) takes 2 ms and peaks at 35 KB of
# Python objects. The bounds leave room for a busy machine, and none for a damaged count.
FUZZ_SECONDS = 0.5
FUZZ_BYTES = 1 << 18


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bytes], None]:
    """Opens some bytes as a file: that works or is an InputError, at once and in little memory."""
    path = tmp_path_factory.mktemp("fuzz") / "fuzzed.gguf"

    def check(content: bytes) -> None:
        path.write_bytes(content)
        tracemalloc.start()
        started = time.process_time()
        try:
            GGUFFile(path)
        except InputError as error:
            assert len(str(error)) < 2000 + len(str(path))
        finally:
            seconds = time.process_time() - started
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
        assert seconds < FUZZ_SECONDS
        assert peak < FUZZ_BYTES

    return check


@pytest.fixture(scope="module")
def healthy(tiny: Path) -> tuple[bytes, int]:
    """A small file's bytes, and how many of them are its header."""
    content = tiny.read_bytes()
    return content, len(content) - sum(t.data.nbytes for t in GGUFFile(tiny).tensors.values())


anywhere = settings(max_examples=400, deadline=None)  # the time is checked by `fuzzed`


@anywhere
@given(data=st.data())
def test_a_changed_byte_opens_or_is_an_input_error(
    data: st.DataObject, healthy: tuple[bytes, int], fuzzed: Callable[[bytes], None]
) -> None:
    content, n_header = healthy
    damaged = bytearray(content)
    damaged[data.draw(st.integers(0, n_header - 1), "position")] = data.draw(
        st.integers(0, 255), "value"
    )
    fuzzed(bytes(damaged))


@anywhere
@given(data=st.data())
def test_a_changed_number_opens_or_is_an_input_error(
    data: st.DataObject, healthy: tuple[bytes, int], fuzzed: Callable[[bytes], None]
) -> None:
    """Eight bytes at once: lengths and offsets near 2^63 and 2^64, which one byte doesn't make."""
    content, n_header = healthy
    position = data.draw(st.integers(0, n_header - 8), "position")
    extreme = st.sampled_from([0, 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1])
    number = data.draw(extreme | st.integers(0, 2**64 - 1), "number")
    fuzzed(content[:position] + struct.pack("<Q", number) + content[position + 8 :])


@anywhere
@given(data=st.data())
def test_a_cut_opens_or_is_an_input_error(
    data: st.DataObject, healthy: tuple[bytes, int], fuzzed: Callable[[bytes], None]
) -> None:
    content, _ = healthy
    fuzzed(content[: data.draw(st.integers(0, len(content)), "length")])


def test_paths_that_are_no_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="There is no file"):
        GGUFFile(tmp_path / "absent.gguf")
    with pytest.raises(InputError, match="is a directory"):
        GGUFFile(tmp_path)
    assert "is empty" in _error(tmp_path, b"")
    with pytest.raises(InputError, match="not a regular file"):
        GGUFFile("/dev/null")
    with pytest.raises(InputError, match="cannot be read: File name too long"):
        GGUFFile(tmp_path / ("x" * 5000))
    with pytest.raises(InputError, match="no path of a file"):
        GGUFFile("a\0b.gguf")
    (tmp_path / "link.gguf").symlink_to(tmp_path / "gone.gguf")
    with pytest.raises(InputError, match="link to a file that is not there"):
        GGUFFile(tmp_path / "link.gguf")
    with pytest.raises(InputError, match="There is no file"):
        GGUFFile(Path(__file__) / "x.gguf")  # a file where a directory would have to be


def test_not_a_gguf(tmp_path: Path) -> None:
    assert "begins with b'PK" in _error(tmp_path, b"PK\x03\x04" + bytes(100))
    assert "not a GGUF file" in _error(tmp_path, b"GG")


def test_versions(tmp_path: Path) -> None:
    assert "version 1; supported are 2 and 3" in _error(tmp_path, _header(version=1))
    assert "version 9" in _error(tmp_path, _header(version=9))
    big_endian = b"GGUF" + struct.pack(">IQQ", 3, 0, 0)
    assert "big-endian" in _error(tmp_path, big_endian)
    path = tmp_path / "two.gguf"
    path.write_bytes(_header(version=2))
    assert GGUFFile(path).version == 2


def test_counts_that_would_fill_the_memory(tmp_path: Path) -> None:
    started = time.process_time()
    assert "tensors" in _error(tmp_path, _header(tensors=1 << 40))
    assert "metadata keys" in _error(tmp_path, _header(keys=1 << 60))
    array = _string("k") + struct.pack("<IIQ", 9, 8, 1 << 20)
    assert "strings in 'k'" in _error(tmp_path, _header(keys=1, body=array))
    array = _string("k") + struct.pack("<IIQ", 9, 0, MAX_ARRAY_VALUES + 1)
    assert "never read" in _error(tmp_path, _header(keys=1, body=array))
    array = _string("k") + struct.pack("<IIQ", 9, 4, 1 << 20)
    assert "cut short" in _error(tmp_path, _header(keys=1, body=array))
    text = _string("k") + struct.pack("<IQ", 8, 1 << 62)
    assert "cut short" in _error(tmp_path, _header(keys=1, body=text))
    assert time.process_time() - started < 5  # nothing of these sizes was allocated or walked


def test_limits_hold_where_the_file_is_large_enough(tmp_path: Path) -> None:
    """A file of 128 MiB, all holes: every count below would fit into it."""
    path = tmp_path / "holes.gguf"

    def error(header: bytes) -> str:
        with open(path, "wb") as file:
            file.write(header)
            file.truncate(2 * MAX_HEADER_BYTES)
        tracemalloc.start()
        try:
            with pytest.raises(InputError) as caught:
                GGUFFile(path)
            assert tracemalloc.get_traced_memory()[1] < 1 << 20
        finally:
            tracemalloc.stop()
        return str(caught.value)

    assert "tensors" in error(_header(tensors=MAX_ENTRIES + 1))
    assert "metadata keys" in error(_header(keys=MAX_ENTRIES + 1))
    text = _string("k") + struct.pack("<IQ", 8, MAX_HEADER_BYTES)
    assert "'k' reaches past byte 67,108,864" in error(_header(keys=1, body=text))
    key = struct.pack("<Q", MAX_NAME_BYTES + 1)
    assert "key claims a length of 1,025 bytes" in error(_header(keys=1, body=key))
    assert "name claims a length of 1,025 bytes" in error(_header(tensors=1, body=key))
    array = _string("k") + struct.pack("<IIQ", 9, 0, MAX_ARRAY_VALUES + 1)
    assert "never read" in error(_header(keys=1, body=array))
    # Two arrays, each below the limit. The first is 16 KB; without the sum the second is 4 MB.
    arrays = _string("a") + struct.pack("<IIQ", 9, 0, 1 << 14) + bytes(1 << 14)
    arrays += _string("b") + struct.pack("<IIQ", 9, 0, MAX_ARRAY_VALUES - 1)
    assert "the 4,194,303 values of 'b'" in error(_header(keys=2, body=arrays))


def test_damaged_metadata(tmp_path: Path) -> None:
    pair = _string("k") + struct.pack("<IB", 0, 7)
    assert "'k' occurs twice" in _error(tmp_path, _header(keys=2, body=pair * 2))
    unknown = _string("k") + struct.pack("<IB", 77, 7) + bytes(8)
    assert "unknown value type 77" in _error(tmp_path, _header(keys=1, body=unknown))
    nested = _string("k") + struct.pack("<IIQ", 9, 9, 1) + bytes(16)
    assert "list of lists" in _error(tmp_path, _header(keys=1, body=nested))
    broken = _string("k") + struct.pack("<IQ", 8, 2) + b"\xff\xfe"
    assert "not UTF-8" in _error(tmp_path, _header(keys=1, body=broken))
    listed = _string("k") + struct.pack("<IIQQ", 9, 8, 1, 2) + b"\xff\xfe"
    assert "not UTF-8" in _error(tmp_path, _header(keys=1, body=listed))
    name = struct.pack("<Q", 1) + b"\xff" + struct.pack("<IB", 0, 7)
    assert "a metadata key is not UTF-8" in _error(tmp_path, _header(keys=1, body=name))
    name = struct.pack("<Q", 0) + struct.pack("<IB", 0, 7)
    assert "a metadata key is empty" in _error(tmp_path, _header(keys=1, body=name))
    alignment = _string("general.alignment") + struct.pack("<II", 4, 3)
    assert "general.alignment is 3" in _error(tmp_path, _header(keys=1, body=alignment))
    alignment = _string("general.alignment") + struct.pack("<Ii", 5, -32)
    assert "general.alignment is -32" in _error(tmp_path, _header(keys=1, body=alignment))
    alignment = _string("general.alignment") + struct.pack("<IIQ", 9, 0, 5000) + bytes(5000)
    message = _error(tmp_path, _header(keys=1, body=alignment))
    assert "general.alignment is [0, 0" in message and len(message) < 500


def test_damaged_tensors(tmp_path: Path) -> None:
    def error(*infos: bytes) -> str:
        return _error(tmp_path, _header(tensors=len(infos), body=b"".join(infos)) + bytes(4096))

    assert "'x' occurs twice" in error(_tensor_info(), _tensor_info())
    assert "unknown type number 99" in error(_tensor_info(kind=99))
    assert "9 dimensions" in error(_tensor_info(shape=(1,) * 9))
    assert "is empty" in error(_tensor_info(shape=(0, 32)))
    assert "blocks of 32" in error(_tensor_info(shape=(2, 33), kind=3))
    assert "multiple of the alignment" in error(_tensor_info(offset=8))
    assert "'x' ends at byte" in error(_tensor_info(shape=(1 << 40, 32)))
    assert "'x' ends at byte" in error(_tensor_info(offset=1 << 60))
    assert "'x' ends at byte" in error(_tensor_info(offset=(1 << 64) - 32))
    assert "'x' ends at byte" in error(_tensor_info(shape=(1 << 62, 4, 1 << 40)))  # 2^104 numbers
    name = struct.pack("<Q", 1) + b"\xff" + bytes(64)
    assert "a tensor's name is not UTF-8" in error(name)
    between = error(_tensor_info(shape=(64,)), _tensor_info(name="y", offset=224))
    assert "the tensors 'x' and 'y' overlap" in between
    inside = error(_tensor_info(shape=(64,)), _tensor_info(name="y", shape=(8,), offset=64))
    assert "the tensors 'x' and 'y' overlap" in inside
    same = error(_tensor_info(), _tensor_info(name="y"))
    assert "overlap" in same


def test_tensors_may_lie_in_any_order_with_gaps(tmp_path: Path) -> None:
    infos = [_tensor_info(name="b", offset=512), _tensor_info(name="a", offset=128)]
    path = tmp_path / "gaps.gguf"
    path.write_bytes(_header(tensors=2, body=b"".join(infos)) + bytes(4096))
    assert list(GGUFFile(path).tensors) == ["b", "a"]


def test_the_real_model_opens_at_once(smollm2: Path) -> None:
    started = time.process_time()
    gguf_file = GGUFFile(smollm2)
    # 0.1 s on two cores; gguf's own reader takes 2.4 s, which is what this guards against.
    assert time.process_time() - started < 1.0
    assert len(gguf_file.tensors) == 272
    assert len(gguf_file.metadata["tokenizer.ggml.tokens"]) == 49152
    assert gguf_file.tensors["token_embd.weight"].data.shape == (49152, 612)


# -- split models ---------------------------------------------------------------------------------


def _write_split(folder: Path, *, n_tensors: int = 5, per_part: int = 2) -> dict[str, np.ndarray]:
    """Writes a model of vectors with gguf's own writer, split into m-0000I-of-0000N.gguf."""
    writer = gguf.GGUFWriter(folder / "m.gguf", "llama", split_max_tensors=per_part)
    writer.add_uint32("llama.block_count", 7)
    written = {f"t{n}": np.arange(n, n + 40, dtype=np.float32) for n in range(n_tensors)}
    for name, values in written.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return written


def _write_part(path: Path, tensors: list[str], **split: Any) -> None:
    keys = b""
    for name, value in split.items():
        key = {"no": "split.no", "count": "split.count", "total": "split.tensors.count"}[name]
        keys += _string(key) + struct.pack("<Ii", 5, value)
    infos = b"".join(_tensor_info(name=n, offset=i * 128) for i, n in enumerate(tensors))
    content = _header(tensors=len(tensors), keys=len(split), body=keys + infos)
    path.write_bytes(content + bytes(-len(content) % 32) + bytes(128 * len(tensors)))


def test_any_part_opens_the_whole_model(tmp_path: Path) -> None:
    written = _write_split(tmp_path)
    paths = sorted(tmp_path.iterdir())
    assert [path.name for path in paths] == part_names("m-00002-of-00003.gguf")
    for path in paths:
        joined = GGUFFile(path)
        assert joined.path == paths[0]
        assert joined.paths == tuple(paths)
        assert joined.n_bytes == sum(path.stat().st_size for path in paths)
        assert list(joined.tensors) == list(written)
        for name, values in written.items():
            np.testing.assert_array_equal(
                np.asarray(joined.tensors[name].data).view(np.float32)[0], values
            )
        assert joined.metadata == {"general.architecture": "llama", "llama.block_count": 7}


def test_a_part_of_a_linked_snapshot_finds_its_siblings_by_the_links(tmp_path: Path) -> None:
    """As the Hugging Face cache has them: the names are links to files named by their hashes."""
    for folder in ("blobs", "snapshot", "written"):
        (tmp_path / folder).mkdir()
    written = _write_split(tmp_path / "written")
    for number, path in enumerate(sorted((tmp_path / "written").iterdir())):
        path.rename(tmp_path / "blobs" / f"{number:x}")
        (tmp_path / "snapshot" / path.name).symlink_to(tmp_path / "blobs" / f"{number:x}")
    first = tmp_path / "snapshot" / "m-00001-of-00003.gguf"
    assert list(GGUFFile(first).tensors) == list(written)
    with pytest.raises(InputError, match="one of 3 parts of a model, which its name does not say"):
        GGUFFile(tmp_path / "blobs" / "0")


def test_parts_that_are_missing(tmp_path: Path) -> None:
    _write_split(tmp_path)
    (tmp_path / "m-00002-of-00003.gguf").unlink()
    with pytest.raises(InputError, match=r"missing beside it: m-00002-of-00003\.gguf\."):
        GGUFFile(tmp_path / "m-00001-of-00003.gguf")
    with pytest.raises(InputError, match="There is no file"):
        GGUFFile(tmp_path / "m-00002-of-00003.gguf")
    (tmp_path / "m-00001-of-00003.gguf").unlink()
    with pytest.raises(InputError, match=r"missing beside it: m-00001-of-00003\.gguf and 1 more"):
        GGUFFile(tmp_path / "m-00003-of-00003.gguf")


def test_a_damaged_part_is_named(tmp_path: Path) -> None:
    _write_split(tmp_path)
    third = tmp_path / "m-00003-of-00003.gguf"
    third.write_bytes(third.read_bytes()[:-80])
    with pytest.raises(InputError, match=f"{third} is cut short"):
        GGUFFile(tmp_path / "m-00001-of-00003.gguf")


def test_parts_that_do_not_belong_together(tmp_path: Path) -> None:
    first, second = (tmp_path / f"m-0000{n}-of-00002.gguf" for n in (1, 2))

    def refusal() -> str:
        with pytest.raises(InputError) as caught:
            GGUFFile(first)
        return str(caught.value)

    _write_part(first, ["a"], no=0, count=2, total=2)
    _write_part(second, ["b"], no=1, count=2, total=2)
    assert list(GGUFFile(first).tensors) == ["a", "b"]
    _write_part(second, ["b"], no=1, count=3, total=2)
    assert "no parts of one model: split.count is 3" in refusal()
    _write_part(second, ["b"])
    assert "no parts of one model: split.count is None" in refusal()
    _write_part(second, ["b"], no=0, count=2, total=2)
    assert "by its name it is part 2 of 2, by its metadata split.no is 0, not 1" in refusal()
    _write_part(second, ["a"], no=1, count=2, total=2)
    assert f"tensor 'a' is in {first.name} too" in refusal()
    _write_part(second, ["b", "c"], no=1, count=2, total=2)
    assert "it says 2 tensors, the parts hold 3" in refusal()
    _write_part(second, ["b"], no=1, count=2, total=9)
    assert "it says 9 tensors, the parts hold 2" in refusal()
    second.rename(tmp_path / "spare.gguf")
    first.rename(second)
    (tmp_path / "spare.gguf").rename(first)
    assert "by its name it is part 1 of 2, by its metadata split.no is 1, not 0" in refusal()


@pytest.mark.parametrize("count", [0, 1])
def test_one_part_is_a_whole_model_whatever_its_name(tmp_path: Path, count: int) -> None:
    path = tmp_path / "x.gguf"
    _write_part(path, ["a"], no=0, count=count, total=1)
    assert GGUFFile(path).metadata == {}
    assert GGUFFile(path).paths == (path,)


def test_counts_of_parts_that_make_no_sense(tmp_path: Path) -> None:
    path = tmp_path / "m-00001-of-00002.gguf"
    for count in (-1, 3, 2**31 - 1):
        _write_part(path, ["a"], no=0, count=count, total=1)
        with pytest.raises(InputError, match=f"one of {count} parts"):
            GGUFFile(path)
    key = _string("split.count") + struct.pack("<IIQ", 9, 0, 3) + b"abc"
    path.write_bytes(_header(keys=1, body=key))
    with pytest.raises(InputError, match=r"split.count is \[97, 98, 99\]"):
        GGUFFile(path)


def test_names_of_parts() -> None:
    assert part_names("a.gguf") == ["a.gguf"]
    assert part_names("a-00000-of-00002.gguf") == ["a-00000-of-00002.gguf"]
    assert part_names("a-00003-of-00002.gguf") == ["a-00003-of-00002.gguf"]
    assert part_names("a-1-of-2.gguf") == ["a-1-of-2.gguf"]
    assert part_names("a-00001-of-00002.gguf") == ["a-00001-of-00002.gguf", "a-00002-of-00002.gguf"]


def test_a_file_that_is_cut_while_in_use_is_an_input_error(tmp_path: Path) -> None:
    """Under a memory map it would be a SIGBUS."""
    path = tmp_path / "model.gguf"
    write_tiny_llama(path, types=TYPES, n_layers=1)
    gguf_file = GGUFFile(path)
    last = max(gguf_file.tensors.values(), key=lambda tensor: tensor.data._start)
    with open(path, "rb+") as file:
        file.truncate(last.data._start + 8)
    with pytest.raises(InputError, match="was cut while it was being read"):
        np.asarray(last.data)
    first = min(gguf_file.tensors.values(), key=lambda tensor: tensor.data._start)
    assert np.asarray(first.data).shape == first.data.shape


def test_a_file_stays_the_one_that_was_opened(tmp_path: Path) -> None:
    path, other = tmp_path / "model.gguf", tmp_path / "other"
    write_tiny_llama(path, types=TYPES, n_layers=1)
    gguf_file = GGUFFile(path)
    before = {name: np.asarray(tensor.data) for name, tensor in gguf_file.tensors.items()}
    other.write_bytes(b"GGUF")
    other.replace(path)
    for name, tensor in gguf_file.tensors.items():
        np.testing.assert_array_equal(np.asarray(tensor.data), before[name])


def test_rows_of_a_file_are_read_by_slices(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_tiny_llama(path, types=TYPES, n_layers=1)
    data = GGUFFile(path).tensors["blk.0.ffn_down.weight"].data
    whole = np.asarray(data)
    for rows in (
        slice(None),
        slice(3, 9),
        slice(30, 99),
        slice(5, 5),
        slice(9, 3),
        slice(-4, None),
    ):
        np.testing.assert_array_equal(data[rows], whole[rows])
    with pytest.raises(ValueError, match="one after another"):
        data[::2]
