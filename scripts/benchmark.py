"""Measure the speeds of this machine beside their peers; scripts/README.md describes the parts."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # else `pretrain` finds a script

from pretrain.cli import run_command  # noqa: E402
from scripts.benchmark.command import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
