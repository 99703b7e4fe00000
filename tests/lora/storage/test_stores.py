"""Models by name: Ollama's store built in a directory, and a stand-in for the Hub on localhost."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

import lora.storage.ollama
from lora.forward.gguf.file import GGUFFile
from lora.shaders.errors import InputError
from lora.storage.ollama import OllamaSettings
from lora.storage.stores import check_model_name, ollama_settings, resolve_model
from tests.support.ollama_store import MODEL, REGISTRY, install, layer
from tests.support.ollama_store import store as store  # a fixture
from tests.support.stand_in_hub import COMMIT, REPOSITORY, StandInHub
from tests.support.stand_in_hub import hub as hub  # a fixture
from tests.support.tiny_gguf import write_tiny_llama


def test_a_path_is_itself() -> None:
    assert resolve_model("models/x.gguf") == Path("models/x.gguf")
    assert resolve_model(Path("/no/where")) == Path("/no/where")


# -- Ollama's store -------------------------------------------------------------------------------


def refusal(name: str) -> str:
    with pytest.raises(InputError) as caught:
        resolve_model(name)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "manifest"),
    [
        ("ollama:gemma3", f"{REGISTRY}/gemma3/latest"),
        ("ollama:gemma3:270m", f"{REGISTRY}/gemma3/270m"),
        ("ollama:mannix/llama3.1-8b:q4_K_M", "registry.ollama.ai/mannix/llama3.1-8b/q4_K_M"),
        ("ollama:hf.co/bartowski/X-GGUF:Q8_0", "hf.co/bartowski/X-GGUF/Q8_0"),
        ("ollama:hf.co/bartowski/X-GGUF", "hf.co/bartowski/X-GGUF/latest"),
        ("ollama:localhost:5000/team/model:v1", "localhost:5000/team/model/v1"),
    ],
)
def test_ollama_names(store: Path, name: str, manifest: str) -> None:
    install(store, manifest, layer(store))
    assert resolve_model(name).read_bytes() == b"a model"
    check_model_name(name)


KIND = "application/vnd.ollama.image."


def test_ollama_settings(store: Path) -> None:
    install(
        store,
        f"{REGISTRY}/m/latest",
        layer(store),
        layer(store, "Be kind — é".encode(), KIND + "system"),
        layer(store, b'{"stop": ["<end>"], "temperature": 1}', KIND + "params"),
    )
    assert ollama_settings("ollama:m") == OllamaSettings(
        "{{ .Prompt }}", "Be kind — é", {"stop": ["<end>"], "temperature": 1}
    )
    install(store, f"{REGISTRY}/bare/latest", layer(store))
    assert ollama_settings("ollama:bare") == OllamaSettings("{{ .Prompt }}", None, {})
    assert ollama_settings("models/x.gguf") is None
    assert ollama_settings("hf:a/b/c") is None


@pytest.mark.parametrize(
    ("kind", "contents", "message"),
    [
        ("params", b"[1]", "its parameters are no JSON object. Run `ollama pull m:latest` again"),
        ("params", b"{", "its parameters are no JSON object"),
        ("system", b"\xff", "should be a text, and is none"),
        ("template", None, "is missing. Run `ollama pull"),
    ],
)
def test_damaged_ollama_settings(
    store: Path, kind: str, contents: bytes | None, message: str
) -> None:
    damaged = layer(store, contents or b"gone", KIND + kind)
    if contents is None:
        (store / "blobs" / damaged["digest"].replace(":", "-")).unlink()
    install(store, f"{REGISTRY}/m/latest", layer(store), damaged)
    with pytest.raises(InputError, match=message):
        ollama_settings("ollama:m")


@pytest.mark.parametrize(
    "name",
    [
        "ollama:",
        "ollama::latest",
        "ollama:gemma3:",
        "ollama:/gemma3",
        "ollama:../../etc/passwd",
        "ollama:..",
        "ollama:gemma3:..",
        "ollama:a/../b",
        "ollama:a/b/c/d",
        "ollama:a//b",
        "ollama:a\\b",
        "ollama:C:\\x:y",
        "ollama:.hidden",
        "ollama:a b",
        "ollama:a:b:c",
        "ollama:a\n",
        "ollama:a\0",
        "ollama:../x/y",
    ],
)
def test_malformed_ollama_names(store: Path, name: str) -> None:
    # What ".." would reach, were it followed.
    install(store, "x", layer(store))
    assert "is no name of an Ollama model" in refusal(name)
    with pytest.raises(InputError):
        check_model_name(name)


def test_a_gguf_out_of_the_store_opens(store: Path, tmp_path: Path) -> None:
    write_tiny_llama(tmp_path / "tiny.gguf")
    install(store, f"{REGISTRY}/tiny/latest", layer(store, (tmp_path / "tiny.gguf").read_bytes()))
    path = resolve_model("ollama:tiny")
    assert GGUFFile(path).metadata == GGUFFile(tmp_path / "tiny.gguf").metadata


def test_what_is_there_is_listed_nearest_first(store: Path) -> None:
    for name in ("gemma3/270m", "gemma3/1b", "qwen3/0.6b", "zephyr/latest"):
        install(store, f"{REGISTRY}/{name}", layer(store))
    install(store, "hf.co/org/repo/Q4", layer(store))
    (store / "manifests" / REGISTRY / "gemma3" / ".DS_Store").write_bytes(b"")
    message = refusal("ollama:gemma3:271m")
    assert message.startswith(
        f"ollama:gemma3:271m is not in {store}. There are ollama:gemma3:270m,"
    )
    for name in ("gemma3:1b", "qwen3:0.6b", "zephyr:latest", "hf.co/org/repo:Q4"):
        assert f"ollama:{name}" in message
    assert "DS_Store" not in message
    for index in range(20):
        install(store, f"{REGISTRY}/more{index}/latest", layer(store))
    assert refusal("ollama:gemma3").endswith(" and 17 more.")


def test_an_empty_or_absent_store(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert f"no model in {store}" in refusal("ollama:x")
    assert "OLLAMA_MODELS" in refusal("ollama:x")
    monkeypatch.setenv("OLLAMA_MODELS", str(store / "absent"))
    assert f"no model in {store / 'absent'}" in refusal("ollama:x")


def test_without_ollama_models_the_users_store_comes_before_the_services(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, service = tmp_path / "home" / ".ollama" / "models", tmp_path / "service"
    for folder in (home, service):
        (folder / "blobs").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("OLLAMA_MODELS", "")
    monkeypatch.setattr(lora.storage.ollama, "_SERVICE_STORE", service)
    install(service, f"{REGISTRY}/x/latest", layer(service, b"the service's"))
    assert resolve_model("ollama:x").read_bytes() == b"the service's"
    assert f"is not in {home} or {service}. There are ollama:x:latest." in refusal("ollama:y")
    install(home, f"{REGISTRY}/x/latest", layer(home, b"the user's"))
    assert resolve_model("ollama:x").read_bytes() == b"the user's"


def test_links_that_leave_the_store(store: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_bytes(b"a model")
    good = layer(store)
    blob = store / "blobs" / good["digest"].replace(":", "-")
    manifest = install(store, f"{REGISTRY}/x/latest", good)
    blob.unlink()
    blob.symlink_to(outside)
    assert f"is a link that leaves the store, to {outside}" in refusal("ollama:x")
    layer(store)  # through the link; the blob is still outside
    blob.unlink()
    layer(store)
    manifest.rename(tmp_path / "manifest")
    manifest.symlink_to(tmp_path / "manifest")
    assert "is a link that leaves the store" in refusal("ollama:x")
    manifest.unlink()
    manifest.symlink_to(manifest)  # to itself
    assert "cannot be read" in refusal("ollama:x")


def test_a_whole_store_on_another_disk_may_be_linked(store: Path, tmp_path: Path) -> None:
    install(store, f"{REGISTRY}/x/latest", layer(store))
    for folder in ("blobs", "manifests"):
        (store / folder).rename(tmp_path / folder)
        (store / folder).symlink_to(tmp_path / folder)
    assert resolve_model("ollama:x").read_bytes() == b"a model"


@pytest.mark.parametrize(
    "contents",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        b"null",
        b"{}",
        b'{"layers": {}}',
        b'{"layers": [1]}',
        b'{"layers": null}',
        b"[" * 200_000,
        b'{"layers": []}' + b" " * (1 << 24),
    ],
    ids=lambda contents: contents[:14].decode("latin1"),
)
def test_damaged_manifests(store: Path, contents: bytes) -> None:
    install(store, f"{REGISTRY}/x/latest").write_bytes(contents)
    assert "is no JSON manifest with a list of layers" in refusal("ollama:x")


def test_a_manifest_that_is_a_folder(store: Path) -> None:
    (store / "manifests" / REGISTRY / "x" / "latest").mkdir(parents=True)
    assert "cannot be read: Is a directory" in refusal("ollama:x")


@pytest.mark.parametrize(
    "digest",
    [
        None,
        7,
        "sha256:",
        "sha256:" + "a" * 63,
        "sha256:" + "a" * 65,
        "sha256:" + "g" * 64,
        "sha256:" + "A" * 64,
        "sha256-" + "a" * 64,
        "md5:" + "a" * 64,
        "sha256:../../../../etc/passwd",
        "sha256:" + "a" * 64 + "\n",
    ],
)
def test_digests_that_are_none(store: Path, digest: object) -> None:
    install(store, f"{REGISTRY}/x/latest", {"mediaType": MODEL, "digest": digest, "size": 1})
    assert "not sha256: and 64 hex digits" in refusal("ollama:x")


def test_a_blob_that_is_missing_or_cut_short(store: Path) -> None:
    good = layer(store)
    blob = store / "blobs" / good["digest"].replace(":", "-")
    install(store, "hf.co/a/x/latest", good)
    blob.write_bytes(b"a mod")
    message = refusal("ollama:hf.co/a/x")
    assert f"{blob} has 5 bytes instead of 7. Run `ollama pull hf.co/a/x:latest`" in message
    blob.unlink()
    assert f"{blob} is missing. Run `ollama pull hf.co/a/x:latest`" in refusal("ollama:hf.co/a/x")


def test_models_that_are_not_one_gguf(store: Path) -> None:
    manifest = f"{REGISTRY}/x/latest"
    install(store, manifest, *[layer(store, b"%d" % n) for n in range(2)])
    assert "lists 2 model layers; one GGUF is expected." in refusal("ollama:x")
    install(store, manifest)
    assert "lists 0 model layers; one GGUF is expected (models that run" in refusal("ollama:x")
    tensor = "application/vnd.ollama.image.tensor"
    install(store, manifest, *[layer(store, b"%d" % n, tensor) for n in range(9)])
    assert "is kept as 9 single tensors, not as a GGUF" in refusal("ollama:x")
    adapter = layer(store, b"adapter", "application/vnd.ollama.image.adapter")
    install(store, manifest, layer(store), adapter)
    assert "a base model with an adapter on top" in refusal("ollama:x")


# -- Hugging Face's Hub ---------------------------------------------------------------------------


def test_a_file_is_fetched_once_and_then_found_without_a_network(
    hub: StandInHub, tmp_path: Path
) -> None:
    write_tiny_llama(tmp_path / "tiny.gguf")
    hub.files = {"tiny.gguf": (tmp_path / "tiny.gguf").read_bytes(), "quants/b.gguf": b"B"}
    names = ["hf:org/Tiny-GGUF/tiny.gguf", "hf:org/Tiny-GGUF@v1/quants/b"]
    paths = hub.resolve(*names)
    snapshot = hub.cache / "hub" / "models--org--Tiny-GGUF" / "snapshots" / COMMIT
    assert paths == [str(snapshot / "tiny.gguf"), str(snapshot / "quants" / "b.gguf")]
    assert GGUFFile(paths[0]).metadata["general.architecture"] == "llama"
    assert Path(paths[1]).read_bytes() == b"B"
    assert [r for r in hub.requests if r.startswith("GET")] == [
        "GET /cdn/tiny.gguf",
        "GET /cdn/quants/b.gguf",
    ]
    assert hub.resolve(*names) == paths
    assert sum(r.startswith("GET") for r in hub.requests) == 2  # nothing was fetched again
    asked = len(hub.requests)
    assert hub.resolve(*names, HF_HUB_OFFLINE="1") == paths
    assert len(hub.requests) == asked
    assert hub.resolve(*names, HF_ENDPOINT="http://127.0.0.1:9") == paths  # nobody listens there


def test_all_parts_of_a_split_model_are_fetched(hub: StandInHub, tmp_path: Path) -> None:
    folder = tmp_path / "written"
    folder.mkdir()
    writer = gguf.GGUFWriter(folder / "m.gguf", "llama", split_max_tensors=1)
    for name in "abc":
        writer.add_tensor(name, np.ones(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    hub.files = {f"Q8/{path.name}": path.read_bytes() for path in folder.iterdir()}
    names = [f"hf:org/Tiny-GGUF/Q8/m-0000{n}-of-00003" for n in (2, 1)]
    first, second = hub.resolve(*names)
    assert first == second and first.endswith(f"{COMMIT}/Q8/m-00001-of-00003.gguf")
    assert list(GGUFFile(first).tensors) == ["a", "b", "c"]
    assert sum(r.startswith("GET /cdn") for r in hub.requests) == 3
    # After the first part the commit is asked for, so that a push between them mixes nothing.
    heads = [r for r in hub.requests if r.startswith(f"HEAD {REPOSITORY}")]
    assert f"HEAD {REPOSITORY}/resolve/main/Q8/m-00001-of-00003.gguf" == heads[0]
    assert f"HEAD {REPOSITORY}/resolve/{COMMIT}/Q8/m-00002-of-00003.gguf" == heads[1]
    assert hub.resolve(*names, HF_HUB_OFFLINE="1") == [first, first]
    del hub.files["Q8/m-00003-of-00003.gguf"]
    (message,) = hub.resolve(names[0], HF_HOME=str(tmp_path / "another"))
    assert "org/Tiny-GGUF has no file Q8/m-00003-of-00003.gguf" in message


def test_what_the_hub_does_not_have(hub: StandInHub) -> None:
    shards = [f"big-0000{n}-of-00002.gguf" for n in (1, 2)]
    hub.files = dict.fromkeys(["tiny-Q8_0.gguf", "tiny-Q4_K_M.gguf", "README.md", *shards], b"x")
    file, revision, repository = hub.resolve(
        "hf:org/Tiny-GGUF/tiny-Q4_K_S.gguf",
        "hf:org/Tiny-GGUF@v9/tiny-Q8_0.gguf",
        "hf:org/Other/x.gguf",
    )
    assert file == (
        "InputError: hf:org/Tiny-GGUF/tiny-Q4_K_S.gguf: org/Tiny-GGUF has no file "
        "tiny-Q4_K_S.gguf. There are tiny-Q4_K_M.gguf, tiny-Q8_0.gguf, big-00001-of-00002.gguf."
    )
    assert revision.startswith("InputError: ") and "no branch, tag or commit 'v9'" in revision
    assert repository.startswith("InputError: ") and "HF_TOKEN" in repository
    assert "there is no model repository org/Other, or it is private" in repository
    hub.files = {"README.md": b""}
    (nothing,) = hub.resolve("hf:org/Tiny-GGUF/x.gguf")
    assert nothing.endswith("has no file x.gguf, and no GGUF at all.")


def test_gated_offline_and_unreachable(hub: StandInHub) -> None:
    hub.files = {"x.gguf": b"x"}
    name = "hf:org/Tiny-GGUF/x.gguf"
    (offline,) = hub.resolve(name, HF_HUB_OFFLINE="1")
    assert offline.startswith(f"InputError: {name}: x.gguf is not in the cache {hub.cache}")
    assert "HF_HUB_OFFLINE forbids fetching it" in offline
    assert hub.requests == []
    (unreachable,) = hub.resolve(name, HF_ENDPOINT="http://127.0.0.1:9")
    assert unreachable.startswith(f"LoraError: {name}: x.gguf is not in the cache")
    assert "could not be fetched from http://127.0.0.1:9 (" in unreachable
    hub.gated = True
    (gated,) = hub.resolve(name)
    assert gated.startswith(f"InputError: {name}: the repository is gated.")
    assert f"{hub.url}/org/Tiny-GGUF" in gated and "hf auth login" in gated


def test_a_download_that_breaks_off_leaves_no_file(hub: StandInHub) -> None:
    hub.files = {"x.gguf": b"x" * 100_000}
    name = "hf:org/Tiny-GGUF/x.gguf"
    hub.cut = True
    (broken,) = hub.resolve(name)
    assert broken.startswith(f"LoraError: {name}: could not be fetched:")
    assert not list(hub.cache.rglob("x.gguf"))
    hub.cut = False
    (path,) = hub.resolve(name)
    assert Path(path).read_bytes() == b"x" * 100_000


@pytest.mark.parametrize(
    "name",
    [
        "hf:",
        "hf:org",
        "hf:org/repo/",
        "hf:/repo/x.gguf",
        "hf:org//x.gguf",
        "hf:org/repo@/x.gguf",
        "hf:org/repo@../x.gguf",
        "hf:org/repo@a@b/x.gguf",
        "hf:../repo/x.gguf",
        "hf:org/../x.gguf",
        "hf:org/repo/../x.gguf",
        "hf:org/repo/a/../../x.gguf",
        "hf:org/repo/./x.gguf",
        "hf:org/repo/a//x.gguf",
        "hf:org/repo/a\\x.gguf",
        "hf:org/repo/x\n.gguf",
        "hf:org/repo:",
        "hf:org/repo:Q4/K",
        "hf:org/repo@:Q4_K_M",
    ],
)
def test_malformed_hub_names(name: str) -> None:
    for use in (resolve_model, check_model_name):
        with pytest.raises(InputError, match="is no name of a file on the Hub"):
            use(name)


def test_a_repository_gives_the_file_that_llama_cpp_takes(hub: StandInHub) -> None:
    hub.files = dict.fromkeys(
        ["b-Q8_0.gguf", "b-q4_k_m.gguf", "b-Q4_K_S.gguf", "mmproj-b-Q4_K_M.gguf", "a-IQ2_M.gguf",
         "b-Q4_K.gguf", "README.md", "Q6_K/b-Q6_K-00001-of-00002.gguf",
         "Q6_K/b-Q6_K-00002-of-00002.gguf"],
        b"x",
    )  # fmt: skip
    names = ["", ":q8_0", ":Q4_K", ":Q6_K", "@v1:IQ2_M"]
    found = hub.resolve(*(f"hf:org/Tiny-GGUF{name}" for name in names))
    assert [Path(path).name for path in found] == [
        "b-q4_k_m.gguf", "b-Q8_0.gguf", "b-Q4_K.gguf", "b-Q6_K-00001-of-00002.gguf", "a-IQ2_M.gguf"
    ]  # fmt: skip
    # What was fetched is found again without a network.
    offline = hub.resolve("hf:org/Tiny-GGUF", "hf:org/Tiny-GGUF:Q8_0", HF_HUB_OFFLINE="1")
    assert offline == found[:2]
    missing, other = hub.resolve("hf:org/Tiny-GGUF:Q5_K_M", "hf:org/Other:Q8_0")
    assert missing.startswith("InputError: hf:org/Tiny-GGUF:Q5_K_M: org/Tiny-GGUF has no GGUF of Q")
    assert "b-Q4_K.gguf" in missing and "there is no model repository org/Other" in other
    hub.files = {"z-Q3_K_L.gguf": b"x", "y-F16.gguf": b"x"}
    (first,) = hub.resolve("hf:org/Tiny-GGUF")
    assert first.endswith("y-F16.gguf")


def test_repositories_and_directories_of_safetensors(hub: StandInHub, tmp_path: Path) -> None:
    hub.files = {"model.safetensors": b"x", "config.json": b"{}"}
    (answer,) = hub.resolve("hf:org/Tiny-GGUF")
    assert answer.startswith("InputError: hf:org/Tiny-GGUF: org/Tiny-GGUF holds safetensors")
    assert "convert_hf_to_gguf.py" in answer
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model-00001-of-00002.safetensors").write_bytes(b"")
    for path in (tmp_path / "model", tmp_path / "model" / "model-00001-of-00002.safetensors"):
        assert "holds safetensors, as transformers reads them, and a GGUF is needed" in refusal(
            str(path)
        )


def test_a_repository_that_cannot_be_asked(hub: StandInHub) -> None:
    (offline,) = hub.resolve("hf:org/Tiny-GGUF", HF_HUB_OFFLINE="1")
    assert "has no GGUF of it, and HF_HUB_OFFLINE forbids fetching one." in offline
    (unreachable,) = hub.resolve("hf:org/Tiny-GGUF", HF_ENDPOINT="http://127.0.0.1:9")
    assert unreachable.startswith("LoraError: hf:org/Tiny-GGUF: could not be looked up: ")
