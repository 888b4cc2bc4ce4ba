# Sourced by demo.sh and test.sh: creates a virtual environment in .venv and installs the package
# with its dependencies, unless that has been done.
# Usage: source scripts/environment.sh EXTRAS     (EXTRAS as in setup.cfg, or empty)
extras=${1:+[$1]}
python=${PYTHON:-python3}
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
    echo "error: PYTHON=$python: is $($python --version); expected Python 3.10 or later" >&2
    exit 2
fi
if ! [ -x .venv/bin/pip ]; then  # none yet, an interrupted one, or one that another program made
    own='_distutils_hack|distutils-precedence.pth|pkg_resources|(pip|setuptools)(-.*)?'
    others=$(ls .venv/lib/python*/site-packages 2>/dev/null | grep -vxE "$own" || true)
    if [ -n "$others" ]; then
        echo "error: .venv: has packages, but no pip; run .venv/bin/python -m ensurepip, or remove it" >&2
        exit 2
    fi
    if ! "$python" -m venv --clear .venv; then
        echo "error: cannot create .venv; on Debian and Ubuntu, install the package python3-venv" >&2
        exit 2
    fi
fi
installed=.venv/installed$extras
if ! cmp -s setup.cfg "$installed"; then
    echo "installing into .venv (only once; torch is large)"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -e ".$extras"
    cp setup.cfg "$installed"
fi
