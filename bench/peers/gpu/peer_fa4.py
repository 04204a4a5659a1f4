"""FlashAttention 4 (the package flash-attn-4)."""

from __future__ import annotations

from peer import Call, Peer, version_of
from scenarios import Scenario
from workload import Workload


class FlashAttention4(Peer):
    """On Hopper it does not cut keys: few long sequences leave most of the GPU idle."""

    name = "fa4"
    pages_matter = True  # pages of 128 tokens are loaded by TMA

    def __init__(self):
        # The public flash_attn_varlen_func allocates its output; this one takes ours.
        from flash_attn.cute.interface import _flash_attn_fwd

        self._attend = _flash_attn_fwd
        self.description = f"flash-attn-4 {version_of('flash-attn-4')}"

    def cannot(self, scenario: Scenario) -> str:
        return f"no cache of {scenario.kv_dtype}" if scenario.kv_dtype != scenario.dtype else ""

    def prepare(self, work: Workload) -> Call:
        s = work.scenario
        output = work.new_output()
        window = (s.window - 1, 0) if s.window > 0 else (None, None)

        def run() -> None:
            self._attend(
                work.query,
                work.key,
                work.value,
                cu_seqlens_q=work.query_start_loc,
                seqused_k=work.seq_lens,
                page_table=work.block_table,
                max_seqlen_q=max(s.query_lens),
                softmax_scale=work.scale,
                causal=s.window == 0,  # a window to the left and none to the right is causal
                window_size_left=window[0],
                window_size_right=window[1],
                learnable_sink=work.sinks,
                out=output,
                num_splits=1,
            )

        return Call(run, output)
