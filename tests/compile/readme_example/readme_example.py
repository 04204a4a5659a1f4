"""The example of README.md: extract its source, or run its program and compare the output.

usage: readme_example.py extract README.md OUT.cc
       readme_example.py run README.md PROGRAM
"""

import pathlib
import re
import subprocess
import sys

_FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def example(readme: str) -> tuple[str, str]:
    """The first cpp block and the first text block after it."""
    blocks = _FENCE.findall(readme)
    for i, (language, source) in enumerate(blocks):
        if language == "cpp":
            outputs = [text for lang, text in blocks[i + 1 :] if lang == "text"]
            if not outputs:
                raise SystemExit("README.md: no ```text block with the output of its example")
            return source, outputs[0]
    raise SystemExit("README.md: no ```cpp block")


def main() -> None:
    command, readme, path = sys.argv[1:]
    source, expected = example(pathlib.Path(readme).read_text(encoding="utf-8"))
    if command == "extract":
        pathlib.Path(path).write_text(source, encoding="utf-8")
        return
    result = subprocess.run([path], capture_output=True, text=True, check=False)
    if result.returncode != 0 or result.stdout != expected:
        raise SystemExit(
            f"exit status {result.returncode}, expected 0\n--- printed\n{result.stdout}"
            f"--- README.md says\n{expected}--- stderr\n{result.stderr}"
        )


if __name__ == "__main__":
    main()
