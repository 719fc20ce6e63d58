"""Finds dense code and fails where there is too much of it:  density.py [FILE...]

Without arguments it counts the files that have bounds, and its exit code is 1 if one is
above a bound. With arguments it lists what it finds in these files, line by line. Not
every find is wrong: each is a place to ask whether a plainer form reads faster.

parallel          a, b = x, y: one statement for several values. Not counted are swaps,
                  and constants for NAMES_IN_CAPITALS.
nested-if         a conditional expression inside another, or as a part of `and` or `or`
walrus            := elsewhere than in the condition of if, while or a comprehension
index-chain       x[0][1] or each[1].name: a tuple where a record would have names
lambda            a lambda that is neither a sort key nor a default factory
generator-unpack  a, b = (f(x) for x in ...)
no-summary        a docstring of several lines that does not begin with a sentence and a
                  blank line
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

TOP = Path(__file__).resolve().parents[1]

# The most that a file may have of each kind.
BOUNDS = {
    "tt_device_plugin.py": {
        "parallel": 6,
        "nested-if": 0,
        "walrus": 2,
        "index-chain": 0,
        "lambda": 3,
        "generator-unpack": 0,
        "no-summary": 3,
    },
    "test_plugin.py": {
        "parallel": 15,
        "index-chain": 5,
        "lambda": 15,
        "generator-unpack": 0,
    },
}

SENTENCE_ENDS = (".", ":", "?", "!", ")", "]")


class Find(NamedTuple):
    """One place in a file."""

    line: int
    kind: str


class Finder:
    """Looks at each node of a file, and at what is around it."""

    def __init__(self, source: str) -> None:
        self.tree = ast.parse(source)
        self.parents: dict[ast.AST, ast.AST] = {}
        for parent in ast.walk(self.tree):
            for child in ast.iter_child_nodes(parent):
                self.parents[child] = parent

    def find_all(self) -> list[Find]:
        """All finds, in the order of their lines."""
        finds = []
        for node in ast.walk(self.tree):
            for kind in self.kinds(node):
                finds.append(Find(getattr(node, "lineno", 1), kind))
        return sorted(finds)

    def kinds(self, node: ast.AST) -> Iterator[str]:
        """The kinds of dense code that this node is."""
        match node:
            case ast.Assign(
                targets=[ast.Tuple() as target, *_], value=ast.Tuple() as value
            ):
                if is_parallel(target, value):
                    yield "parallel"
            case ast.Assign(targets=[ast.Tuple(), *_], value=ast.GeneratorExp()):
                yield "generator-unpack"
            case ast.IfExp() if self.is_nested(node):
                yield "nested-if"
            case ast.NamedExpr() if not self.is_in_condition(node):
                yield "walrus"
            case ast.Subscript() if self.is_index_chain(node):
                yield "index-chain"
            case ast.Lambda() if not self.is_key(node):
                yield "lambda"
            case (
                ast.Module()
                | ast.ClassDef()
                | ast.FunctionDef()
                | ast.AsyncFunctionDef()
            ):
                if lacks_summary(ast.get_docstring(node) or ""):
                    yield "no-summary"

    def is_nested(self, node: ast.IfExp) -> bool:
        """Whether a conditional expression has another inside, or is part of and/or."""
        conditionals = [one for one in ast.walk(node) if isinstance(one, ast.IfExp)]
        return len(conditionals) > 1 or isinstance(self.parents[node], ast.BoolOp)

    def is_in_condition(self, node: ast.AST) -> bool:
        """Whether operators alone are between this and a condition."""
        parent = self.parents[node]
        if isinstance(parent, ast.BoolOp | ast.BinOp | ast.UnaryOp | ast.Compare):
            return self.is_in_condition(parent)
        if isinstance(parent, ast.If | ast.While):
            return parent.test is node
        return isinstance(parent, ast.comprehension)

    def is_index_chain(self, node: ast.Subscript) -> bool:
        """Whether a constant index is followed by another, or by an attribute.

        each[0].name is the first of several as often as it is a field: not counted.
        """
        index = node.slice
        if not isinstance(index, ast.Constant) or not isinstance(index.value, int):
            return False

        parent = self.parents[node]
        if isinstance(parent, ast.Subscript):
            return parent.value is node and isinstance(parent.slice, ast.Constant)
        if isinstance(parent, ast.Attribute):
            return isinstance(node.value, ast.Name) and index.value != 0
        return False

    def is_key(self, node: ast.Lambda) -> bool:
        """Whether a lambda is a sort key or a default factory."""
        parent = self.parents[node]
        if not isinstance(parent, ast.keyword):
            return False
        return parent.arg in ("key", "default_factory")


def is_parallel(target: ast.Tuple, value: ast.Tuple) -> bool:
    """Whether one tuple is assigned to another, other than for a swap or constants."""
    if all(isinstance(one, ast.Constant) for one in value.elts):
        names = [one.id for one in target.elts if isinstance(one, ast.Name)]
        return len(names) < len(target.elts) or not all(map(str.isupper, names))
    targets = {ast.unparse(one) for one in target.elts}
    values = {ast.unparse(one) for one in value.elts}
    return targets != values


def lacks_summary(docstring: str) -> bool:
    """Whether it has several lines and no summary line with a blank one below."""
    if "\n" not in docstring:
        return False
    first, second, *_ = docstring.split("\n")
    return bool(second.strip()) or not first.endswith(SENTENCE_ENDS)


def list_finds(path: Path) -> None:
    """Prints each kind that a file has, and its lines."""
    finds = Finder(path.read_text(encoding="utf-8")).find_all()
    print(f"{path}: {len(finds)}")
    for kind in sorted({find.kind for find in finds}):
        lines = [str(find.line) for find in finds if find.kind == kind]
        print(f"  {kind} ({len(lines)}): {' '.join(lines)}")


def check_bounds() -> bool:
    """Prints a table of the files with bounds. Says whether all are within them."""
    within = True
    print(f"{'file':20} {'kind':16} {'is':>4} {'at most':>7}")
    for name, bounds in BOUNDS.items():
        finds = Finder((TOP / name).read_text(encoding="utf-8")).find_all()
        for kind, bound in bounds.items():
            lines = [str(find.line) for find in finds if find.kind == kind]
            row = f"{name:20} {kind:16} {len(lines):4} {bound:7}"
            if len(lines) > bound:
                within = False
                row += f"  too many: lines {' '.join(lines)}"
            print(row)
    return within


def main() -> int:
    """The program."""
    if sys.argv[1:]:
        for name in sys.argv[1:]:
            list_finds(Path(name))
        return 0
    return 0 if check_bounds() else 1


if __name__ == "__main__":
    sys.exit(main())
