"""Where the benchmarks run: a folder, and the plugins, kubelets, trees and servers in it.

Kubelets, trees and the plugin's process are those of the tests.
"""

from __future__ import annotations

import compileall
import contextlib
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import grpc

from test_plugin import Chip, Kubelet, Plugin, Tree

TOP = Path(__file__).resolve().parents[1]
PYZ = TOP / "dist/tt-device-plugin.pyz"


class Way(NamedTuple):
    """A command that starts the plugin, and the folder to start it in."""

    command: list[str]
    folder: Path


class Stage(contextlib.ExitStack):
    """Where a benchmark runs: a folder, and what is started in it. Everything ends with it."""

    def __init__(self, quick: bool) -> None:
        super().__init__()
        self.quick = quick
        self.numbers = itertools.count()
        self.room = Path(tempfile.mkdtemp(prefix="tt-"))
        self.callback(shutil.rmtree, self.room, ignore_errors=True)

    def times(self, often: int, few: int) -> range:
        """How often to repeat."""
        return range(few if self.quick else often)

    def new(self, name: str) -> Path:
        """A path for something new."""
        return self.room / f"{name}{next(self.numbers)}"

    def tree(self, count: int) -> Tree:
        """A node with so many n150."""
        places = [f"{n >> 8:04x}:{n & 255:02x}:00.0" for n in range(count)]
        chips = [Chip(bdf, n, asic_id=f"0D0CB6F1E7A5{n:04X}") for n, bdf in enumerate(places)]
        return Tree(self.new("tree"), chips)

    def hearts(self, tree: Tree) -> Callable[[int], None]:
        """What writes a number into each heartbeat of the tree. In place, as in sysfs: a folder
        that a file is moved into changes its times, and looks like another chip's."""
        paths = [tree.entry(bdf) / "tt_heartbeat" for bdf in tree.chips]
        files = [self.enter_context(path.open("r+b", buffering=0)).fileno() for path in paths]

        def write(beat: int) -> None:
            for file in files:
                os.pwrite(file, b"%d\n" % beat, 0)

        return write

    def beat(self, tree: Tree) -> None:
        """Keeps the hearts of this tree beating till the end."""
        write, done = self.hearts(tree), threading.Event()

        def run() -> None:
            for beat in itertools.count(1000):
                write(beat)
                if done.wait(0.4):
                    return

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        self.callback(thread.join)
        self.callback(done.set)

    def kubelet(self) -> Kubelet:
        """One that answers."""
        kubelet = self.enter_context(contextlib.closing(Kubelet(self.new("k"))))
        kubelet.start()
        return kubelet

    def plugin(self, way: Way, tree: Tree, kubelet: Kubelet, *flags: str, log: str = "") -> Plugin:
        """A plugin process. Its log is read here, or goes into a file."""
        command = [*way.command, "--kubelet-dir", str(kubelet.root), *tree.flags, *flags]
        if log:
            command = ["sh", "-c", 'exec "$@" 2>"$0"', log, *command]
        return self.enter_context(contextlib.closing(Plugin(command, cwd=way.folder)))

    def empty(self) -> tuple[subprocess.Popen[str], str]:
        """An empty server that serves, and gRPC's name for its socket."""
        path = self.new("empty")
        program = Path(__file__).with_name("empty_server.py")
        command = [sys.executable, str(program), str(path)]
        environment = {**os.environ, "PYTHONPATH": str(self.module().folder)}
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        self.callback(server.wait)
        self.callback(server.kill)
        assert server.stdout and server.stdout.readline() == "serving\n"
        return server, f"unix:{path}"

    def module(self) -> Way:
        """`python3 -m` of the three files, with bytecode."""
        folder = self.room / "module"
        if not folder.exists():
            lay_out(folder)
        return Way([sys.executable, "-m", "tt_device_plugin"], folder)

    def ways(self) -> dict[str, Way]:
        """All ways to start. `script` compiles itself at each start, the others have bytecode."""
        image = self.room / "image"
        for package in ("grpc", "google"):  # with their bytecode, which fits by date
            shutil.copytree(Path(grpc.__file__).parents[1] / package, image / package)
        lay_out(image)
        ways = {
            "script": Way([sys.executable, str(TOP / "tt_device_plugin.py")], TOP),
            "module": self.module(),
            # The Python behind the environment's, so that the folder's packages are the only ones.
            "image": Way([os.path.realpath(sys.executable), "-m", "tt_device_plugin"], image),
        }
        return ways | ({"pyz": Way([sys.executable, str(PYZ)], self.room)} if PYZ.exists() else {})


def lay_out(folder: Path) -> None:
    """The plugin's files, with bytecode."""
    folder.mkdir(exist_ok=True)
    for name in ("tt_device_plugin.py", "api_pb2.py", "api_pb2_grpc.py"):
        shutil.copy(TOP / name, folder)
    compileall.compile_dir(folder, quiet=2, maxlevels=0)
