"""The rows to time: bench/scenarios.json as bench/harness/scenario.h reads it."""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import pathlib

# Fields of the file, with what they are if not given; docs/performance.md describes them.
_DEFAULTS = {
    "tags": [],
    "num_heads": 64,
    "num_kv_heads": 4,
    "head_size_qk": 192,
    "head_size_v": 128,
    "dtype": "bf16",
    "kv_dtype": None,
    "block_size": 16,
    "window": 0,
    "sinks": False,
    "soft_cap": 0,
    "alibi": False,
    "layout": "NHD",
    "policy": "balanced",
    "backend": "",
}
_GROUP_DEFAULTS = {"count": 1, "ragged": False}
_ELEMENT_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "fp8_e4m3": 1, "fp8_e5m2": 1}


class ScenarioError(Exception):
    """What is wrong with the file, or with a choice among its scenarios."""


@dataclasses.dataclass(frozen=True)
class Scenario:
    """One layer and one step over it."""

    name: str
    tags: tuple[str, ...]
    query_lens: tuple[int, ...]
    seq_lens: tuple[int, ...]  # keys, this step's included
    num_heads: int
    num_kv_heads: int
    head_size_qk: int
    head_size_v: int
    dtype: str
    kv_dtype: str
    block_size: int
    window: int
    sinks: bool
    soft_cap: float
    alibi: bool
    layout: str  # of the cache
    policy: str
    backend: str

    @property
    def num_tokens(self) -> int:
        return sum(self.query_lens)

    @property
    def bytes(self) -> float:
        """What attention must move: keys and values that some row sees, queries, output."""
        keys = 0
        for query_len, seq_len in zip(self.query_lens, self.seq_lens):
            context = seq_len - query_len
            first = max(context - self.window + 1, 0) if self.window > 0 else 0
            keys += seq_len - first
        row = self.head_size_qk + self.head_size_v
        return float(
            keys * self.num_kv_heads * row * _ELEMENT_BYTES[self.kv_dtype]
            + self.num_tokens * self.num_heads * row * _ELEMENT_BYTES[self.dtype]
        )

    @property
    def flops(self) -> float:
        """Multiplications and additions of the visible (row, key) pairs, all heads."""
        pairs = 0
        for query_len, seq_len in zip(self.query_lens, self.seq_lens):
            for position in range(seq_len - query_len, seq_len):
                pairs += min(position + 1, self.window) if self.window > 0 else position + 1
        return float(pairs * 2 * (self.head_size_qk + self.head_size_v) * self.num_heads)

    @property
    def beyond_peers(self) -> str:
        """What no peer is called with here and the reference does not know, "" if nothing."""
        if self.soft_cap != 0:
            return "no soft cap"
        if self.alibi:
            return "no ALiBi"
        return "" if self.layout == "NHD" else f"no {self.layout} cache"

    def with_pages_of(self, block_size: int) -> Scenario:
        """The same with pages of another size."""
        return dataclasses.replace(self, block_size=block_size)


def _read(where: str, fields: dict, defaults: dict, required: tuple[str, ...]) -> dict:
    unknown = set(fields) - set(defaults) - set(required)
    missing = set(required) - set(fields)
    if unknown or missing:
        raise ScenarioError(
            f"{where}: unknown fields {sorted(unknown)}, missing fields {sorted(missing)}"
        )
    return {**defaults, **fields}


def _scenario(where: str, fields: dict) -> Scenario:
    values = _read(where, fields, _DEFAULTS, ("name", "batch"))
    query_lens: list[int] = []
    seq_lens: list[int] = []
    for group in values.pop("batch"):
        group = _read(where, group, _GROUP_DEFAULTS, ("query_len", "seq_len"))
        for i in range(group["count"]):
            query_lens.append(group["query_len"])
            seq_lens.append(group["seq_len"] - (37 * (i + 1) % 61 if group["ragged"] else 0))
    values["tags"] = tuple(values["tags"])
    values["kv_dtype"] = values["kv_dtype"] or values["dtype"]
    return Scenario(query_lens=tuple(query_lens), seq_lens=tuple(seq_lens), **values)


def read_scenarios(path: pathlib.Path) -> list[Scenario]:
    """All scenarios of a file, in its order."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))["scenarios"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ScenarioError(f"{path} is no file of scenarios: {error!r}") from error
    return [
        _scenario(f"{path}: {entry.get('name', f'scenarios[{i}]')}", entry)
        for i, entry in enumerate(entries)
    ]


def select(scenarios: list[Scenario], patterns: list[str]) -> list[Scenario]:
    """Those for GPUs whose name or one of whose tags matches one of the patterns."""
    chosen = []
    for pattern in patterns:
        matching = [
            s
            for s in scenarios
            if s.backend in ("", "cuda")
            and any(fnmatch.fnmatchcase(word, pattern) for word in (s.name, *s.tags))
        ]
        if not matching:
            raise ScenarioError(f"no scenario for a GPU has a name or tag like {pattern!r}")
        chosen += [s for s in matching if s not in chosen]
    return chosen
