"""FlashInfer's FA2 kernels, whose FA3 ones refuse pages where head sizes differ."""

from __future__ import annotations

import torch

from peer import Call, Peer, version_of
from scenarios import Scenario
from workload import Workload

_WORKSPACE_BYTES = 512 << 20


class FlashInfer(Peer):
    """Its paged wrapper for prefill serves decodes too; sinks are a kernel variant."""

    name = "flashinfer"

    def __init__(self):
        import flashinfer

        self._plain = flashinfer.BatchPrefillWithPagedKVCacheWrapper
        self._with_sinks = flashinfer.BatchAttentionWithAttentionSinkWrapper
        self._workspace: torch.Tensor | None = None
        self.description = f"FlashInfer {version_of('flashinfer-python')}, FA2"

    def cannot(self, scenario: Scenario) -> str:
        if scenario.kv_dtype != scenario.dtype:
            # Built, it ends in an illegal instruction, which would end this process's GPU work.
            return f"no cache of {scenario.kv_dtype} where head sizes differ"
        return ""

    def prepare(self, work: Workload) -> Call:
        s = work.scenario
        output = work.new_output()
        window_left = s.window - 1 if s.window > 0 else -1
        if self._workspace is None:
            self._workspace = torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device=work.device)
        if s.sinks:
            wrapper = self._with_sinks(
                self._workspace,
                "NHD",
                backend="fa2",
                head_dim_qk=s.head_size_qk,
                head_dim_vo=s.head_size_v,
                window_left=window_left,
            )
        else:
            wrapper = self._plain(self._workspace, "NHD", backend="fa2")
        last_page_len = torch.tensor([(n - 1) % s.block_size + 1 for n in s.seq_lens])
        wrapper.plan(
            work.query_start_loc.cpu(),
            work.page_start_loc.cpu(),
            work.page_order,
            last_page_len.to(torch.int32),
            s.num_heads,
            s.num_kv_heads,
            s.head_size_qk,
            s.block_size,
            head_dim_vo=s.head_size_v,
            causal=True,
            sm_scale=work.scale,
            window_left=window_left,
            q_data_type=work.query.dtype,
            kv_data_type=work.key.dtype,
        )
        cache = (work.key, work.value)
        if s.sinks:
            sinks = work.sinks.float()
            return Call(
                lambda: wrapper.run(work.query, cache, sinks, work.scale, out=output), output
            )
        return Call(lambda: wrapper.run(work.query, cache, out=output), output)
