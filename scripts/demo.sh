#!/usr/bin/env bash
# All set-up, then the main job on the embedded text: about three minutes on two cores. With options, those of pretrain.py.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh ""
[ $# -gt 0 ] || set -- --overwrite  # of runs/default, so that the demo can be shown again
exec .venv/bin/python scripts/pretrain.py "$@"
