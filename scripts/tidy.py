#!/usr/bin/env python3
"""Runs clang-tidy on sources of a build, several at once, and remembers what was clean.

usage: tidy.py BUILD FILE...    exit status 1 if clang-tidy complains about any file

A file that the build does not compile is left out, and said. A clean file is not looked at again
before something changes: its text, that of a header it includes, its compile command, .clang-tidy
or clang-tidy itself. BUILD/tidy/ has an empty file for each state that was clean.
"""

import collections
import concurrent.futures
import hashlib
import json
import os
import pathlib
import shlex
import subprocess
import sys
import time

_TIDY = "clang-tidy-14"


def commands_of(build: pathlib.Path) -> dict[str, tuple[list[str], str]]:
    """Each source's compile command and the folder it runs in, by the source's resolved path."""
    entries = json.loads((build / "compile_commands.json").read_text(encoding="utf-8"))
    return {
        str((pathlib.Path(e["directory"]) / e["file"]).resolve()): (
            shlex.split(e["command"]),
            e["directory"],
        )
        for e in entries
    }


def includes_of(command: list[str], folder: str) -> list[str]:
    """The source and every header it includes, the system's too, as the compiler finds them."""
    output = command.index("-o")
    without_output = command[:output] + command[output + 2 :]
    rule = subprocess.run(
        [*without_output, "-M"], cwd=folder, check=True, capture_output=True, text=True
    ).stdout
    return rule.partition(":")[2].replace("\\\n", " ").split()


def state_of(command: list[str], folder: str, tidy: bytes) -> str:
    """A hash of everything that clang-tidy's answer depends on."""
    state = hashlib.sha256(tidy)
    state.update("\0".join(command).encode())
    for name in includes_of(command, folder):
        state.update(name.encode())
        state.update(hashlib.sha256((pathlib.Path(folder) / name).read_bytes()).digest())
    return state.hexdigest()


def check(source: str, build: pathlib.Path, commands: dict, tidy: bytes) -> tuple[str, str]:
    """What a source is (clean, unchanged, dirty or left out), and what to print of it."""
    path = str(pathlib.Path(source).resolve())
    if path not in commands:
        return "left out", f"{source}: {build} does not compile it"
    clean = build / "tidy" / state_of(*commands[path], tidy)
    if clean.exists():
        return "unchanged", ""
    begin = time.monotonic()
    run = subprocess.run(
        [_TIDY, "-p", str(build), "--quiet", source],
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    seconds = f"{time.monotonic() - begin:.0f} s"
    if run.returncode != 0:
        return "dirty", f"{source}: {seconds}\n{run.stdout}"
    clean.touch()
    return "clean", f"{source}: clean, {seconds}"


def main() -> int:
    """See the module's comment."""
    if len(sys.argv) < 3:
        raise SystemExit("usage: tidy.py BUILD FILE...")
    build = pathlib.Path(sys.argv[1])
    sources = sys.argv[2:]
    commands = commands_of(build)
    (build / "tidy").mkdir(exist_ok=True)
    version = subprocess.run([_TIDY, "--version"], check=True, capture_output=True).stdout
    tidy = version + pathlib.Path(".clang-tidy").read_bytes()
    found: dict[str, list[str]] = collections.defaultdict(list)
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = {pool.submit(check, s, build, commands, tidy): s for s in sources}
        for job in concurrent.futures.as_completed(jobs):
            kind, text = job.result()
            found[kind].append(jobs[job])
            if text:
                print(text, flush=True)
    kinds = ("clean", "unchanged", "dirty", "left out")
    print(f"{len(sources)} files: " + ", ".join(f"{len(found[k])} {k}" for k in kinds))
    for source in sorted(found["dirty"]):
        print(f"dirty: {source}")
    return 1 if found["dirty"] else 0


if __name__ == "__main__":
    sys.exit(main())
