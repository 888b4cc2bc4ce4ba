"""What starts a command: scripts/, `bert-NAME` of an installed package, `python -m pretrain`."""

import importlib
import sys
from pathlib import Path

from pretrain.cli import CONSOLE_PREFIX, run_command


def main() -> int:
    """Run the command that this program is named after; returns its exit code."""
    name = Path(sys.argv[0]).name.removeprefix(CONSOLE_PREFIX)
    return run(name.replace("-", "_"))


def run(name: str) -> int:
    """Run the command in pretrain/commands/`name`.py on this process's command line."""
    module = importlib.import_module(f"pretrain.commands.{name}")
    return run_command(module.main, sys.argv[1:], getattr(module, "HINT", ""))
