# Sourced by demo.sh and test.sh: a virtual environment in .venv with the package and what it needs. Does nothing twice.
# Usage: source scripts/environment.sh EXTRAS     (EXTRAS as in setup.cfg, or empty)
extras=${1:+[$1]}
python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "error: $($python --version); needed is Python 3.10 or later (PYTHON=... chooses one)" >&2; exit 2; }
[ -x .venv/bin/pip ] || "$python" -m venv --clear .venv || { echo "error: no virtual environment; Debian and Ubuntu need the package python3-venv" >&2; exit 2; }
installed=.venv/installed$extras
if ! cmp -s setup.cfg "$installed"; then
    echo "installing into .venv (once; torch is large)"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -e ".$extras"
    cp setup.cfg "$installed"
fi
