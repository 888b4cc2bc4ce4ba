"""House rules: which module may import which, which may name an option or read the environment, the
size of the loop, and a help line for every option."""

import ast
import configparser
import dataclasses
import importlib
import re
import subprocess
import sys
import typing
from graphlib import CycleError, TopologicalSorter

import pytest
from conftest import ROOT, script

from pretrain import cli, config
from pretrain.schema import AUTO

LEVELS = (  # from top to bottom: a module imports from its own level or from below
    ("__main__",),
    ("commands",),
    ("adapt",),
    ("finetune", "demo"),
    ("train", "build"),
    ("pretraining", "run"),
    ("corpora", "inputs", "mask_setup", "model_setup", "plan", "recipe", "resume"),
    ("compare",),
    ("evaluate",),
    ("bootstrap", "metrics"),
    ("cli", "plots", "preflight"),
    ("data", "model", "runtime"),
    ("card",),
    ("batch", "config", "schema", "signals", "files", "errors"),
)
WINGS = ("data", "model", "runtime")
NAME_FLAGS = re.compile(
    r"pretrain\.(config|preflight|cli|pretraining|run|resume|build|plan|inputs|corpora|demo"
    r"|(mask|model)_setup|commands\..*|finetune\.build|adapt\.(checks|pipeline|suite))"
)
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "pretrain").rglob("*.py"))
}
SCRIPTS = {path.stem: path for path in sorted((ROOT / "scripts").glob("[!_]*.py"))}
COMMANDS = [name for name in SCRIPTS if name != "benchmark"]
BENCHMARK = {"scripts.benchmark.command": ROOT / "scripts" / "benchmark" / "command.py"}
TREES = {
    name: ast.parse(path.read_text("utf-8"))
    for name, path in (MODULES | SCRIPTS | BENCHMARK).items()
}


def option_classes():
    """Every dataclass of options in the package and the benchmark."""
    found = [*vars(config).values(), *vars(importlib.import_module(*BENCHMARK)).values()]
    for name in MODULES:
        if name.startswith("pretrain.commands."):
            found += vars(importlib.import_module(name)).values()
    classes = [value for value in found if isinstance(value, type)]
    classes = [kind for kind in classes if dataclasses.is_dataclass(kind)]
    return {
        kind.__name__: kind for kind in classes if "help" in dataclasses.fields(kind)[0].metadata
    }


# Imports.


def imports_of(tree):
    """Modules of the package that are imported anywhere in a tree."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute here"
            for alias in node.names:  # a module of a package, or a name of a module
                name = f"{node.module}.{alias.name}"
                found.add(name if name in MODULES else node.module)
    return {name for name in found if name.startswith("pretrain.")}


def level_of(module):
    part = module.split(".")[1]
    (level,) = (number for number, parts in enumerate(LEVELS) if part in parts)
    return level


@pytest.mark.parametrize("module", [name for name in MODULES if "." in name])
def test_imports_point_down(module):
    for name in imports_of(TREES[module]):
        assert level_of(name) >= level_of(module), f"{module} imports {name}"
        wings = {module.split(".")[1], name.split(".")[1]} & set(WINGS)
        assert len(wings) < 2, f"{module} imports from another wing: {name}"


def test_imports_have_no_cycle():
    graph = {name: imports_of(TREES[name]) for name in MODULES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))
    assert set().union(*graph.values()) <= MODULES.keys()
    assert "pretrain.train" in graph["pretrain.commands.pretrain"]  # imported in a function


def test_test_collection_needs_no_optional_package():
    """On a GPU machine they may be missing: tests import the extras of setup.cfg inside functions,
    or by `pytest.importorskip`."""
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    extras = re.sub(r"[>=]\S+", "", " ".join(settings["options.extras_require"].values())).split()
    known = {"scikit-learn": "sklearn", "ahocorasick-rs": "ahocorasick_rs"}
    optional = {known.get(name, name) for name in extras} - {"pytest", "hypothesis"}
    assert {"datasets", "rjieba", "sklearn", "matplotlib"} <= optional
    for path in (ROOT / "tests").rglob("*.py"):
        for node in ast.parse(path.read_text("utf-8")).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            imported = {name.split(".")[0] for name in names}
            assert not imported & {*optional, "pyarrow", "triton"}, path.name


# Who may do what.


@pytest.mark.parametrize("module", MODULES)
def test_only_commands_and_builders_name_options(module):
    """In messages: a wing says what is wrong with a value, and its caller adds the option."""
    docstrings = {node.value for node in ast.walk(TREES[module]) if isinstance(node, ast.Expr)}
    named = [
        f"line {node.lineno}: {node.value}"
        for node in ast.walk(TREES[module])
        if isinstance(node, ast.Constant) and node not in docstrings
        if isinstance(node.value, str) and re.search(r"(?<![\w-])--[a-z]", node.value)
    ]
    named += [
        f"line {node.lineno}: schema.flag"
        for node in ast.walk(TREES[module])
        if isinstance(node, ast.ImportFrom) and node.module == "pretrain.schema"
        if "flag" in {alias.name for alias in node.names}
    ]
    assert NAME_FLAGS.fullmatch(module) or not named


def test_only_scripts_and_commands_read_the_command_line():
    def reads_argv(tree):
        names = (getattr(node, "attr", getattr(node, "name", "")) for node in ast.walk(tree))
        return "argv" in names

    # "pretrain" is the script of that name here: the package itself is empty.
    reading = {name for name in MODULES if name != "pretrain" and reads_argv(TREES[name])}
    assert all(name.startswith("pretrain.commands.") for name in reading)


def test_only_distributed_reads_the_launchers_variables():
    found = {
        name
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and node.value in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    }
    assert found == {"pretrain.runtime.distributed"}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_script_is_a_wrapper_of_its_command(name):
    assert f'run("{name}")' in SCRIPTS[name].read_text("utf-8")
    assert len(SCRIPTS[name].read_text("utf-8").splitlines()) <= 11
    assert script(name).main.__module__ == f"pretrain.commands.{name}"


# How a file looks.


@pytest.mark.parametrize(("name", "limit"), [("train", 80), ("train_step", 60)])
def test_the_loop_fits_on_a_screen(name, limit):
    (function,) = (n for n in TREES["pretrain.train"].body if getattr(n, "name", "") == name)
    assert function.end_lineno - function.lineno + 1 <= limit


@pytest.mark.parametrize("folder", [".", "scripts", "tests", "runs"])
def test_lines_of_a_readme_fit_in_100_columns(folder):
    """Except tables and code blocks."""
    text, is_prose, long = (ROOT / folder / "README.md").read_text("utf-8"), True, []
    for number, line in enumerate(text.splitlines(), start=1):
        is_prose ^= line.lstrip().startswith("```")
        if is_prose and len(line) > 100 and not line.startswith("|"):
            long.append(number)
    assert not long


def test_the_table_of_faults_names_existing_tests():
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "tests" / "README.md").read_text("utf-8")))
    sources = [path.read_text("utf-8") for path in (ROOT / "tests").rglob("test_*.py")]
    written = {name for text in sources for name in re.findall(r"^def (test_\w+)", text, re.M)}
    assert len(named) > 30 and not named - written


# Options.


def test_options_are_frozen_and_say_what_they_are():
    for name, options in option_classes().items():
        assert options.__dataclass_params__.frozen, name
        for entry in dataclasses.fields(options):
            assert len(entry.metadata["help"].split()) >= 3, f"{name}.{entry.name}"
            assert not isinstance(entry.default, list), f"{name}.{entry.name}"


def test_no_option_means_two_things():
    """An option of several commands has one type everywhere; default and help may differ. In a
    command that takes a group and redeclares an option, the bounds stay, too."""
    types = {}
    for options in option_classes().values():
        hints = typing.get_type_hints(options)
        for entry in dataclasses.fields(options):
            kind = str(hints[entry.name]).removesuffix(" | None").removeprefix("<class ")
            kind = kind.removesuffix(" | str") if entry.default == AUTO else kind
            types.setdefault(entry.name, set()).add(kind.strip("'>"))
            for group in options.__mro__[1:-1]:
                original = group.__dataclass_fields__.get(entry.name, entry)
                for key in ("form", "may_change"):
                    assert entry.metadata[key] is original.metadata[key], entry.name
    assert {name: found for name, found in types.items() if len(found) > 1} == {}


HELP = """
import runpy, sys
sys.argv = [sys.argv[1], "--help"]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    assert not end.code
assert not {"torch", "transformers"} & sys.modules.keys()
"""


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_shows_every_option_without_importing_torch(name):
    command = [sys.executable, "-c", HELP, str(SCRIPTS[name])]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    main = f"pretrain.commands.{name}" if name in COMMANDS else next(iter(BENCHMARK))
    (kind,) = set(re.findall(r"parse\(.*?\b(\w*Options|Config)\b", ast.unparse(TREES[main])))
    squeezed = re.sub(r"[\s-]", "", shown)  # argparse breaks lines at hyphens, too
    assert re.sub(r"[\s-]", "", ast.get_docstring(TREES[main]).split("\n")[0])[:50] in squeezed
    for entry in dataclasses.fields(option_classes()[kind]):
        arguments = entry.metadata["argparse"]
        flag = f"--{entry.name.replace('_', '-')}"
        spelled = arguments["metavar"] if arguments.get("positional") else flag
        assert re.search(rf"^  {spelled}(?!\w)", shown, re.MULTILINE), entry.name
        assert re.sub(r"[\s-]", "", entry.metadata["help"]) in squeezed, entry.name


def test_help_shows_groups():
    shown = cli.build_parser(config.Config, "").format_help()
    titles = re.findall(r"^(\w[\w ]*):$", shown, re.MULTILINE)
    expected = (
        "options, model, tokenizer, text, data, objective and masking, optimization, device, run"
    )
    assert titles == expected.split(", ")
