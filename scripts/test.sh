#!/usr/bin/env bash
# Sets up .venv, then runs the linter, the formatter check, the type check and the tests.
# Takes the options of pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh test
.venv/bin/python -m ruff check .
.venv/bin/python -m ruff format --check .
.venv/bin/python -m mypy
exec .venv/bin/python -m pytest -n auto --maxprocesses 4 "$@"
