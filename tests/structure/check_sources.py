"""The rules about the shape of the sources: who includes whom, what the library may call, how long
a file may be, and that links between documents lead somewhere.

usage: check_sources.py ROOT    prints what is wrong, a line each; exit status 1 if anything is
"""

import pathlib
import re
import sys
from collections.abc import Iterator

# Folders of generated or foreign files, wherever they are.
_SKIPPED_FOLDERS = {".git", "build", ".cache", ".venv", "__pycache__", "node_modules"}

# Parts of the tree by the folder they live in, and the parts each may include. Longest folder
# first; the files directly in src/ are the pipeline.
_PARTS = {
    "include/diffkv": {"include/diffkv"},
    "src/core": {"include/diffkv", "src/core"},
    "src/plan": {"include/diffkv", "src/core", "src/plan"},
    "src/cpu": {"include/diffkv", "src/core", "src/plan", "src/cpu"},
    "src/cuda": {"include/diffkv", "src/core", "src/plan", "src/cuda"},
    "src/backend": {"include/diffkv", "src/core", "src/cpu", "src/cuda", "src/backend"},
    # A device as programs see it, which know the library from outside.
    "src/device": {"include/diffkv", "src/device"},
    # The reference shares nothing with what it judges.
    "src/verify": {"include/diffkv", "src/device", "src/verify"},
    # A caller of the library that can compare its steps with the reference.
    "src/replay": {"include/diffkv", "src/core", "src/device", "src/verify", "src/replay"},
    "src": {"include/diffkv", "src/core", "src/plan", "src/backend", "src"},
}
# Parts that are the installed library: they never print and never end the program.
_LIBRARY = {"include/diffkv", "src", "src/core", "src/plan", "src/cpu", "src/cuda", "src/backend"}

# Foreign headers and the only parts that may include them (empty: nobody).
_FOREIGN = [
    (re.compile(r"^hwy/"), {"src/cpu"}),
    (re.compile(r"^(cuda\w*\.h|cuda/std/|cute/|cutlass/|cub/|cooperative_groups)"), {"src/cuda", "src/device"}),
    # Highway 1.0.3 has no products of bf16 pairs.
    (re.compile(r"^(immintrin|x86intrin|[a-z]mmintrin|arm_neon|arm_sve)\.h$"), {"src/cpu"}),
    (re.compile(r"^(torch|ATen|c10|Python\.h|nanobind|pybind11)"), set()),
    (re.compile(r"^(gtest|gmock)/"), set()),
]
# Of the standard library's, what a public header may not bring.
_NOT_PUBLIC = re.compile(r"^(iostream|cstdio|stdio\.h|omp\.h|fmt/|nlohmann/|CLI/)")

_FORBIDDEN_CALL = re.compile(
    r"\bstd::(cout|cerr|clog)\b"
    r"|\b(printf|fprintf|puts|fputs|putchar|perror|abort|exit|_Exit|quick_exit|terminate)\s*\("
    r"|\bfmt::print\b"
)
_INCLUDE = re.compile(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', re.MULTILINE)
_COMMENT_OR_STRING = re.compile(
    r"//[^\n]*|/\*.*?\*/|\"(?:\\.|[^\"\\\n])*\"|'(?:\\.|[^'\\\n])*'", re.DOTALL
)

_CPP = {".h", ".cc", ".cu", ".cuh"}
_CODE = _CPP | {".py", ".sh", ".cmake"}
_MAX_LINES = 400
_MAX_KERNEL_LINES = 600

_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
_HEADING = re.compile(r"^#+\s+(.*?)\s*$", re.MULTILINE)


def files(root: pathlib.Path) -> Iterator[pathlib.Path]:
    """Every file of the project, relative to root, sorted."""
    for path in sorted(root.rglob("*")):
        relative = path.relative_to(root)
        if path.is_file() and not _SKIPPED_FOLDERS.intersection(relative.parts):
            yield relative


def part_of(path: str) -> str:
    """The part of _PARTS a path is in, or '' for tests, cli and other users of all parts."""
    folder = path.rpartition("/")[0]
    while folder:
        if folder in _PARTS:
            return folder
        folder = folder.rpartition("/")[0]
    return ""


def _included_part(include: str) -> str:
    """The part an include as written ("core/mask.h", "diffkv/plan.h") leads to, or ''."""
    if include.startswith("diffkv/"):
        return "include/diffkv"
    return part_of(f"src/{include}")


def check_includes(path: str, text: str) -> Iterator[str]:
    """Breaches of the include direction in one C++ file."""
    part = part_of(path)
    if not part:
        return
    for include in _INCLUDE.findall(text):
        if include.endswith((".h", ".cuh")) and "/" in include:
            target = _included_part(include)
            # A folder of src/ that is no part is a foreign library's.
            is_ours = target not in ("", "src")
            if is_ours and target not in _PARTS[part]:
                yield f"{path}: {part} may not include {target} ({include})"
        for pattern, allowed in _FOREIGN:
            if pattern.match(include) and part not in allowed:
                yield f"{path}: {include} may be included only in {sorted(allowed) or 'no part'}"
        if part == "include/diffkv" and _NOT_PUBLIC.match(include):
            yield f"{path}: a public header may not include {include}"


def check_calls(path: str, text: str) -> Iterator[str]:
    """Library sources that print or end the program."""
    if part_of(path) not in _LIBRARY:
        return
    code = _COMMENT_OR_STRING.sub(lambda m: "\n" * m.group().count("\n") or " ", text)
    for number, line in enumerate(code.splitlines(), 1):
        found = _FORBIDDEN_CALL.search(line)
        if found:
            yield f"{path}:{number}: the library never prints or exits: {found.group()}"


def check_length(path: str, text: str) -> Iterator[str]:
    """Source files that are too long to read."""
    is_kernel = path.endswith(".cuh") or path == "src/cpu/attend.cc"
    most = _MAX_KERNEL_LINES if is_kernel else _MAX_LINES
    lines = len(text.splitlines())
    if lines > most:
        yield f"{path}: {lines} lines, at most {most}"


def _anchors(markdown: str) -> set[str]:
    """The anchors that a rendered document has, one a heading."""
    headings = _HEADING.findall(_FENCED.sub("", markdown))
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


def check_links(root: pathlib.Path, path: str, text: str) -> Iterator[str]:
    """Links of a document to files or headings that are not there."""
    for link in _LINK.findall(_FENCED.sub("", text)):
        if "://" in link or link.startswith("mailto:"):
            continue
        target, _, anchor = link.partition("#")
        file = (root / path).parent / target if target else root / path
        if not file.exists():
            yield f"{path}: link to {link}: no such file"
        elif anchor and anchor not in _anchors(file.read_text(encoding="utf-8")):
            yield f"{path}: link to {link}: no such heading"


def check(root: pathlib.Path) -> list[str]:
    """Everything that is wrong under root."""
    problems = []
    for file in files(root):
        path = file.as_posix()
        if file.suffix not in _CODE and file.suffix != ".md" and file.name != "CMakeLists.txt":
            continue
        text = (root / file).read_text(encoding="utf-8")
        if file.suffix in _CPP:
            problems += check_includes(path, text)
            problems += check_calls(path, text)
        if file.suffix == ".md":
            problems += check_links(root, path, text)
        else:
            problems += check_length(path, text)
    return problems


def main() -> None:
    """See the module's comment."""
    if len(sys.argv) != 2:
        raise SystemExit("usage: check_sources.py ROOT")
    root = pathlib.Path(sys.argv[1])
    if not (root / "include" / "diffkv").is_dir():
        raise SystemExit(f"{root} is not the root of this project: it has no include/diffkv")
    problems = check(root)
    for problem in problems:
        print(problem)
    raise SystemExit(1 if problems else 0)


if __name__ == "__main__":
    main()
