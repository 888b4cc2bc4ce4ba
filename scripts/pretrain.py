"""Runs the command in pretrain/commands/pretrain.py, which --help describes."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # else `import pretrain` finds a script

from pretrain.commands.console import run  # noqa: E402

if __name__ == "__main__":
    sys.exit(run("pretrain"))
