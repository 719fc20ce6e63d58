"""Where a benchmark runs: a folder, with plugins, kubelets, trees and servers."""

from __future__ import annotations

import compileall
import contextlib
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import grpc
from harness import Chip, Kubelet, Plugin, Tree

TOP = Path(__file__).resolve().parents[1]
PYZ = TOP / "dist/tt-device-plugin.pyz"


class Launcher(NamedTuple):
    """A command that starts the plugin, and the folder to start it in."""

    command: list[str]
    folder: Path


class Testbed(contextlib.ExitStack):
    """Where one benchmark runs. Everything that is started in it ends with it."""

    def __init__(self, quick: bool) -> None:
        super().__init__()
        self.quick = quick
        self.numbers = itertools.count()
        self.workdir = Path(tempfile.mkdtemp(prefix="tt-"))
        self.callback(shutil.rmtree, self.workdir, ignore_errors=True)

    def repeat(self, times: int, quick: int) -> range:
        """How often to repeat."""
        return range(quick if self.quick else times)

    def new_path(self, name: str) -> Path:
        """A path for something new."""
        return self.workdir / f"{name}{next(self.numbers)}"

    def tree(self, count: int) -> Tree:
        """A node with so many n150, which have all files of a chip in use."""
        chips = [
            Chip(
                pci=f"{number >> 8:04x}:{number & 255:02x}:00.0",
                index=number,
                asic_id=f"0D0CB6F1E7A5{number:04X}",
                serial=f"010001861190{number:04X}",
            )
            for number in range(count)
        ]
        return Tree(self.new_path("tree"), chips)

    def heartbeats(self, tree: Tree) -> Callable[[int], None]:
        """What writes a number into each heartbeat of the tree.

        In place, as in sysfs, and without the cost of a file that is moved there.
        """
        files = []
        for address in tree.chips:
            path = tree.entry(address) / "tt_heartbeat"
            file = self.enter_context(path.open("r+b", buffering=0))
            files.append(file.fileno())

        def write(beat: int) -> None:
            for file in files:
                os.pwrite(file, b"%d\n" % beat, 0)

        return write

    def kubelet(self) -> Kubelet:
        """One that answers."""
        kubelet = Kubelet(self.new_path("k"))
        self.enter_context(contextlib.closing(kubelet))
        kubelet.start()
        return kubelet

    def plugin(
        self,
        launcher: Launcher,
        tree: Tree,
        kubelet: Kubelet,
        *flags: str,
        log: str = "",
    ) -> Plugin:
        """A plugin process. Its log is read here, or goes into a file."""
        own = ["--kubelet-dir", str(kubelet.root), *tree.flags, *flags]
        command = [*launcher.command, *own]
        if log:
            command = ["sh", "-c", 'exec "$@" 2>"$0"', log, *command]
        plugin = Plugin(command, cwd=launcher.folder)
        return self.enter_context(contextlib.closing(plugin))

    def empty_server(self) -> tuple[subprocess.Popen[str], str]:
        """An empty server that serves, and gRPC's name for its socket."""
        path = self.new_path("empty")
        program = Path(__file__).with_name("empty_server.py")
        server = subprocess.Popen(
            [sys.executable, str(program), str(path)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(self.module().folder)},
        )
        self.callback(server.wait)
        self.callback(server.kill)
        assert server.stdout
        assert server.stdout.readline() == "serving\n"
        return server, f"unix:{path}"

    def module(self) -> Launcher:
        """`python3 -m` of the three files, with bytecode."""
        folder = self.workdir / "module"
        if not folder.exists():
            install(folder)
        return Launcher([sys.executable, "-m", "tt_device_plugin"], folder)

    def launchers(self) -> dict[str, Launcher]:
        """All ways to start. All but `script`, which compiles itself, have bytecode."""
        image = self.workdir / "image"
        for package in ("grpc", "google"):  # with their bytecode, which fits by date
            source = Path(grpc.__file__).parents[1] / package
            shutil.copytree(source, image / package)
        install(image)
        # The Python behind the environment's: the folder's packages are the only ones.
        python = os.path.realpath(sys.executable)
        script = str(TOP / "tt_device_plugin.py")
        launchers = {
            "script": Launcher([sys.executable, script], TOP),
            "module": self.module(),
            "image": Launcher([python, "-m", "tt_device_plugin"], image),
        }
        if PYZ.exists():
            launchers["pyz"] = Launcher([sys.executable, str(PYZ)], self.workdir)
        return launchers


def install(folder: Path) -> None:
    """Copy the plugin's files there, with bytecode."""
    folder.mkdir(exist_ok=True)
    for name in ("tt_device_plugin.py", "api_pb2.py", "api_pb2_grpc.py"):
        shutil.copy(TOP / name, folder)
    compileall.compile_dir(folder, quiet=2, maxlevels=0)
