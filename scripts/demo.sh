#!/usr/bin/env bash
# Sets up .venv, then pretrains on the embedded text: about three minutes on two cores.
# Takes the options of pretrain.py.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh ""
[ $# -gt 0 ] || set -- --overwrite  # so that the demo can be repeated in runs/default
exec .venv/bin/python scripts/pretrain.py "$@"
