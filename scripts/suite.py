"""Runs the command in pretrain/commands/suite.py, which --help describes."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # else `import pretrain` finds a script

from pretrain.cli import run_command  # noqa: E402
from pretrain.commands.suite import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
