"""What bench/peers/gpu/ does without a GPU: reads scenarios, keeps results, makes the table and the
files. With DIFFKV_COMMAND the command must understand scenarios and files alike."""

import contextlib
import io
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import unittest
from unittest import mock

_ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(_ROOT / "bench" / "peers" / "gpu"))

import compare
import diffkv_bench
import report
import scenarios

_SCENARIOS = _ROOT / "bench" / "scenarios.json"
_COMMAND = os.environ.get("DIFFKV_COMMAND")


def scenario(**fields) -> scenarios.Scenario:
    """One read from a file that gives these fields."""
    entry = {"name": "row", "batch": [{"query_len": 1, "seq_len": 100}], **fields}
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "scenarios.json"
        path.write_text(json.dumps({"scenarios": [entry]}), encoding="utf-8")
        return scenarios.read_scenarios(path)[0]


def ours(median_us: float, floor_us: float) -> report.Outcome:
    """diffkv's outcome of a run that gave these times."""
    outcome = report.Outcome()
    outcome.offer_record({"attend": {"median_s": median_us * 1e-6}, "floor_s": floor_us * 1e-6})
    return outcome


def peer(*times_us: float, **fields) -> report.Outcome:
    """A peer's outcome with these times."""
    return report.Outcome(times=[t * 1e-6 for t in times_us], rows=16, tolerance=0.02, **fields)


class ScenariosTest(unittest.TestCase):
    """The file is read as the C++ side reads it."""

    def test_defaults(self):
        s = scenario()
        self.assertEqual((s.num_heads, s.num_kv_heads), (64, 4))
        self.assertEqual((s.head_size_qk, s.head_size_v), (192, 128))
        self.assertEqual((s.dtype, s.kv_dtype, s.block_size), ("bf16", "bf16", 16))
        self.assertEqual((s.window, s.sinks, s.backend), (0, False, ""))
        self.assertEqual((s.soft_cap, s.alibi, s.layout), (0, False, "NHD"))
        self.assertEqual(s.beyond_peers, "")
        self.assertEqual(scenario(dtype="fp16").kv_dtype, "fp16")

    def test_ragged_groups(self):
        batch = [
            {"count": 3, "query_len": 1, "seq_len": 100, "ragged": True},
            {"query_len": 7, "seq_len": 9},
        ]
        s = scenario(batch=batch)
        self.assertEqual(s.seq_lens, (63, 87, 50, 9))
        self.assertEqual(s.query_lens, (1, 1, 1, 7))
        self.assertEqual(s.num_tokens, 10)

    def test_bytes_and_flops(self):
        s = scenario(batch=[{"query_len": 2, "seq_len": 10}])
        self.assertEqual(s.bytes, 10 * 4 * 320 * 2 + 2 * 64 * 320 * 2)
        self.assertEqual(s.flops, (9 + 10) * 2 * 320 * 64)

    def test_window_and_fp8_cache(self):
        s = scenario(
            batch=[{"query_len": 2, "seq_len": 10}], window=3, kv_dtype="fp8_e4m3", num_kv_heads=8
        )
        # The first row sees keys 6 to 8, the second 7 to 9.
        self.assertEqual(s.bytes, 4 * 8 * 320 + 2 * 64 * 320 * 2)
        self.assertEqual(s.flops, 6 * 2 * 320 * 64)

    def test_what_is_beyond_all_peers(self):
        self.assertEqual(scenario(soft_cap=0.5).beyond_peers, "no soft cap")
        self.assertEqual(scenario(alibi=True).beyond_peers, "no ALiBi")
        self.assertEqual(scenario(layout="HND").beyond_peers, "no HND cache")

    def test_unknown_and_missing_fields_are_errors(self):
        for fields in ({"windows": 3}, {"batch": [{"query_len": 1}]}):
            with self.subTest(fields), self.assertRaises(scenarios.ScenarioError):
                scenario(**fields)

    def test_selects_by_name_and_tag_once(self):
        every = scenarios.read_scenarios(_SCENARIOS)
        main = scenarios.select(every, ["gpu_main"])
        self.assertGreater(len(main), 10)
        self.assertTrue(all("gpu_main" in s.tags for s in main))
        again = scenarios.select(every, ["gpu_main", main[0].name])
        self.assertEqual(again, main)
        with self.assertRaises(scenarios.ScenarioError):
            scenarios.select(every, ["gpu_main", "no_such_row"])

    @unittest.skipUnless(_COMMAND, "DIFFKV_COMMAND is not set")
    def test_the_command_reads_the_same(self):
        listed = subprocess.run([_COMMAND, "bench", "--list"], capture_output=True, text=True)
        self.assertEqual(listed.returncode, 0, listed.stderr)
        lines = {}
        for line in listed.stdout.splitlines():
            words = re.split(r"  +", line.strip())
            lines[words[0]] = words
        columns = lines["scenario"]
        every = scenarios.read_scenarios(_SCENARIOS)
        self.assertGreater(len(every), 50)
        for s in every:
            with self.subTest(s.name):
                said = dict(zip(columns, lines[s.name]))
                self.assertEqual(said["heads"], f"{s.num_heads}/{s.num_kv_heads}")
                self.assertEqual(said["MB"], f"{s.bytes / 1e6:.1f}")
                self.assertEqual(said["GFLOP"], f"{s.flops / 1e9:.2f}")


class TableTest(unittest.TestCase):
    """Times, ratios and marks of the table."""

    def cells(self, outcomes: dict, engines: list) -> list:
        """The cells of a table's only row."""
        lines = report.table([report.Row(scenario(), outcomes)], engines).splitlines()
        self.assertEqual(lines[0].count("|"), lines[1].count("|"))
        self.assertEqual(lines[0].count("|"), lines[2].count("|"))
        return [cell.strip() for cell in lines[2].strip("|").split("|")]

    def test_ratios(self):
        outcomes = {"diffkv": ours(110, 100), "fa3": peer(130, 120, 140), "fa4": peer(220)}
        self.assertEqual(
            self.cells(outcomes, ["diffkv", "fa3", "fa4"]),
            ["row", "100.0", "110.0", "130.0", "220.0", "1.10", "0.85", "fa3"],
        )

    def test_other_pages_have_a_ratio_of_their_own(self):
        other = report.column("fa4", 128)
        outcomes = {"diffkv": ours(110, 100), "fa4": peer(220), other: peer(55)}
        cells = self.cells(outcomes, ["diffkv", "fa4", other])
        self.assertEqual(cells[3:], ["220.0", "55.0", "1.10", "0.50", "fa4", "2.00", other])
        self.assertNotIn("any pages", report.table([], ["diffkv", "fa4"]))

    def test_a_wrong_peer_is_never_the_best(self):
        wrong = peer(wrong=True, trouble="error 1, at most 0.02")
        outcomes = {"diffkv": ours(110, 100), "fa3": wrong, "fa4": peer(220)}
        engines = ["diffkv", "fa3", "fa4"]
        cells = self.cells(outcomes, engines)
        self.assertEqual(cells[3:], ["WRONG", "220.0", "1.10", "0.50", "fa4"])
        text = report.table([report.Row(scenario(), outcomes)], engines)
        self.assertIn("* row, fa3: error 1, at most 0.02\n", text)

    def test_what_was_not_timed_has_no_ratio(self):
        refused = report.Outcome(trouble="no sinks")
        cells = self.cells({"diffkv": ours(110, 100), "fa3": refused}, ["diffkv", "fa3", "fa4"])
        self.assertEqual(cells[3:], ["- *", "-", "1.10", "-", "-"])
        failed = report.Outcome(trouble="exit code 2: no such backend")
        cells = self.cells({"diffkv": failed, "fa3": peer(130)}, ["diffkv", "fa3"])
        self.assertEqual(cells[1:], ["-", "- *", "130.0", "-", "-", "fa3"])

    def test_a_note_marks_the_time(self):
        outcomes = {"diffkv": ours(110, 100), "fa3": peer(130, note="fp8 queries")}
        self.assertEqual(self.cells(outcomes, ["diffkv", "fa3"])[3], "130.0 *")

    def test_the_fastest_round_counts(self):
        outcome = peer(5, 6, 7)
        outcome.offer([7e-6, 8e-6, 9e-6])
        self.assertAlmostEqual(outcome.median, 6e-6)
        outcome.offer([3e-6, 4e-6, 9e-6])
        self.assertAlmostEqual(outcome.median, 4e-6)
        ours_now = ours(5, 1)
        ours_now.offer_record({"attend": {"median_s": 6e-6}})
        self.assertAlmostEqual(ours_now.median, 5e-6)
        ours_now.offer_record({"attend": {"median_s": 4e-6}})
        self.assertAlmostEqual(ours_now.median, 4e-6)

    def test_a_round_that_is_wrong_counts(self):
        outcome = ours(5, 1)
        outcome.offer_record({"verification": {"ok": False}})
        self.assertIsNone(outcome.median)


class FilesTest(unittest.TestCase):
    """Files in the format of `diffkv bench --json`."""

    def rows(self) -> list:
        """Two rows: one timed, one that the peer was wrong at."""
        timed = report.Row(scenario(name="a"), {"diffkv": ours(11, 10), "fa3": peer(13, 12, 14)})
        wrong = peer(wrong=True, trouble="error inf", worst_error=float("inf"))
        return [timed, report.Row(scenario(name="b"), {"diffkv": ours(11, 10), "fa3": wrong})]

    def test_a_peer(self):
        content = report.peer_json("fa3", "FlashAttention 3", 1 << 28, self.rows())
        self.assertEqual(content["format"], "diffkv-bench-1")
        timed, wrong = content["scenarios"]
        self.assertEqual(timed["attend"]["repetitions"], 3)
        self.assertAlmostEqual(timed["attend"]["median_s"], 13e-6)
        self.assertAlmostEqual(timed["attend"]["p25_s"], 12.5e-6)
        self.assertAlmostEqual(timed["attend"]["p75_s"], 13.5e-6)
        self.assertAlmostEqual(timed["floor_s"], 10e-6)
        self.assertNotIn("attend", wrong)
        self.assertFalse(wrong["verification"]["ok"])
        self.assertEqual((timed["soft_cap"], timed["alibi"], timed["layout"]), (0, False, "NHD"))
        json.dumps(content, allow_nan=False)

    def test_ours_keeps_every_row(self):
        content = report.our_json({"format": report.FORMAT, "scenarios": []}, self.rows())
        self.assertEqual(len(content["scenarios"]), 2)
        self.assertEqual(content["format"], report.FORMAT)

    @unittest.skipUnless(_COMMAND, "DIFFKV_COMMAND is not set")
    def test_the_command_reads_a_peers_file(self):
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / "fa3.json"
            content = report.peer_json("fa3", "FlashAttention 3", 1 << 28, self.rows()[:1])
            report.write_json(path, content)
            shown = subprocess.run(
                [_COMMAND, "bench", "--from", str(path)], capture_output=True, text=True
            )
        self.assertEqual(shown.returncode, 0, shown.stderr)
        self.assertRegex(shown.stdout, r"\b13\.0\b")


class RefusalTest(unittest.TestCase):
    """No peer is called with what all of them refuse."""

    def refusal(self, **fields) -> str:
        """What a peer that could do everything is said to lack."""
        comparison = compare.Comparison.__new__(compare.Comparison)
        comparison._peers = {"fa3": (mock.Mock(**{"cannot.return_value": ""}), None)}
        row = report.Row(scenario(**fields))
        with mock.patch.dict(sys.modules, workload=mock.Mock()):
            with mock.patch.object(comparison, "_keep_trouble") as called:
                called.return_value.__enter__.side_effect = AssertionError("it was called")
                self.assertEqual(comparison._prepare(row), {})
        return row.outcomes["fa3"].trouble

    def test_features(self):
        self.assertEqual(self.refusal(soft_cap=30), "no soft cap")
        self.assertEqual(self.refusal(alibi=True), "no ALiBi")
        self.assertEqual(self.refusal(layout="HND"), "no HND cache")
        with self.assertRaisesRegex(AssertionError, "it was called"):
            self.refusal()


class CommandTest(unittest.TestCase):
    """The command line, and the runs of the other command."""

    def test_bad_use(self):
        for arguments in (["--rounds", "0"], ["--peers", "cudnn"]):
            with self.subTest(arguments), self.assertRaises(SystemExit) as raised:
                with contextlib.redirect_stderr(io.StringIO()):
                    compare.parse(arguments)
            self.assertEqual(raised.exception.code, 2)
        with contextlib.redirect_stderr(io.StringIO()) as said:
            self.assertEqual(compare.main(["--scenario", "no_such_row"]), 2)
        self.assertIn("no_such_row", said.getvalue())

    def stand_in(self, folder: str, body: str) -> diffkv_bench.DiffkvBench:
        """A command that runs `body`; the last argument is where the result goes."""
        path = pathlib.Path(folder) / "diffkv"
        path.write_text(f"#!/bin/sh\nfor last; do :; done\n{body}\n", encoding="utf-8")
        path.chmod(0o755)
        return diffkv_bench.DiffkvBench(path, _SCENARIOS)

    def test_a_result_of_ours(self):
        result = {"format": report.FORMAT, "scenarios": [{"name": "row"}]}
        with tempfile.TemporaryDirectory() as folder:
            command = self.stand_in(folder, f"echo '{json.dumps(result)}' > \"$last\"; exit 1")
            self.assertEqual(command.run("row"), result)

    def test_no_result_of_ours(self):
        with tempfile.TemporaryDirectory() as folder:
            command = self.stand_in(folder, "echo no such backend; exit 2")
            with self.assertRaisesRegex(RuntimeError, "exit code 2: no such backend"):
                command.run("row")
            for result in (
                {"format": "x", "scenarios": [{}]},
                {"format": report.FORMAT, "scenarios": [{}, {}]},
            ):
                command = self.stand_in(folder, f"echo '{json.dumps(result)}' > \"$last\"")
                with self.assertRaisesRegex(RuntimeError, "not one result"):
                    command.run("row")


if __name__ == "__main__":
    unittest.main()
