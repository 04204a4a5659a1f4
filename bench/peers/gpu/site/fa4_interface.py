"""flash_attn.cute.interface for a machine without FlashAttention 4's compiler.

Beside this file lie kernels.json and the libraries that compile_fa4.py made of FlashAttention 4's
own kernels. A call that none was made for is refused.
"""

import json
import pathlib

import tvm_ffi

_FOLDER = pathlib.Path(__file__).parent
_KERNELS = json.loads((_FOLDER / "kernels.json").read_text(encoding="utf-8"))
_loaded = {}


def signature(q, k, cu_seqlens_q, window_size_left, learnable_sink, max_seqlen_q):
    """What FlashAttention 4 chooses a kernel by, of the calls that are made here."""
    return " ".join(
        str(x)
        for x in (
            *q.shape[:2],
            *k.shape[1:3],
            len(cu_seqlens_q) - 1,
            max_seqlen_q,
            window_size_left,
            learnable_sink is not None,
        )
    )


def _kernel(library):
    if library not in _loaded:
        _loaded[library] = tvm_ffi.load_module(str(_FOLDER / library)).func
    return _loaded[library]


def _flash_attn_fwd(
    q,
    k,
    v,
    *,
    cu_seqlens_q,
    seqused_k,
    page_table,
    max_seqlen_q,
    softmax_scale,
    causal,
    window_size_left,
    window_size_right,
    learnable_sink,
    out,
    num_splits,
):
    wanted = signature(q, k, cu_seqlens_q, window_size_left, learnable_sink, max_seqlen_q)
    if causal == (window_size_left is not None) or num_splits != 1 or wanted not in _KERNELS:
        raise NotImplementedError(f"no kernel was compiled ahead for {wanted}")
    _kernel(_KERNELS[wanted])(
        q,
        k,
        v,
        out,
        None,  # lse
        softmax_scale,
        cu_seqlens_q,
        None,  # cu_seqlens_k
        None,  # seqused_q
        seqused_k,
        page_table,
        window_size_left,
        window_size_right,
        learnable_sink,
        None,  # block_sparse_tensors
        (None, None),  # auxiliary tensors and scalars
        None,  # cu_total_m_blocks
        None,  # cu_total_splits_m_blocks
    )
