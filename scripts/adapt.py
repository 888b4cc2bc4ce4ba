"""Does further pretraining on your text help your task? See `pretrain/commands/adapt.py`."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from pretrain.cli import run_command  # noqa: E402
from pretrain.commands.adapt import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:], "the same command resumes where it was"))
