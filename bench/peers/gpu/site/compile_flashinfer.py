"""Compiles the modules of FlashInfer that the scenarios need, for Hopper, without a GPU.

usage: compile_flashinfer.py FOLDER    (started by make_site.py)

FOLDER gets NAME/NAME.so for each module, as FlashInfer looks for modules that were built ahead. Of
a module's eight kernel files only the causal one over pages is compiled: the others' symbols stay
undefined, and are looked up only when called.
"""

import os
import pathlib
import shutil
import sys

_FOLDER = pathlib.Path(sys.argv[1]).resolve()
os.environ["FLASHINFER_CUDA_ARCH_LIST"] = "9.0a"
os.environ["FLASHINFER_WORKSPACE_BASE"] = str(_FOLDER / "workspace")

import flashinfer.jit.attention.modules as modules
import flashinfer.prefill
import torch
from flashinfer.attention import BatchAttentionWithAttentionSinkWrapper

_HEAD_SIZES = (192, 128)
_WINDOWS = (-1, 127)  # with sinks; it matters only whether there is one


class _Stop(Exception):
    pass


def _specs() -> list:
    bf16 = torch.bfloat16
    plain = modules._gen_batch_prefill_primary_module(
        "fa2", bf16, bf16, bf16, torch.int32, *_HEAD_SIZES, 0, False, False, False
    )
    specs = [plain]

    def take_spec(backend, *arguments, **options):
        specs.append(modules.gen_customize_batch_prefill_module(backend, *arguments, **options))
        raise _Stop

    # What the wrapper asks for in its constructor, before it needs a GPU.
    flashinfer.prefill.get_customize_batch_prefill_module = take_spec
    for window in _WINDOWS:
        try:
            BatchAttentionWithAttentionSinkWrapper(
                torch.empty(1 << 20, dtype=torch.uint8),
                "NHD",
                backend="fa2",
                head_dim_qk=_HEAD_SIZES[0],
                head_dim_vo=_HEAD_SIZES[1],
                window_left=window,
            )
        except _Stop:
            pass
    return specs


def _is_needed(source: pathlib.Path) -> bool:
    return "kernel_mask" not in source.name or source.name == "batch_prefill_paged_kernel_mask_1.cu"


def main() -> None:
    """See the module's comment."""
    for spec in _specs():
        spec.sources = [source for source in spec.sources if _is_needed(pathlib.Path(source))]
        target = _FOLDER / spec.name / f"{spec.name}.so"
        if not target.exists():
            spec.build()
            target.parent.mkdir(exist_ok=True)
            shutil.copy2(spec.get_library_path(), target)
        print(spec.name, flush=True)


if __name__ == "__main__":
    main()
