"""Says how large the files are that people read, and fails where one has outgrown its bound."""

from __future__ import annotations

import ast
import io
import sys
import tokenize
from pathlib import Path

TOP = Path(__file__).resolve().parents[1]
STOP = "You can stop reading here"  # a comment of the module: what follows is an appendix

LAYOUT = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}


def count_lines(text: str) -> int:
    """All lines."""
    return len(text.splitlines())


def count_code(text: str) -> int:
    """Lines that are not blank, a comment, or a string that stands by itself: a docstring."""
    code: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in LAYOUT:
            code.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        match node:
            case ast.Expr(value=ast.Constant(value=str())):
                code.difference_update(range(node.lineno, (node.end_lineno or 0) + 1))
    return len(code)


def find_stop(text: str) -> int:
    """The line of the comment that tells the reader to stop; behind the last line if none does."""
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT and STOP in token.string:
            return token.start[0]
    return sys.maxsize


def longest_function(text: str) -> tuple[int, str]:
    """Its lines from `def` to its end, and its name."""
    found = (0, "none")
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = (node.end_lineno or 0) - node.lineno + 1
            found = max(found, (lines, f"{node.name}, line {node.lineno}"))
    return found


def main() -> int:
    """The program: exit code 1 if anything is above its bound."""
    module = (TOP / "tt_device_plugin.py").read_text()
    function, name = longest_function(module)
    # Size, bound and goal. A bound is what has been reached: it goes down with the file, never up.
    rows = [
        ("tt_device_plugin.py", "lines of code", count_code(module), 1424, 1000),
        ("", "lines", count_lines(module), 2017, 1500),
        ("", "columns", max(map(len, module.splitlines())), 100, 100),
        ("", f"line of {STOP!r}", find_stop(module), 1191, 950),
        ("", f"longest function ({name})", function, 40, 40),
        *(
            (name, "lines", count_lines((TOP / name).read_text()), most, goal)
            for name, most, goal in (
                ("test_plugin.py", 3300, 3300),
                ("README.md", 330, 330),
                ("build.sh", 379, 380),
            )
        ),
    ]
    wide = max(len(what) for _, what, *_ in rows)
    print(f"{'file':20} {'what':{wide}} {'is':>6} {'at most':>7} {'goal':>5}")
    for file, what, size, most, goal in rows:
        shown = "none" if size == sys.maxsize else str(size)
        over = "  too many" if size > most else ""
        print(f"{file:20} {what:{wide}} {shown:>6} {most:7} {goal:5}{over}")
    return int(any(size > most for _, _, size, most, _ in rows))


if __name__ == "__main__":
    sys.exit(main())
