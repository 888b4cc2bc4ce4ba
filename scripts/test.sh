#!/usr/bin/env bash
# All set-up, then the linter and the tests. Options are those of pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh test
.venv/bin/python -m ruff check .
exec .venv/bin/python -m pytest -n auto --maxprocesses 4 "$@"
