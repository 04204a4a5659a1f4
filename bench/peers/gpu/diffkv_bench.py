"""Runs `diffkv bench` on one scenario."""

from __future__ import annotations

import json
import pathlib
import subprocess
import tempfile

from report import FORMAT


class DiffkvBench:
    """The command, whose exit code 1 says that a result was wrong."""

    def __init__(self, command: pathlib.Path, scenarios: pathlib.Path):
        self._command = [str(command), "bench", "--backend", "cuda", "--scenarios", str(scenarios)]

    def run(self, name: str) -> dict:
        """The JSON of a run of that scenario alone. Raises RuntimeError with what the command said
        where there is none."""
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / "result.json"
            # Of no seconds: the least number of repetitions.
            done = subprocess.run(
                [*self._command, "--scenario", name, "--seconds", "0", "--json", str(path)],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                check=False,
            )
            if done.returncode not in (0, 1) or not path.exists():
                raise RuntimeError(f"exit code {done.returncode}: {done.stdout.strip()[-500:]}")
            result = json.loads(path.read_text(encoding="utf-8"))
        if result.get("format") != FORMAT or len(result["scenarios"]) != 1:
            raise RuntimeError(f"not one result of format {FORMAT}: {result.get('format')}")
        return result
