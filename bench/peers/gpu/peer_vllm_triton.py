"""vLLM's Triton kernel for keys and values of different head sizes (TRITON_ATTN_DIFFKV)."""

from __future__ import annotations

import torch

from peer import Call, Peer, version_of
from scenarios import Scenario
from workload import Workload

# Of vLLM's TritonAttentionMetadataBuilder, which sizes the buffers for keys that are cut.
_MIN_LAUNCH_GRID_SIZE_2D = 128
_SEGMENTS = 16
_MAX_SPECULATIVE_QUERY_LEN = 8


class VllmTriton(Peer):
    """Called as vLLM's TritonAttentionDiffKVImpl.forward does."""

    name = "vllm_triton"

    def __init__(self):
        from vllm.v1.attention.ops import triton_unified_attention_diffkv

        self._attend = triton_unified_attention_diffkv.unified_attention_diffkv
        self.description = f"vLLM {version_of('vllm')}, Triton DiffKV"

    def cannot(self, scenario: Scenario) -> str:
        if scenario.kv_dtype not in (scenario.dtype, "fp8_e4m3"):
            return f"no cache of {scenario.kv_dtype}"
        return ""

    def prepare(self, work: Workload) -> Call:
        s = work.scenario
        output = work.new_output()
        most_seqs = _MIN_LAUNCH_GRID_SIZE_2D // s.num_kv_heads
        query_len = max(s.query_lens)
        # One row a token of a decode, speculated ones included.
        rows = most_seqs * (query_len if query_len <= _MAX_SPECULATIVE_QUERY_LEN else 1)

        def partials(*last: int) -> torch.Tensor:
            shape = (rows, s.num_heads, _SEGMENTS, *last)
            return torch.empty(shape, dtype=torch.float32, device=work.device)

        padded_v = 1 << (s.head_size_v - 1).bit_length()
        options = {
            "seq_threshold_3D": most_seqs,
            "num_par_softmax_segments": _SEGMENTS,
            "softmax_segm_output": partials(padded_v),
            "softmax_segm_max": partials(),
            "softmax_segm_expsum": partials(),
        }
        if s.kv_dtype != s.dtype:
            scale = torch.full((1,), work.kv_scale, device=work.device)
            options.update(k_descale=scale, v_descale=scale)

        def run() -> None:
            self._attend(
                q=work.query,
                k=work.key,
                v=work.value,
                out=output,
                cu_seqlens_q=work.query_start_loc,
                seqused_k=work.seq_lens,
                softmax_scale=work.scale,
                causal=True,
                window_size=(s.window - 1, 0) if s.window > 0 else (-1, -1),
                block_table=work.block_table,
                softcap=0.0,
                max_seqlen_q=query_len,
                sinks=work.sinks,
                **options,
            )

        return Call(run, output)
