"""Shows that check_sources.py finds each kind of breach, and nothing in sources that keep the
rules."""

import pathlib
import tempfile
import unittest

import check_sources


def problems_of(files: dict[str, str]) -> list[str]:
    """What check() says about a tree of these files."""
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        for name, text in files.items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        return check_sources.check(root)


class CheckSourcesTest(unittest.TestCase):
    """One test a rule: what breaks it is found, what keeps it is not."""

    def assert_found(self, path: str, text: str, *words: str) -> None:
        """Expects exactly one problem, in that file, that mentions the words."""
        problems = problems_of({path: text})
        self.assertEqual(len(problems), 1, problems)
        self.assertTrue(problems[0].startswith(path), problems)
        for word in words:
            self.assertIn(word, problems[0])

    def assert_clean(self, path: str, text: str) -> None:
        """Expects no problem."""
        self.assertEqual(problems_of({path: text}), [])

    def test_includes_point_one_way(self):
        for path, include in [
            ("include/diffkv/x.h", "core/mask.h"),
            ("src/core/x.cc", "plan/schedule.h"),
            ("src/core/x.h", "cpu/backend.h"),
            ("src/plan/x.cc", "cpu/backend.h"),
            ("src/cpu/x.cc", "cuda/backend.h"),
            ("src/cpu/x.cc", "backend/registry.h"),
            ("src/cuda/sm90/x.cuh", "cpu/backend.h"),
            ("src/backend/x.cc", "plan/schedule.h"),
            ("src/pipeline.cc", "cpu/backend.h"),
            ("src/pipeline.cc", "verify/reference.h"),
            ("src/replay/x.cc", "plan/schedule.h"),
        ]:
            with self.subTest(path=path, include=include):
                self.assert_found(path, f'#include "{include}"\n', include)

    def test_reference_shares_nothing(self):
        for include in ["core/mask.h", "plan/schedule.h", "cpu/backend.h", "replay/trace.h"]:
            with self.subTest(include=include):
                self.assert_found("src/verify/x.cc", f'#include "{include}"\n', include)

    def test_allowed_includes(self):
        for path, include in [
            ("src/cpu/x.cc", "plan/schedule.h"),
            ("src/cpu/x.cc", "hwy/highway.h"),
            ("src/cuda/x.cu", "cuda_runtime.h"),
            ("src/backend/registry.cc", "cpu/backend.h"),
            ("src/pipeline.cc", "plan/host_plan.h"),
            ("src/plan/plan.cc", "diffkv/plan.h"),
            ("src/core/x.cc", "fmt/format.h"),
            ("cli/info.cc", "cpu/targets.h"),
            ("tests/core/x.cc", "core/mask.h"),
        ]:
            with self.subTest(path=path, include=include):
                self.assert_clean(path, f'#include "{include}"\n')

    def test_foreign_headers(self):
        for path, include in [
            ("src/core/x.h", "hwy/highway.h"),
            ("src/cpu/x.h", "cuda_runtime.h"),
            ("src/plan/x.h", "immintrin.h"),
            ("src/plan/x.cc", "torch/torch.h"),
            ("include/diffkv/x.h", "Python.h"),
            ("include/diffkv/x.h", "cuda_bf16.h"),
            ("include/diffkv/x.h", "iostream"),
            ("include/diffkv/x.h", "fmt/format.h"),
        ]:
            with self.subTest(path=path, include=include):
                self.assert_found(path, f"#include <{include}>\n", include)

    def test_library_never_prints_or_exits(self):
        for call in [
            "std::cout << 1;",
            'printf("a");',
            'std::fprintf(stderr, "a");',
            "std::exit(1);",
            "std::abort();",
            'fmt::print("a");',
        ]:
            with self.subTest(call=call):
                self.assert_found("src/core/x.cc", f"void f() {{ {call} }}\n", "x.cc:1")
                self.assert_clean("src/replay/x.cc", f"void f() {{ {call} }}\n")
        self.assert_clean("src/core/x.cc", '// exit(1)\nconst char* s = "abort()";\n')

    def test_length(self):
        self.assert_clean("src/core/x.cc", "\n" * 400)
        self.assert_found("src/core/x.cc", "\n" * 401, "401 lines, at most 400")
        self.assert_clean("src/cpu/attend.cc", "\n" * 600)
        self.assert_found("src/cpu/attend.cc", "\n" * 601, "at most 600")
        self.assert_found("src/cuda/sm90/attend.cuh", "\n" * 601, "at most 600")
        self.assert_found("scripts/x.py", "\n" * 401, "at most 400")
        self.assert_clean("build/x.cc", "\n" * 401)

    def test_links(self):
        self.assert_found("docs/a.md", "[b](b.md)\n", "no such file")
        self.assert_found("docs/a.md", "# One\n[b](#two)\n", "no such heading")
        self.assert_clean("docs/a.md", "# Two words: `x`\n[b](#two-words-x) [c](../docs/a.md)\n")
        self.assert_clean("docs/a.md", "[x](https://example.org/x) \n```\n[b](b.md)\n```\n")


if __name__ == "__main__":
    unittest.main()
