"""`python -m pretrain` is the command bert-pretrain, so that torchrun can start it: `torchrun
--nproc_per_node=4 -m pretrain ...`."""

import sys

from pretrain.commands.console import run

if __name__ == "__main__":
    sys.exit(run("pretrain"))
