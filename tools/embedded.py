"""Writes the code inside other files into files of its own:  embedded.py FOLDER

So shellcheck and ruff can read it: the shell that Python files give to `sh -c`, and the
Python in daemonset.yaml. Shell stands at the lines that it has in the Python file, so
that what shellcheck says can be found there.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import yaml

TOP = Path(__file__).resolve().parents[1]


class Script(NamedTuple):
    """A shell script inside a Python file."""

    line: int
    options: str
    text: str


def named_strings(tree: ast.Module) -> dict[str, ast.Constant]:
    """The strings that the module gives a name, by that name."""
    strings = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            for target in node.targets:
                if isinstance(target, ast.Name):
                    strings[target.id] = node.value
    return strings


def shell_scripts(source: str) -> Iterator[Script]:
    """The script of each list that has "sh", "-c", SCRIPT."""
    tree = ast.parse(source)
    strings = named_strings(tree)
    for node in ast.walk(tree):
        if not isinstance(node, ast.List):
            continue
        words = node.elts
        for shell, options, script in zip(words, words[1:], words[2:], strict=False):
            match shell, options:
                case ast.Constant(value="sh"), ast.Constant(
                    value="-c" | "-ec" as flags
                ):
                    if isinstance(script, ast.Name):
                        script = strings[script.id]
                    yield Script(script.lineno, flags, ast.literal_eval(script))


def write_shell(path: Path, folder: Path) -> None:
    """Writes the shell scripts of a Python file, each at its own lines."""
    for script in shell_scripts(path.read_text(encoding="utf-8")):
        shebang = "#!/bin/sh -e" if "e" in script.options else "#!/bin/sh"
        padding = "\n" * (script.line - 1)
        target = folder / f"{path.stem}-{script.line}.sh"
        target.write_text(f"{shebang}{padding}{script.text}\n", encoding="utf-8")


def write_python(path: Path, folder: Path) -> None:
    """Writes what a manifest's containers give to `python3 -c`."""
    *_, daemonset = yaml.safe_load_all(path.read_text(encoding="utf-8"))
    for container in daemonset["spec"]["template"]["spec"]["containers"]:
        python, option, program = container["command"]
        if (python, option) != ("python3", "-c"):
            sys.exit(f"{path.name}: the command is not python3 -c PROGRAM")
        target = folder / f"{path.stem}-{container['name']}.py"
        target.write_text(program, encoding="utf-8")


def main(folder: Path) -> None:
    """The program."""
    folder.mkdir(parents=True)
    for path in [*TOP.glob("*.py"), *TOP.glob("tools/*.py")]:
        write_shell(path, folder)
    write_python(TOP / "daemonset.yaml", folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
