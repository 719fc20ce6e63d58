"""Prints pip's settings as uv's environment variables, one a line:  NAME=VALUE

It runs with the Python whose pip is asked. uv then reads no settings of its own, so all
packages come from where pip is told to get them.
"""

import ast
import subprocess
import sys

# What pip calls a setting, and what uv calls it.
NAMES = {
    "index-url": "UV_DEFAULT_INDEX",
    "extra-index-url": "UV_INDEX",
    "find-links": "UV_FIND_LINKS",
    "no-index": "UV_NO_INDEX",
    "trusted-host": "UV_INSECURE_HOST",
    "proxy": "ALL_PROXY",
    "cert": "SSL_CERT_FILE",
    "client-cert": "SSL_CLIENT_CERT",
}
# Settings of several values, and what separates them in uv's variable. pip has them on
# lines of their own or parted by blanks.
SEPARATORS = {"extra-index-url": " ", "find-links": ",", "trusted-host": " "}
# Where pip has a setting from. A later one overrides an earlier one.
SCOPES = ("global", "install", ":env:")


def read_pip() -> dict[str, str]:
    """What `pip config list` says: the values by scope and name, as "global.cert"."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    answer = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    settings = {}
    for line in answer.stdout.splitlines():
        name, _, literal = line.partition("=")
        settings[name] = str(ast.literal_eval(literal))
    return settings


def for_uv(settings: dict[str, str]) -> dict[str, str]:
    """The same as environment variables of uv."""
    variables = {"UV_NO_CONFIG": "1"}
    for scope in SCOPES:
        for name, variable in NAMES.items():
            if f"{scope}.{name}" in settings:
                value = settings[f"{scope}.{name}"]
                if name in SEPARATORS:
                    value = SEPARATORS[name].join(value.split())
                variables[variable] = value
    if "UV_INDEX" in variables:
        # As pip does: the best version of all indexes, not that of the first.
        variables["UV_INDEX_STRATEGY"] = "unsafe-best-match"
    return variables


if __name__ == "__main__":
    for name, value in for_uv(read_pip()).items():
        print(f"{name}={value}")
