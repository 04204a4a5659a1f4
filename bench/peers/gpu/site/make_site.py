#!/usr/bin/env python3
"""Makes a folder of Python packages with the peers of bench/peers/gpu, small enough to be carried
to a machine without network.

Of vLLM it holds the kernels' files and stubs for the rest; of FlashInfer its Python files and the
compiled modules that the scenarios need; of FlashAttention 4 the compiled kernels and a stand-in
for its interface. What it cannot do the peers say when asked.

Needs: Python 3.12 with torch 2.11, numpy, ninja, packaging, jinja2, filelock, requests, tqdm and
einops, nvcc 13 under CUDA_HOME, gcc, and 2 GB of disk. No GPU. Downloads apart it takes three
minutes on two cores.
"""

import argparse
import os
import pathlib
import shutil
import subprocess
import sys
import zipfile

_HERE = pathlib.Path(__file__).resolve().parent
_SCENARIOS = _HERE.parents[2] / "scenarios.json"
_VLLM = "vllm==0.33.0"
_FLASHINFER = "flashinfer-python==0.7.2.post1"
_TVM_FFI = "apache-tvm-ffi==0.1.11"
_FLASH_ATTENTION_4 = "flash-attn-4==4.0.0b36"
# What compiling needs besides.
_TOOLS = [
    "nvidia-cutlass-dsl==4.8.0",
    "nvidia-cutlass-dsl-libs-base==4.8.0",
    "nvidia-cutlass-dsl-libs-core==4.8.0",
    "nvidia-cutlass-dsl-libs-cu13==4.8.0",
    "quack-kernels==0.6.5",
    "torch-c-dlpack-ext==0.1.5",
    "cuda-bindings==13.0.3",
    "cuda-pathfinder==1.9.1",
    "nvidia-ml-py==13.615.71",
]
_VLLM_FILES = [
    "vllm/v1/attention/ops/triton_attention_helpers.py",
    "vllm/v1/attention/ops/triton_unified_attention_diffkv.py",
    "vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so",
    "vllm/vllm_flash_attn/flash_attn_interface.py",
]
# Large parts of FlashInfer that attention over pages does not import.
_FLASHINFER_LEFT_OUT = ("data", "experimental", "moe_ep")
_FLASHINFER_INIT = """from .attention import BatchAttentionWithAttentionSinkWrapper
from .prefill import BatchPrefillWithPagedKVCacheWrapper
"""


def _download(requirement: str, folder: pathlib.Path) -> pathlib.Path:
    """The wheel, which is downloaded if it is not there."""
    name, version = requirement.replace("-", "_").split("==")
    pattern = f"{name}-{version}-*.whl"
    if not list(folder.glob(pattern)):
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder)]
        subprocess.run([*command, "--only-binary=:all:", requirement], check=True)
    (wheel,) = folder.glob(pattern)
    return wheel


def _unpack(wheel: pathlib.Path, folder: pathlib.Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)


def _unpack_metadata(wheel: pathlib.Path, site: pathlib.Path) -> None:
    """So that the package's version is known there."""
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.endswith(".dist-info/METADATA"):
                archive.extract(name, site)


def add_vllm(wheels: pathlib.Path, site: pathlib.Path) -> None:
    """The kernels' own files, and stubs for what they import."""
    wheel = _download(_VLLM, wheels)
    shutil.copytree(_HERE / "vllm", site / "vllm", ignore=shutil.ignore_patterns("__pycache__"))
    with zipfile.ZipFile(wheel) as archive:
        for name in _VLLM_FILES:
            archive.extract(name, site)
    _unpack_metadata(wheel, site)


def add_flashinfer(tools: pathlib.Path, wheels: pathlib.Path, site: pathlib.Path) -> None:
    """Its Python files and templates, without the kernels' sources, and compiled modules."""
    wheel = _download(_FLASHINFER, wheels)
    _unpack_metadata(wheel, site)
    source = tools / "flashinfer"
    target = site / "flashinfer"
    for file in source.rglob("*.py"):
        relative = file.relative_to(source)
        if relative.parts[0] not in _FLASHINFER_LEFT_OUT:
            (target / relative).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(file, target / relative)
    # The whole one imports every kernel family.
    (target / "__init__.py").write_text(_FLASHINFER_INIT, encoding="utf-8")
    templates = target / "data" / "csrc"
    templates.mkdir(parents=True)
    for file in (source / "data" / "csrc").glob("batch_prefill*"):
        shutil.copy2(file, templates)
    modules = tools.parent / "flashinfer-modules"
    modules.mkdir(exist_ok=True)
    _compile("compile_flashinfer.py", tools, modules)
    for library in modules.glob("*/*.so"):
        folder = target / "data" / "aot" / library.stem
        folder.mkdir(parents=True)
        shutil.copy2(library, folder)


def add_flash_attention_4(tools: pathlib.Path, wheels: pathlib.Path, site: pathlib.Path) -> None:
    """A stand-in for its interface, over its own kernels."""
    _unpack_metadata(_download(_FLASH_ATTENTION_4, wheels), site)
    kernels = tools.parent / "fa4-kernels"
    kernels.mkdir(exist_ok=True)
    _compile("compile_fa4.py", tools, kernels, str(_SCENARIOS))
    target = site / "flash_attn" / "cute"
    target.mkdir(parents=True)
    for file in [*kernels.glob("*.so"), kernels / "kernels.json"]:
        shutil.copy2(file, target)
    shutil.copy2(_HERE / "fa4_interface.py", target / "interface.py")


def add_tvm_ffi(wheels: pathlib.Path, site: pathlib.Path) -> None:
    """What loads the compiled modules of the two."""
    _unpack(_download(_TVM_FFI, wheels), site)
    for unused in ("3rdparty", "include"):
        shutil.rmtree(site / "tvm_ffi" / unused)


def _compile(script: str, tools: pathlib.Path, *arguments) -> None:
    path = [str(tools), str(tools / "nvidia_cutlass_dsl" / "dsl_packages")]
    path += filter(None, [os.environ.get("PYTHONPATH")])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
    command = [sys.executable, _HERE / script, *arguments]
    subprocess.run([str(word) for word in command], env=environment, check=True)


def main() -> None:
    """See the module's comment."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("site", type=pathlib.Path, metavar="FOLDER", help="is made anew")
    parser.add_argument(
        "--work",
        type=pathlib.Path,
        required=True,
        metavar="FOLDER",
        help="for wheels and what is compiled; kept, and used again",
    )
    options = parser.parse_args()
    site = options.site.resolve()
    wheels = options.work.resolve() / "wheels"
    tools = options.work.resolve() / "tools"
    wheels.mkdir(parents=True, exist_ok=True)
    for requirement in [_FLASHINFER, _FLASH_ATTENTION_4, _TVM_FFI, *_TOOLS]:
        _unpack(_download(requirement, wheels), tools)
    shutil.rmtree(site, ignore_errors=True)
    site.mkdir(parents=True)
    add_vllm(wheels, site)
    add_tvm_ffi(wheels, site)
    add_flashinfer(tools, wheels, site)
    add_flash_attention_4(tools, wheels, site)


if __name__ == "__main__":
    main()
