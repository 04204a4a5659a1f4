"""Compiles the kernels of FlashAttention 4 that the scenarios need, for Hopper, without a GPU.

usage: compile_fa4.py FOLDER SCENARIOS    (started by make_site.py)

Calls FlashAttention 4 with tensors that have no data, lets it compile and export what it would
launch, and links each kernel into a library that needs no compiler. FOLDER gets the libraries and
kernels.json: which library serves which call.
"""

import json
import os
import pathlib
import subprocess
import sys

_FOLDER = pathlib.Path(sys.argv[1]).resolve()
os.environ.update(
    FLASH_ATTENTION_ARCH="sm_90",
    CUTE_DSL_ARCH="sm_90a",
    FLASH_ATTENTION_NUM_SMS="132",
    FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED="1",
    FLASH_ATTENTION_CUTE_DSL_CACHE_DIR=str(_FOLDER / "objects"),
)

import cutlass
import torch
import tvm_ffi
from flash_attn.cute import cache_utils, interface
from torch._subclasses.fake_tensor import FakeTensorMode

_HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(_HERE.parent))
import scenarios

_PAGES = (16, 32, 64, 128)


def _signature():
    """The function of fa4_interface.py, which cannot be imported before its libraries are there."""
    source = (_HERE / "fa4_interface.py").read_text(encoding="utf-8")
    start = source.index("def signature(")
    names: dict = {}
    exec(source[start : source.index("\n\n\n", start)], names)
    return names["signature"]


def _call(s: scenarios.Scenario, signature) -> str:
    """Lets FlashAttention 4 compile for the scenario, says what the call's signature is."""
    i32 = torch.int32
    bf16 = torch.bfloat16
    seqs = len(s.seq_lens)
    with FakeTensorMode():
        query = torch.empty(s.num_tokens, s.num_heads, s.head_size_qk, dtype=bf16, device="cuda")
        pages = [-(-seq_len // s.block_size) for seq_len in s.seq_lens]
        shape = (sum(pages), s.block_size, s.num_kv_heads, s.head_size_qk + s.head_size_v)
        cache = torch.empty(shape, dtype=bf16, device="cuda")
        key, value = cache.split([s.head_size_qk, s.head_size_v], dim=-1)
        starts = torch.empty(seqs + 1, dtype=i32, device="cuda")
        sinks = torch.empty(s.num_heads, dtype=bf16, device="cuda") if s.sinks else None
        left, right = (s.window - 1, 0) if s.window > 0 else (None, None)
        interface._flash_attn_fwd(
            query,
            key,
            value,
            cu_seqlens_q=starts,
            seqused_k=torch.empty(seqs, dtype=i32, device="cuda"),
            page_table=torch.empty(seqs, max(pages), dtype=i32, device="cuda"),
            max_seqlen_q=max(s.query_lens),
            softmax_scale=s.head_size_qk**-0.5,
            causal=s.window == 0,
            window_size_left=left,
            window_size_right=right,
            learnable_sink=sinks,
            out=torch.empty(s.num_tokens, s.num_heads, s.head_size_v, dtype=bf16, device="cuda"),
            num_splits=1,
        )
        return signature(query, key, starts, left, sinks, max(s.query_lens))


def _link(kernel: pathlib.Path, library: pathlib.Path) -> None:
    dsl = pathlib.Path(cutlass.__file__).parents[2]
    (runtime,) = dsl.glob("cu13/lib/libcuda_dialect_runtime_static.a")
    (cudart,) = pathlib.Path(torch.__file__).parents[1].glob("nvidia/cu13/lib/libcudart.so.13")
    sources = [kernel, _HERE / "fa4_runtime.c", runtime, cudart, tvm_ffi.libinfo.find_libtvm_ffi()]
    command = ["gcc", "-O2", "-shared", "-fPIC", "-Wl,--no-undefined", "-o", library, *sources]
    subprocess.run([str(word) for word in command], check=True)


def main() -> None:
    """See the module's comment."""
    asked: list[str] = []
    contains = cache_utils.JITPersistentCache.__contains__

    def remember(self, key) -> bool:
        asked.append(self._key_to_hash(key))
        return contains(self, key)

    cache_utils.JITPersistentCache.__contains__ = remember
    signature = _signature()
    kernels = {}
    for s in scenarios.select(scenarios.read_scenarios(pathlib.Path(sys.argv[2])), ["gpu*"]):
        if s.kv_dtype != "bf16" or s.beyond_peers:
            continue
        for pages in _PAGES:
            asked.clear()
            called = _call(s.with_pages_of(pages), signature)
            kernels[called] = f"{asked[-1]}.so"
            (kernel,) = (_FOLDER / "objects").rglob(f"{asked[-1]}.o")
            if not (_FOLDER / kernels[called]).exists():
                _link(kernel, _FOLDER / kernels[called])
                print("compiled for", called, flush=True)
    (_FOLDER / "kernels.json").write_text(json.dumps(kernels, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
