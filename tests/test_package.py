"""The package: one version, a console script for each command, a wheel that works without the
repository, and printed commands that can be run as the program was started."""

import configparser
import os
import pkgutil
import re
import shlex
import shutil
import subprocess
import sys
import zipfile

import pytest
from conftest import ROOT

import pretrain
from pretrain import cli

NAMES = [path.stem for path in sorted((ROOT / "scripts").glob("[!_]*.py"))]
NAMES.remove("benchmark")
SETTINGS = configparser.ConfigParser()
SETTINGS.read(ROOT / "setup.cfg")
BUILD = "from setuptools import build_meta; build_meta.build_wheel('dist')"
# As pip writes one.
CONSOLE_SCRIPT = "import sys\nfrom pretrain.commands.console import main\nsys.exit(main())\n"


def text_of(name):
    return (ROOT / name).read_text("utf-8")


def test_there_is_one_version():
    version = pretrain.__version__
    assert SETTINGS["metadata"]["version"] == "attr: pretrain.__version__"
    assert f"\nversion: {version}\n" in text_of("CITATION.cff")
    assert re.findall(r"^## (\S+)", text_of("CHANGELOG.md"), re.M)[0] == version


def test_each_command_has_a_console_script():
    lines = SETTINGS["options.entry_points"]["console_scripts"].strip().splitlines()
    targets = dict(line.split(" = ") for line in lines)
    assert targets.keys() == {f"bert-{name.replace('_', '-')}" for name in NAMES}
    (target,) = {*targets.values()}
    for name in (target, *(f"pretrain.commands.{name}:main" for name in NAMES)):
        assert callable(pkgutil.resolve_name(name))


@pytest.mark.parametrize(
    "names, is_made",
    [(["pip", "setuptools-65.5.0.dist-info"], True), (["pip", "pip_tools"], False)],
)
def test_an_environment_of_another_program_is_not_cleared(names, is_made, tmp_path):
    """One without pip; one that an interrupted set-up left is made again."""
    for name in names:
        (tmp_path / ".venv" / "lib" / "python3.10" / "site-packages" / name).mkdir(parents=True)
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\n[ "$1" = -c ] || { echo "$@" >made; false; }\n')
    python.chmod(0o755)
    line = f"set -euo pipefail; source {shlex.quote(str(ROOT / 'scripts/environment.sh'))} ''"
    environment = {**os.environ, "PYTHON": str(python)}
    ended = subprocess.run(
        ["bash", "-c", line], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert ended.returncode == 2 and ended.stderr.startswith("error: "), ended
    assert (tmp_path / "made").is_file() == is_made


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """(folder of a wheel's files, names in it). The wheel is built from a copy of the sources."""
    folder = tmp_path_factory.mktemp("package")
    source, site = folder / "source", folder / "site"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "pretrain", source / "pretrain", ignore=ignored)
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = [sys.executable, "-c", BUILD]
    subprocess.run(build, cwd=source, check=True, capture_output=True)
    (wheel,) = (source / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
        return site, archive.namelist()


def test_a_wheel_holds_the_package_its_data_and_its_license(installed):
    site, names = installed
    expected = [path for path in (ROOT / "pretrain").rglob("*.*") if path.suffix != ".pyc"]
    assert {str(path.relative_to(ROOT)) for path in expected} == {
        name for name in names if name.startswith("pretrain/")
    }
    (info,) = site.glob("*.dist-info")
    metadata = (info / "METADATA").read_text("utf-8")
    assert "\nLicense-Expression: Apache-2.0\n" in metadata
    assert f"\nVersion: {pretrain.__version__}\n" in metadata
    assert (info / "licenses" / "LICENSE").read_text("utf-8") == text_of("LICENSE")


def test_a_wheel_works_outside_the_repository(installed, tmp_path):
    """Without a clone, printed commands are console scripts, however the program was started."""
    site, _ = installed
    console = tmp_path / "bert-fill-mask"
    console.write_text(CONSOLE_SCRIPT)
    shows = "from pretrain import cli; print(cli.SCRIPTS, cli.command('show_masks', 'a b'))"
    place = {"cwd": tmp_path, "env": os.environ | {"PYTHONPATH": str(site)}}

    def run(*words):
        found = subprocess.run([sys.executable, *words], **place, capture_output=True, text=True)
        return found.returncode, found.stdout + found.stderr

    version = f"bert-pretrain {pretrain.__version__}\n"
    assert run(console, "--version") == run("-m", "pretrain", "--version") == (0, version)
    assert run(console, "--top", "0")[0] == 2
    assert run("-c", shows) == (0, f"{site / 'scripts'} bert-show-masks 'a b'\n")


def test_printed_commands_are_run_as_the_program_was_started(tmp_path, monkeypatch):
    main = sys.modules["__main__"]
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(main, "__file__", str(ROOT / "scripts" / "pretrain.py"), raising=False)
    words = ("--output", "runs/a b")
    assert cli.command("show_masks", *words) == "python scripts/show_masks.py --output 'runs/a b'"
    monkeypatch.chdir(tmp_path)
    path = shlex.split(cli.command("finetune", 3))[1]
    assert path == str(ROOT / "scripts" / "finetune.py")
    monkeypatch.setattr(main, "__file__", "/usr/bin/bert-pretrain")
    assert cli.command("show_masks", *words) == "bert-show-masks --output 'runs/a b'"
    monkeypatch.delattr(main, "__file__")  # an interactive session
    assert cli.command("finetune").endswith("finetune.py")
