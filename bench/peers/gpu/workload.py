"""A scenario's tensors on the GPU, and what attention over them must give."""

from __future__ import annotations

import functools
import math

import torch

from scenarios import Scenario

_DTYPES = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}
# As in bench/harness/workload.cc: keys and values times this fit e4m3's range.
_FP8_SCALE = 1.0 / 64.0
FP8_QUERY_SCALE = 1.0 / 16.0  # queries are three times as large
_SEED = 20
# What the reference looks at: sequences of a batch and rows of a sequence, spread evenly from the
# first to the last.
_CHECKED_SEQS = 8
_CHECKED_ROWS = 16


def _spread(count: int, most: int) -> list[int]:
    """Up to `most` of range(count), the first and the last among them."""
    if count <= most:
        return list(range(count))
    return sorted({round(i * (count - 1) / (most - 1)) for i in range(most)})


class Workload:
    """One step over one layer: random data, pages in random order.

    query [num_tokens, num_heads, head_size_qk], cache [num_pages, block_size, num_kv_heads,
    head_size_qk + head_size_v] with its views key and value, block_table [num_seqs, max_pages].
    """

    def __init__(self, scenario: Scenario, device: str = "cuda"):
        if scenario.beyond_peers:
            raise ValueError(f"{scenario.name}: {scenario.beyond_peers}")
        s = self.scenario = scenario
        self.device = torch.device(device)
        random = torch.Generator(self.device).manual_seed(_SEED)
        dtype = _DTYPES[s.dtype]

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, device=self.device, dtype=dtype, generator=random)

        # Scores are peaked and values have a mean, so that a wrong output cannot pass as noise.
        self.query = normal(s.num_tokens, s.num_heads, s.head_size_qk).mul_(3)
        pages = [-(-seq_len // s.block_size) for seq_len in s.seq_lens]
        cache = normal(sum(pages), s.block_size, s.num_kv_heads, s.head_size_qk + s.head_size_v)
        cache[..., s.head_size_qk :] += 0.5
        self.kv_scale = 1.0
        if s.kv_dtype != s.dtype:
            self.kv_scale = _FP8_SCALE
            cache = (cache / _FP8_SCALE).to(_DTYPES[s.kv_dtype])
        self.cache = cache
        self.key = cache[..., : s.head_size_qk]
        self.value = cache[..., s.head_size_qk :]
        self.sinks = normal(s.num_heads) if s.sinks else None
        self.scale = 1.0 / math.sqrt(s.head_size_qk)

        self.pages = pages
        order = torch.randperm(sum(pages), device=self.device, generator=random)
        self.page_order = order.to(torch.int32)  # page of each logical block, sequence by sequence
        self.block_table = torch.zeros(
            len(pages), max(pages), device=self.device, dtype=torch.int32
        )
        first = 0
        for seq, count in enumerate(pages):
            self.block_table[seq, :count] = self.page_order[first : first + count]
            first += count
        self.query_start_loc = self._prefix_sums(s.query_lens)
        self.page_start_loc = self._prefix_sums(pages)
        self.seq_lens = torch.tensor(s.seq_lens, device=self.device, dtype=torch.int32)

    def _prefix_sums(self, lengths) -> torch.Tensor:
        sums = torch.tensor([0, *lengths]).cumsum(0)
        return sums.to(device=self.device, dtype=torch.int32)

    def new_output(self) -> torch.Tensor:
        """NaN, so that a row that is not written shows. [num_tokens, num_heads, head_size_v]"""
        s = self.scenario
        shape = (s.num_tokens, s.num_heads, s.head_size_v)
        return torch.full(shape, math.nan, device=self.device, dtype=_DTYPES[s.dtype])

    @functools.cached_property
    def fp8_query(self) -> torch.Tensor:
        """The queries over FP8_QUERY_SCALE, as e4m3."""
        return (self.query.float() / FP8_QUERY_SCALE).to(torch.float8_e4m3fn)

    def worst_error(self, output: torch.Tensor, fp8_query: bool = False) -> tuple[float, int]:
        """The largest |output - reference| / |reference| (2-norms) of the rows and heads that are
        compared, and how many these are. Rows that are not compared must be finite, or the error
        is infinite."""
        worst = 0.0
        count = 0
        for rows, expected in self._fp8_reference if fp8_query else self._reference:
            difference = (output[rows].float() - expected).norm(dim=-1)
            worst = max(worst, float((difference / expected.norm(dim=-1)).max()))
            count += difference.numel()
        return (worst if bool(torch.isfinite(output).all()) else math.inf), count

    @functools.cached_property
    def _reference(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return self._attend_spread(self.query)

    @functools.cached_property
    def _fp8_reference(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return self._attend_spread(self.fp8_query.float() * FP8_QUERY_SCALE)

    def _attend_spread(self, query: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        seqs = _spread(len(self.scenario.seq_lens), _CHECKED_SEQS)
        return [self._attend(seq, query) for seq in seqs]

    def _attend(self, seq: int, query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Token numbers [rows], and the output of these [rows, num_heads, head_size_v] in fp32."""
        s = self.scenario
        seq_len = s.seq_lens[seq]
        row = torch.tensor(_spread(s.query_lens[seq], _CHECKED_ROWS), device=self.device)
        token = row + sum(s.query_lens[:seq])
        group = s.num_heads // s.num_kv_heads
        blocks = self.block_table[seq, : self.pages[seq]].long()
        stored = self.cache[blocks].flatten(0, 1)[:seq_len].float() * self.kv_scale
        key, value = stored.split([s.head_size_qk, s.head_size_v], dim=-1)
        grouped = query[token].float().view(len(row), s.num_kv_heads, group, s.head_size_qk)
        scores = torch.einsum("rhgd,lhd->hgrl", grouped, key) * self.scale
        position = (seq_len - s.query_lens[seq] + row)[:, None]
        key_position = torch.arange(seq_len, device=self.device)[None]
        hidden = key_position > position
        if s.window > 0:
            hidden |= key_position <= position - s.window
        scores.masked_fill_(hidden, -math.inf)
        if self.sinks is not None:
            sinks = self.sinks.float().view(s.num_kv_heads, group, 1, 1)
            scores = torch.cat([scores, sinks.expand(-1, -1, len(row), 1)], dim=-1)
        weights = scores.softmax(dim=-1)[..., :seq_len]
        output = torch.einsum("hgrl,lhd->rhgd", weights, value)
        return token, output.reshape(len(row), s.num_heads, s.head_size_v)
