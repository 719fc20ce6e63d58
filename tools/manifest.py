"""Prints daemonset.yaml for an image that has the plugin in it:  manifest.py IMAGE

The parts that serve only a file on the node stand between the comments `[node file` and
`node file]`, and are left out.
"""

import re
import sys
from pathlib import Path

NODE_FILE = re.compile(r"^ *# \[node file\n.*?^ *# node file\]\n", re.M | re.S)
IMAGE = re.compile(r"^( *image:) .*", re.M)

manifest = (Path(__file__).resolve().parents[1] / "daemonset.yaml").read_text()
manifest, parts = NODE_FILE.subn("", manifest)
manifest, images = IMAGE.subn(rf"\1 {sys.argv[1]}", manifest)
if (parts, images) != (4, 1):
    sys.exit(f"daemonset.yaml has {parts} parts for the node's file, {images} images")
print(manifest, end="")
