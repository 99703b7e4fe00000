"""Every kernel of real runs, compiled for platforms that nobody here has.

Tint is what Chromium compiles WGSL with; naga, here out of npm, translates it to Metal and D3D12
as it does inside wgpu.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lora.shaders.templates import with_directives
from tests.support.npm import NotFetchedError, npm_package
from tests.support.renderings import WGSL, all_renderings

SUPPORT = Path(__file__).parents[1] / "support"
NAGA = "wgsl-wasm-transpiler-bundler@0.0.1"  # MIT
NAGA_DIGEST = "fd30a4221eb213f957c14378fbe09a625f6dddbc43bdab50dfeb2e3ab52e05d4"
FORMATS = ("metal", "hlsl")
# What this naga is too old for: the kernel's name, and a definition of what it lacks.
LACKING = {"matmul_int_row": "fn dot4I8Packed(a: u32, b: u32) -> i32 { return i32(a & b); }"}


def naga_refusals(texts: list[str]) -> list[tuple[int, str, str]]:
    """Index, format and message of each text that cannot be translated."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("there is no node to run naga's WebAssembly")
    try:
        package = npm_package(NAGA, NAGA_DIGEST, "naga-wasm") / "package"
    except NotFetchedError as reason:
        pytest.skip(str(reason))
    done = subprocess.run(
        [node, "--no-warnings", str(SUPPORT / "translate.mjs"), str(package)],
        input=json.dumps({"metal": [as_function(text) for text in texts], "hlsl": texts}),
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return [(index, form, message) for index, form, message in json.loads(done.stdout)]


def as_function(text: str) -> str:
    """The same with `main` as a plain function.

    Metal's entry points need to be told their bindings, which this package doesn't: it leaves them
    out without a word. A plain function takes what it binds as arguments.
    """
    return re.sub(r"@compute\s*@workgroup_size\([^)]*\)|@builtin\(\w+\)", "", text)


def tint_refusals(texts: list[str], pipelines: list[bool]) -> list[tuple[int, str]]:
    """Index and message of each text that Tint refuses."""
    if importlib.util.find_spec("wgpudawn") is None:
        pytest.skip("wgpudawn is not installed (there are wheels for some platforms only)")
    done = subprocess.run(
        [sys.executable, str(SUPPORT / "tint.py")],
        input=json.dumps({"texts": texts, "pipelines": pipelines}),
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return [(index, message) for index, message in json.loads(done.stdout)]


def test_every_file_is_in_some_rendering() -> None:
    files = {path.relative_to(WGSL).as_posix() for path in WGSL.rglob("*.wgsl")}
    assert all_renderings().files == files


def test_the_few_that_cover_all_have_every_template() -> None:
    renderings = all_renderings()
    few = renderings.covering
    assert set(few.values()) == {path.stem for path in WGSL.glob("*.wgsl")}
    assert len(few) < len(renderings.templates)


@pytest.mark.parametrize("every", [False, True], ids=["but for numbers", "with all numbers"])
def test_tint_takes_every_kernel(every: bool) -> None:
    """And makes pipelines of all that a GPU of WebGPU's default limits asks for."""
    renderings = all_renderings()
    texts = list(renderings.templates if every else renderings.unlike)
    refused = tint_refusals(texts, [text in renderings.within_defaults for text in texts])
    assert not [(renderings.templates[texts[index]], message) for index, message in refused]


def test_tint_takes_matrices_with_their_directives() -> None:
    """So a kernel with matrix units can be rendered; without the lines Tint refuses it."""
    code = """
@group(0) @binding(0) var<storage, read> x: array<f16>;
@group(0) @binding(1) var<storage, read_write> y: array<f32>;
@compute @workgroup_size(32) fn main() {
    let a = subgroupMatrixLoad<subgroup_matrix_left<f16, 8, 8>, row_major>(&x, 0u, 8u);
    let b = subgroupMatrixLoad<subgroup_matrix_right<f16, 8, 8>, col_major>(&x, 0u, 8u);
    let sums = subgroupMatrixMultiplyAccumulate(a, b, subgroup_matrix_result<f32, 8, 8>());
    subgroupMatrixStore<row_major>(&y, 0u, sums, 8u);
}"""
    refused = tint_refusals([with_directives(code), code], [False, False])
    assert [index for index, _ in refused] == [1]


def test_naga_translates_every_kernel_to_metal_and_hlsl() -> None:
    """But those on matrix units, which naga does not know: only Dawn runs them."""
    few = {
        text: template for text, template in all_renderings().covering.items()
        if "subgroupMatrix" not in text
    }  # fmt: skip
    texts = [
        text.replace("@compute", f"{LACKING[template]}\n\n@compute", 1)
        if template in LACKING else text
        for text, template in few.items()
    ]  # fmt: skip
    names = list(few.values())
    assert not [(names[index], form, why) for index, form, why in naga_refusals(texts)]


def test_what_naga_lacks_it_still_lacks() -> None:
    few = all_renderings().covering
    texts = [next(text for text, name in few.items() if name == lacking) for lacking in LACKING]
    refused = naga_refusals(texts)
    assert [(index, form) for index, form, _ in refused] == [
        (index, form) for form in FORMATS for index in range(len(texts))
    ]
    assert all("dot4I8Packed" in message for _, _, message in refused)


@pytest.mark.parametrize("code", ["fn main() { let a = 8u / 4u & 7u; }", "fn main() { let a = ; }"])
def test_a_wrong_text_is_refused(code: str) -> None:
    """The first by Tint alone: naga, which is inside wgpu, is too lenient there."""
    whole = f"@compute @workgroup_size(1)\n{code}"
    assert [index for index, _ in tint_refusals([whole], [False])] == [0]
    lenient = "& 7u" in code
    assert [(index, form) for index, form, _ in naga_refusals([whole])] == (
        [] if lenient else [(0, form) for form in FORMATS]
    )
