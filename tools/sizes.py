"""Fails where a function is too long to be read at once:  sizes.py FILE..."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

MOST_LINES = 40  # of a function, from its `def` to its end


def function_lengths(source: str) -> dict[str, int]:
    """The lines of each function, by its place and name."""
    lengths = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            end = node.end_lineno or node.lineno
            lengths[f"{node.lineno}: {node.name}"] = end - node.lineno + 1
    return lengths


def main() -> int:
    """The program: exit code 1 if any function is above the bound."""
    longest = 0
    for name in sys.argv[1:]:
        source = Path(name).read_text(encoding="utf-8")
        for place, lines in function_lengths(source).items():
            longest = max(longest, lines)
            if lines > MOST_LINES:
                print(f"{name}:{place} has {lines} lines, at most {MOST_LINES} may be")

    print(f"the longest function has {longest} lines, of {MOST_LINES}")
    return int(longest > MOST_LINES)


if __name__ == "__main__":
    sys.exit(main())
