"""GGUFFile against gguf's own reader, and against every way a file can be damaged."""

from __future__ import annotations

import contextlib
import struct
import time
from pathlib import Path

import gguf
import numpy as np
import pytest

from forward.gguf_file import MAX_ARRAY_LENGTH, GGUFFile
from shaders.errors import InputError
from tests.forward.tiny_gguf import write_tiny_llama

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
        assert tensor.data.dtype == np.uint8
        assert not tensor.data.flags.writeable
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
    np.testing.assert_array_equal(tensor.data.view(np.float32), values.reshape(6, 32))


def test_truncation_anywhere_is_an_input_error(tiny: Path, tmp_path: Path) -> None:
    content = tiny.read_bytes()
    gguf_file = GGUFFile(tiny)
    start_of_data = len(content) - sum(t.data.size for t in gguf_file.tensors.values())
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


def test_a_damaged_byte_never_raises_anything_else(tiny: Path, tmp_path: Path) -> None:
    content = bytearray(tiny.read_bytes())
    path = tmp_path / "damaged.gguf"
    random = np.random.default_rng(0)
    for position in [*range(4, 300), *random.integers(300, 9000, 300).tolist()]:
        for value in (0x00, 0x7F, 0xFF):
            damaged = content.copy()
            damaged[position] = value
            path.write_bytes(damaged)
            with contextlib.suppress(InputError):
                GGUFFile(path)


def test_paths_that_are_no_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="There is no file"):
        GGUFFile(tmp_path / "absent.gguf")
    with pytest.raises(InputError, match="is a directory"):
        GGUFFile(tmp_path)
    assert "is empty" in _error(tmp_path, b"")
    with pytest.raises(InputError, match="not a regular file"):
        GGUFFile("/dev/null")


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
    started = time.monotonic()
    assert "tensors" in _error(tmp_path, _header(tensors=1 << 40))
    assert "metadata keys" in _error(tmp_path, _header(keys=1 << 60))
    array = _string("k") + struct.pack("<IIQ", 9, 8, 1 << 20)
    assert "strings in 'k'" in _error(tmp_path, _header(keys=1, body=array))
    array = _string("k") + struct.pack("<IIQ", 9, 0, MAX_ARRAY_LENGTH + 1)
    assert "never read" in _error(tmp_path, _header(keys=1, body=array))
    array = _string("k") + struct.pack("<IIQ", 9, 4, 1 << 20)
    assert "cut short" in _error(tmp_path, _header(keys=1, body=array))
    text = _string("k") + struct.pack("<IQ", 8, 1 << 62)
    assert "cut short" in _error(tmp_path, _header(keys=1, body=text))
    assert time.monotonic() - started < 5  # nothing of these sizes was allocated or walked


def test_damaged_metadata(tmp_path: Path) -> None:
    pair = _string("k") + struct.pack("<IB", 0, 7)
    assert "'k' occurs twice" in _error(tmp_path, _header(keys=2, body=pair * 2))
    unknown = _string("k") + struct.pack("<IB", 77, 7) + bytes(8)
    assert "unknown value type 77" in _error(tmp_path, _header(keys=1, body=unknown))
    nested = _string("k") + struct.pack("<IIQ", 9, 9, 1) + bytes(16)
    assert "unknown value type 9" in _error(tmp_path, _header(keys=1, body=nested))
    broken = _string("k") + struct.pack("<IQ", 8, 2) + b"\xff\xfe"
    assert "not UTF-8" in _error(tmp_path, _header(keys=1, body=broken))
    alignment = _string("general.alignment") + struct.pack("<II", 4, 3)
    assert "general.alignment is 3" in _error(tmp_path, _header(keys=1, body=alignment))


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


def test_the_real_model_opens_at_once(smollm2: Path) -> None:
    started = time.monotonic()
    gguf_file = GGUFFile(smollm2)
    # 0.1 s on two cores; gguf's own reader takes 2.4 s, which is what this guards against.
    assert time.monotonic() - started < 1.0
    assert len(gguf_file.tensors) == 272
    assert len(gguf_file.metadata["tokenizer.ggml.tokens"]) == 49152
    assert gguf_file.tensors["token_embd.weight"].data.shape == (49152, 612)
