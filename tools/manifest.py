"""Prints daemonset.yaml for an image that has the plugin in it:  manifest.py IMAGE

What is only for the file on the node stands there between comments, and is left out.
"""

import re
import sys
from pathlib import Path

text = (Path(__file__).resolve().parents[1] / "daemonset.yaml").read_text()
text, blocks = re.subn(r"^ *# \[node file\n.*?^ *# node file\]\n", "", text, flags=re.M | re.S)
text, images = re.subn(r"^( *image:) .*", rf"\1 {sys.argv[1]}", text, flags=re.M)
if (blocks, images) != (4, 1):
    sys.exit(f"build.sh: daemonset.yaml has {blocks} parts for the node's file, {images} images")
print(text, end="")
