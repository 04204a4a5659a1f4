#!/usr/bin/env python3
"""Times diffkv and other libraries' kernels on one GPU, in turn, and prints them side by side.

A scenario of bench/scenarios.json is one row. Of each peer one launch is first compared with a
reference in fp32; a peer that is wrong is not timed. Then, in each round, `diffkv bench` times the
row and after it every peer, in the same way: a CUDA graph launched from cold caches, the GPU's
clock round one launch, the median of the repetitions. Of the rounds the one with the least median
counts. `best` is the fastest peer of the row.

Python needs torch, and what the peers need; one that cannot be imported is left out by name.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import pathlib
import re
import sys
import time
from collections.abc import Iterator

import scenarios as scenario_file
from report import OURS, Outcome, Row, column, our_json, peer_json, table, write_json

_ROOT = pathlib.Path(__file__).resolve().parents[3]
_PEERS = {
    "vllm_triton": ("peer_vllm_triton", "VllmTriton"),
    "fa3": ("peer_fa3", "FlashAttention3"),
    "fa4": ("peer_fa4", "FlashAttention4"),
    "flashinfer": ("peer_flashinfer", "FlashInfer"),
}
# Of the largest relative error (2-norm) of a row and head. A kernel that is right stays far below,
# one that reads a wrong key or misses one is far above.
_TOLERANCE = {"fp32": 1e-4, "fp16": 5e-3, "bf16": 2e-2}
_FP8_QUERY_TOLERANCE = 0.1


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--diffkv",
        type=pathlib.Path,
        default=_ROOT / "build" / "release" / "cli" / "diffkv",
        metavar="FILE",
        help="the command, built with CUDA (default: build/release/cli/diffkv)",
    )
    parser.add_argument(
        "--scenario",
        nargs="+",
        default=["gpu_main"],
        metavar="PATTERN",
        help="names or tags, with *, ? and [...] (default: gpu_main)",
    )
    parser.add_argument(
        "--scenarios",
        type=pathlib.Path,
        default=_ROOT / "bench" / "scenarios.json",
        metavar="FILE",
        help="scenarios of this file (default: bench/scenarios.json)",
    )
    parser.add_argument(
        "--peers",
        nargs="*",
        default=list(_PEERS),
        choices=list(_PEERS),
        help=f"which (default: {' '.join(_PEERS)})",
    )
    parser.add_argument(
        "--site",
        type=pathlib.Path,
        metavar="FOLDER",
        help="a folder of Python packages to import the peers from",
    )
    parser.add_argument(
        "--peer-pages",
        type=int,
        metavar="TOKENS",
        help="also time the peers that larger pages make faster with pages of this size",
    )
    parser.add_argument("--rounds", type=int, default=2, help="of all engines (default: 2)")
    parser.add_argument(
        "--repetitions", type=int, default=20, help="of a peer in a round (default: 20)"
    )
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        metavar="FOLDER",
        help="write table.md and each engine's JSON here, after every row",
    )
    options = parser.parse_args(arguments)
    if options.rounds < 1 or options.repetitions < 1:
        parser.error("--rounds and --repetitions are at least 1")
    return options


class Comparison:
    """The engines of a run and their results so far."""

    def __init__(self, options: argparse.Namespace):
        import torch

        import diffkv_bench
        import timing

        self._options = options
        self._diffkv = diffkv_bench.DiffkvBench(options.diffkv, options.scenarios)
        self._clock = timing.Clock(options.repetitions)
        self._timing = timing
        self._header: dict = {}
        self._rows: list[Row] = []
        self._engines = [OURS]
        self._descriptions: dict[str, str] = {}
        # The peer and the size of its pages, if not the row's, by the name of the column.
        self._peers: dict[str, tuple] = {}
        self.missing: dict[str, str] = {}
        for name in options.peers:
            self._add_peer(name)
        empty = self._clock.empty_launch_seconds() * 1e6
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
        for name, text in self._descriptions.items():
            print(f"{name}: {text}")
        for name, why in self.missing.items():
            print(f"missing: {name}: {why}")
        print(f"a launch that does nothing: {empty:.1f} us\n", flush=True)

    @property
    def ours_failed(self) -> bool:
        """Whether diffkv gave no time, or a wrong result, for some row."""
        return any(row.outcomes[OURS].median is None for row in self._rows)

    def add_row(self, scenario: scenario_file.Scenario) -> None:
        """Times one scenario with every engine."""
        start = time.monotonic()
        row = Row(scenario, {OURS: Outcome()})
        self._rows.append(row)
        calls = self._prepare(row)
        for _ in range(self._options.rounds):
            self._time_ours(row)
            for name, (_, recording, _) in calls.items():
                with self._keep_trouble(name, row.outcomes[name]):
                    row.outcomes[name].offer(self._clock.times(recording))
        for name, (work, recording, call) in calls.items():
            # A kernel whose later launches differ from its first is wrong too.
            with self._keep_trouble(name, row.outcomes[name]):
                self._verify(row.outcomes[name], work, recording, call)
        print(table([row], self._engines))
        print(f"{time.monotonic() - start:.0f} s\n", flush=True)
        self._write()

    def table(self) -> str:
        """Of all rows so far."""
        return table(self._rows, self._engines)

    def _add_peer(self, name: str) -> None:
        module, kind = _PEERS[name]
        try:
            peer = getattr(__import__(module), kind)()
        except (ImportError, OSError, AttributeError) as error:
            self.missing[name] = f"{type(error).__name__}: {error}"
            return
        other = self._options.peer_pages if peer.pages_matter else None
        for pages in [None, other] if other else [None]:
            engine = column(name, pages)
            self._engines.append(engine)
            self._peers[engine] = (peer, pages)
            self._descriptions[engine] = peer.description

    def _prepare(self, row: Row) -> dict[str, tuple]:
        """The peers that are right: workload, recording and call by the name of the column."""
        import workload

        works: dict[int, workload.Workload] = {}
        calls = {}
        for name, (peer, pages) in self._peers.items():
            if pages == row.scenario.block_size:
                continue  # as in the column beside it
            scenario = row.scenario.with_pages_of(pages or row.scenario.block_size)
            outcome = row.outcomes[name] = Outcome()
            outcome.trouble = scenario.beyond_peers or peer.cannot(scenario)
            if outcome.trouble:
                continue
            with self._keep_trouble(name, outcome):
                if scenario.block_size not in works:
                    works[scenario.block_size] = workload.Workload(scenario)
                work = works[scenario.block_size]
                call = peer.prepare(work)
                recording = self._timing.Recording(call.run)
                said = ["fp8 queries"] if call.fp8_query else []
                outcome.note = "; ".join(filter(None, [*said, recording.why_not]))
                self._verify(outcome, work, recording, call)
                if not outcome.wrong:
                    calls[name] = (work, recording, call)
        return calls

    @contextlib.contextmanager
    def _keep_trouble(self, name: str, outcome: Outcome) -> Iterator[None]:
        """Whatever a peer raises is its result, unless the GPU cannot be used any more."""
        import torch

        try:
            yield
        except Exception as error:
            outcome.trouble = f"{type(error).__name__}: {str(error)[:300]}"
            outcome.times = []
            try:
                torch.cuda.synchronize()
            except Exception as broken:
                self._write()
                raise SystemExit(
                    f"{name} left the GPU in an error, which ends this process: {outcome.trouble}\n"
                    "Run again without it (--peers)."
                ) from broken

    def _verify(self, outcome: Outcome, work, recording, call) -> None:
        # So that nothing an earlier launch left can pass as this one's.
        call.output.fill_(math.nan)
        recording.launch()
        outcome.worst_error, outcome.rows = work.worst_error(call.output, call.fp8_query)
        tolerance = _FP8_QUERY_TOLERANCE if call.fp8_query else _TOLERANCE[work.scenario.dtype]
        outcome.tolerance = tolerance
        if not outcome.worst_error <= tolerance:
            outcome.wrong = True
            outcome.times = []
            outcome.trouble = f"error {outcome.worst_error:.3g}, at most {tolerance}"

    def _time_ours(self, row: Row) -> None:
        outcome = row.outcomes[OURS]
        try:
            result = self._diffkv.run(row.scenario.name)
        except (RuntimeError, OSError, ValueError) as error:
            outcome.trouble = str(error)
            return
        self._header = self._header or result
        record = result["scenarios"][0]
        outcome.offer_record(record)
        if not record.get("supported", True):
            outcome.trouble = f"not supported: {record['kernel']}"
        elif not record["verification"]["ok"]:
            outcome.wrong = True
            outcome.trouble = record["verification"]["what"]

    def _write(self) -> None:
        folder = self._options.out
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "table.md").write_text(self.table(), encoding="utf-8")
        if self._header:
            write_json(folder / f"{OURS}.json", our_json(self._header, self._rows))
        for name, text in self._descriptions.items():
            content = peer_json(name, text, self._timing.FLUSH_BYTES, self._rows)
            write_json(folder / (re.sub(r"\W+", "_", name) + ".json"), content)


def main(arguments: list[str]) -> int:
    """Exit code: 0, or 1 if diffkv was wrong or gave no time for a row, or 2 for bad use."""
    options = parse(arguments)
    try:
        chosen = scenario_file.select(
            scenario_file.read_scenarios(options.scenarios), options.scenario
        )
    except scenario_file.ScenarioError as error:
        print(error, file=sys.stderr)
        return 2
    if options.site is not None:
        sys.path.insert(0, str(options.site))
    comparison = Comparison(options)
    for scenario in chosen:
        comparison.add_row(scenario)
    print(comparison.table())
    for name, why in comparison.missing.items():
        print(f"missing: {name}: {why}")
    return 1 if comparison.ours_failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
