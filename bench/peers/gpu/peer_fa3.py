"""FlashAttention 3 as vLLM builds and calls it."""

from __future__ import annotations

import torch

from peer import Call, Peer, version_of
from scenarios import Scenario
from workload import FP8_QUERY_SCALE, Workload


class FlashAttention3(Peer):
    """Over an fp8 cache it takes only fp8 queries, which is less exact."""

    name = "fa3"
    pages_matter = True  # pages of 128 tokens are loaded by TMA

    def __init__(self):
        from vllm.vllm_flash_attn import flash_attn_interface

        if not flash_attn_interface.FA3_AVAILABLE:
            raise ImportError(flash_attn_interface.FA3_UNAVAILABLE_REASON)
        self._interface = flash_attn_interface
        self.description = f"FlashAttention 3 of vLLM {version_of('vllm')}"

    def cannot(self, scenario: Scenario) -> str:
        if scenario.sinks and scenario.head_size_qk != scenario.head_size_v:
            return "no sinks where head sizes differ"
        if scenario.kv_dtype not in (scenario.dtype, "fp8_e4m3"):
            return f"no cache of {scenario.kv_dtype}"
        return ""

    def prepare(self, work: Workload) -> Call:
        s = work.scenario
        output = work.new_output()
        fp8 = s.kv_dtype != s.dtype
        query = work.fp8_query if fp8 else work.query
        window = (s.window - 1, 0) if s.window > 0 else (-1, -1)
        options: dict[str, object] = {}
        if fp8:
            shape = (len(s.seq_lens), s.num_kv_heads)
            query_scale = torch.full(shape, FP8_QUERY_SCALE, device=work.device)
            kv_scale = torch.full(shape, work.kv_scale, device=work.device)
            options = {"q_descale": query_scale, "k_descale": kv_scale, "v_descale": kv_scale}
        plan = self._interface.get_scheduler_metadata(
            batch_size=len(s.seq_lens),
            max_seqlen_q=max(s.query_lens),
            max_seqlen_k=max(s.seq_lens),
            num_heads_q=s.num_heads,
            num_heads_kv=s.num_kv_heads,
            headdim=s.head_size_qk,
            headdim_v=s.head_size_v,
            cache_seqlens=work.seq_lens,
            qkv_dtype=query.dtype,
            cu_seqlens_q=work.query_start_loc,
            page_size=s.block_size,
            causal=True,
            window_size=window,
        )

        def run() -> None:
            self._interface.flash_attn_varlen_func(
                q=query,
                k=work.key,
                v=work.value,
                out=output,
                cu_seqlens_q=work.query_start_loc,
                max_seqlen_q=max(s.query_lens),
                seqused_k=work.seq_lens,
                max_seqlen_k=max(s.seq_lens),
                softmax_scale=work.scale,
                causal=True,
                window_size=list(window),
                block_table=work.block_table,
                scheduler_metadata=plan,
                fa_version=3,
                **options,
            )

        return Call(run, output, fp8_query=fp8)
