"""Says which Python this is, or why nothing can be built with it.

Any Python must understand this file.
"""
# ruff: noqa: E402, UP031

import platform
import sys
import sysconfig

kind, version = platform.python_implementation(), platform.python_version()
if kind != "CPython" or sys.version_info < (3, 10) or sys.platform != "linux":
    sys.exit(
        "build.sh: CPython 3.10 or newer on Linux is needed, and %s is %s %s on %s; "
        "set PYTHON to another one" % (sys.executable, kind, version, sys.platform)
    )
if sysconfig.get_config_var("Py_GIL_DISABLED"):
    sys.exit(
        "build.sh: %s is a free-threaded build, for which there is no grpcio; "
        "set PYTHON to another one" % sys.executable
    )

import importlib.machinery

print(sys.executable)
# Such as cpython-311-x86_64-linux-gnu.
print(importlib.machinery.EXTENSION_SUFFIXES[0][1:-3])
