"""Rung 0: ruff, clang-format and the project's own patterns. Exits non-zero with one line per finding."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent

# (files, pattern, where it is allowed, what to do instead)
PATTERNS = [
    ("csrc/**/*", r"<<<", {"csrc/common/launch.cuh"}, "launch kernels through fastseg::launch"),
    ("csrc/**/*", r"(?<!const_)(?<!mutable_)data_ptr<", set(), "use const_data_ptr or mutable_data_ptr"),
    ("csrc/**/*.cuh", r"#include <(ATen|torch|c10)/", set(), "kernels are free of torch headers"),
    ("fastseg/ops/**/*.py", r"\.item\(\)|\.cpu\(\)|synchronize\(", set(), "operators never wait for the device"),
    ("**/*.py", r"^\s*#.*\b(TODO|FIXME|XXX)\b", set(), "finish it, or write an issue"),
    ("tests/**/*.py", r"\b[ar]tol=(?!1e-5\b)", set(), "bounds live in fastseg/testing.py"),
]


def tracked(*globs: str) -> list[str]:
    """Files that git tracks or would add, so that build products are not linted."""
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *globs],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return sorted(line for line in set(listing.stdout.splitlines()) if (ROOT / line).exists())


def patterns() -> list[str]:
    findings = []
    for glob, pattern, allowed, instead in PATTERNS:
        expression = re.compile(pattern, re.MULTILINE)
        for name in tracked(f":(glob){glob}"):
            if name in allowed or name == "tests/lint.py":
                continue
            text = (ROOT / name).read_text(errors="replace")
            for match in expression.finditer(text):
                line = text[: match.start()].count("\n") + 1
                findings.append(f"{name}:{line}: {match.group(0).strip()!r}: {instead}")
    return findings


def main() -> int:
    failed = 0
    for command in (
        [str(BIN / "ruff"), "check", "."],
        [str(BIN / "ruff"), "format", "--check", "."],
        [str(BIN / "clang-format"), "--dry-run", "--Werror", *tracked("*.cpp", "*.cu", "*.cuh", "*.h")],
    ):
        failed |= subprocess.run(command, cwd=ROOT, check=False).returncode
    findings = patterns()
    print("\n".join(findings) or "patterns: nothing found")
    return 1 if failed or findings else 0


if __name__ == "__main__":
    sys.exit(main())
