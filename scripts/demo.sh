#!/usr/bin/env bash
# All set-up, then the main job on the embedded text: about three minutes on two cores. Options are those of pretrain.py.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh ""
exec .venv/bin/python scripts/pretrain.py --overwrite "$@"
