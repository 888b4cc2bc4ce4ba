#!/usr/bin/env bash
# All set-up, then the linter, the formatter and the tests. Options are those of pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh test
.venv/bin/python -m ruff check .
.venv/bin/python -m ruff format --check .
exec .venv/bin/python -m pytest -n auto --maxprocesses 4 "$@"
