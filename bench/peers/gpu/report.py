"""Results of the engines side by side, and their files.

An engine's file has the format of `diffkv bench --json` (bench/harness/results.cc), so that
`diffkv bench --from` and `--against` read it.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import pathlib
import statistics

from scenarios import Scenario

FORMAT = "diffkv-bench-1"
OURS = "diffkv"
_OTHER_PAGES = ", pages of "


def column(peer: str, pages: int | None) -> str:
    """The name of a peer's results, with pages of another size than the scenario's if given."""
    return f"{peer}{_OTHER_PAGES}{pages}" if pages else peer


@dataclasses.dataclass
class Outcome:
    """What came of one engine on one scenario. `trouble` says why there is no time."""

    trouble: str = ""
    wrong: bool = False
    note: str = ""  # of what was timed, where it is not what the row says
    times: list[float] = dataclasses.field(default_factory=list)  # s, of the fastest round
    worst_error: float = 0.0
    tolerance: float = 0.0
    rows: int = 0  # compared with the reference
    record: dict | None = None  # of diffkv: its own record of the fastest round

    @property
    def median(self) -> float | None:
        """Seconds; none if it was not timed."""
        if self.record is not None and "attend" in self.record:
            return self.record["attend"]["median_s"]
        return statistics.median(self.times) if self.times else None

    def offer(self, times: list[float]) -> None:
        """Keeps the times of the round with the least median: others only make times longer."""
        if not self.times or statistics.median(times) < statistics.median(self.times):
            self.times = times

    def offer_record(self, record: dict) -> None:
        """The same of a record of `diffkv bench --json`."""
        timed = "attend" in record
        if self.record is None or not timed or record["attend"]["median_s"] < self.median:
            self.record = record


@dataclasses.dataclass
class Row:
    """One scenario: outcomes by the name of the engine."""

    scenario: Scenario
    outcomes: dict[str, Outcome] = dataclasses.field(default_factory=dict)

    @property
    def floor(self) -> float | None:
        """The least time to move the scenario's bytes, as diffkv measured it."""
        ours = self.outcomes.get(OURS)
        return (ours.record or {}).get("floor_s") if ours else None

    def best_peer(self, any_pages: bool) -> tuple[str, float] | None:
        """The fastest engine that is not diffkv, on the same pages or on any."""
        timed = {
            name: outcome.median
            for name, outcome in self.outcomes.items()
            if name != OURS
            and outcome.median is not None
            and (any_pages or _OTHER_PAGES not in name)
        }
        if not timed:
            return None
        name = min(timed, key=timed.__getitem__)
        return name, timed[name]


def _percentile(times: list[float], share: float) -> float:
    """Between the nearest two, as diffkv's."""
    ordered = sorted(times)
    at = share * (len(ordered) - 1)
    below = int(at)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (at - below)


def _microseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e6:.1f}"


def _ratio(numerator: float | None, denominator: float | None) -> str:
    return f"{numerator / denominator:.2f}" if numerator and denominator else "-"


def _cell(outcome: Outcome | None) -> str:
    if outcome is None:
        return "-"
    if outcome.wrong:
        return "WRONG"
    mark = " *" if outcome.note or outcome.trouble else ""
    return _microseconds(outcome.median) + mark


def table(rows: list[Row], engines: list[str]) -> str:
    """Markdown: a row a scenario, times in microseconds; below it what a `*` stands for."""
    peers = [name for name in engines if name != OURS]
    choices = [False, True] if any(_OTHER_PAGES in name for name in peers) else [False]
    heading = ["scenario", "floor", OURS, *peers, f"{OURS} / floor"]
    for any_pages in choices:
        heading += [f"{OURS} / best peer" + (" on any pages" if any_pages else ""), "best"]
    lines = ["| " + " | ".join(heading) + " |"]
    lines.append("| --- |" + " ---: |" * (len(peers) + 3) + " ---: | --- |" * len(choices))
    notes: list[str] = []
    for row in rows:
        ours = row.outcomes.get(OURS)
        median = ours.median if ours else None
        cells = [row.scenario.name, _microseconds(row.floor), _cell(ours)]
        cells += [_cell(row.outcomes.get(name)) for name in peers]
        cells.append(_ratio(median, row.floor))
        for any_pages in choices:
            best = row.best_peer(any_pages)
            cells += [_ratio(median, best[1]), best[0]] if best else ["-", "-"]
        lines.append("| " + " | ".join(cells) + " |")
        for name, outcome in row.outcomes.items():
            said = "; ".join(part for part in (outcome.trouble, outcome.note) if part)
            if said:
                notes.append(f"* {row.scenario.name}, {name}: {said}")
    return "\n".join(lines) + "\n" + ("\n" + "\n".join(notes) + "\n" if notes else "")


def _record(row: Row, outcome: Outcome) -> dict:
    """A peer's outcome as one of the "scenarios" of a file."""
    s = row.scenario
    record = {
        "name": s.name,
        "batch": f"{len(s.seq_lens)} sequences, {s.num_tokens} rows",
        "layer": f"{s.num_heads}/{s.num_kv_heads} heads, pages of {s.block_size}",
        "supported": bool(outcome.rows),
        "kernel": outcome.note or outcome.trouble,
        "bytes": s.bytes,
        "flops": s.flops,
        "soft_cap": s.soft_cap,
        "alibi": s.alibi,
        "layout": s.layout,
        "verification": {
            "ok": bool(outcome.rows) and not outcome.wrong,
            "rows": outcome.rows,
            "wrong": int(outcome.wrong),
            "worst_error": min(outcome.worst_error, 1e30),  # JSON has no infinity
            "tolerance": outcome.tolerance,
            "what": outcome.trouble,
        },
    }
    if outcome.times:
        record["attend"] = {
            "repetitions": len(outcome.times),
            "median_s": outcome.median,
            "least_s": min(outcome.times),
            "p25_s": _percentile(outcome.times, 0.25),
            "p75_s": _percentile(outcome.times, 0.75),
            "preemptions_per_s": 0.0,
        }
        if row.floor:
            record["floor_s"] = row.floor
    return record


def peer_json(name: str, description: str, flush_bytes: int, rows: list[Row]) -> dict:
    """A peer's results in the format of `diffkv bench --json`."""
    return {
        "format": FORMAT,
        "backend": name,
        "description": description,
        "device": True,
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "calibration": {"flush_bytes": flush_bytes},
        "scenarios": [_record(row, row.outcomes[name]) for row in rows if name in row.outcomes],
    }


def our_json(header: dict, rows: list[Row]) -> dict:
    """diffkv's own results, gathered from the files of its runs; `header` is one of these."""
    records = [row.outcomes[OURS].record for row in rows if OURS in row.outcomes]
    return {**header, "scenarios": [record for record in records if record is not None]}


def write_json(path: pathlib.Path, content: dict) -> None:
    """As `diffkv bench` writes it."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
