"""The house: which module may import which, who reads the command line and the launcher's variables, a docstring on everything public,
and a help line for every option."""
import ast
import configparser
import dataclasses
import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter

import pytest
from conftest import ROOT

from pretrain import command, config

WINGS = ("data", "model", "runtime")
GROUND = {"pretrain.batch", "pretrain.command", "pretrain.config", "pretrain.files", "pretrain.phases"}  # what a wing may import
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
           for path in sorted((ROOT / "pretrain").rglob("*.py"))}
SCRIPTS = {path.name: path for path in sorted((ROOT / "scripts").glob("*.py"))}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in (MODULES | SCRIPTS).items()}
OPTION_GROUPS = [value for value in vars(config).values() if isinstance(value, type) and dataclasses.is_dataclass(value)]


def imports_of(tree):
    """Modules of the package that a tree imports, anywhere in it."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute here"
            # `from pretrain.data import reading` imports a module, `from pretrain.command import check` a name.
            found |= {name if (name := f"{node.module}.{alias.name}") in MODULES else node.module for alias in node.names}
    return {name for name in found if name.split(".")[0] == "pretrain"}


def wing_of(module):
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in WINGS else None


# Imports.

def test_tests_need_no_optional_package_to_be_collected():
    """As on a machine with a GPU: what setup.cfg names as an extra is imported by `pytest.importorskip`, or inside a test."""
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    extras = {name: settings["options.extras_require"][name].split() for name in settings["options.extras_require"]}
    always = {"pytest", "hypothesis", "tensorboard"}
    known = {"scikit-learn": "sklearn", "ahocorasick-rs": "ahocorasick_rs"}
    optional = {known.get(package, package) for packages in extras.values() for package in packages} - always
    assert {"datasets", "rjieba", "sklearn", "matplotlib"} <= optional
    found = set()
    for path in (ROOT / "tests").rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            found |= {(path.name, name) for name in names if name.split(".")[0] in {*optional, "pyarrow", "triton"}}
    assert not found


def test_there_is_something_to_walk():
    assert {"pretrain.train", "pretrain.batch", "pretrain.data.corpus", "pretrain.runtime.optim"} <= MODULES.keys()
    assert {"pretrain.command", "pretrain.files", "pretrain.parts", "pretrain.text", "pretrain.model.roberta"} <= MODULES.keys()
    assert {wing_of(name) for name in MODULES} == {*WINGS, None} and "pretrain.py" in SCRIPTS
    assert "pretrain.data.tokenizer" in imports_of(TREES["pretrain.setup"])  # imported as a module, under another name
    assert "pretrain.train" in imports_of(TREES["pretrain.py"])  # imported in a function


@pytest.mark.parametrize("module", [name for name in MODULES if wing_of(name)])
def test_a_wing_imports_no_other_wing_and_nothing_above(module):
    wing = f"pretrain.{wing_of(module)}"
    outside = {name for name in imports_of(TREES[module]) if name != wing and not name.startswith(f"{wing}.")}
    assert outside <= GROUND, f"{module} reaches out of its wing"


@pytest.mark.parametrize("module", sorted(GROUND))
def test_the_ground_stands_on_itself(module):
    assert imports_of(TREES[module]) <= GROUND


def test_arrows_only_go_down():
    """No two modules need each other, not even through a third; nothing imports a script."""
    graph = {name: imports_of(TREES[name]) for name in MODULES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))
    assert set().union(*graph.values()) <= MODULES.keys()


# What comes from outside.

def reads_argv(tree):
    return any(isinstance(node, ast.Attribute) and node.attr == "argv" or isinstance(node, ast.alias) and node.name == "argv"
               for node in ast.walk(tree))


def test_only_scripts_read_the_command_line():
    assert [name for name in MODULES if reads_argv(TREES[name])] == []
    assert all(reads_argv(TREES[name]) for name in SCRIPTS)


def test_only_distributed_reads_the_launchers_variables():
    found = {name for name, tree in TREES.items() for node in ast.walk(tree) if isinstance(node, ast.Constant)
             and node.value in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    assert found == {"pretrain.runtime.distributed"}


# Docstrings.

def public_definitions(tree):
    """Public functions, and public methods that are more than one statement: a name says what a single one does."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            yield node
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from (method for method in node.body if isinstance(method, ast.FunctionDef)
                        and not method.name.startswith("_") and len(method.body) > 1)


@pytest.mark.parametrize("name", [name for name in MODULES if TREES[name].body] + list(SCRIPTS))  # empty __init__.py need none
def test_every_module_and_public_function_has_a_docstring(name):
    tree = TREES[name]
    assert ast.get_docstring(tree), f"{name}: says nothing of itself"
    assert [f"{name}:{node.lineno} {node.name}" for node in public_definitions(tree) if not ast.get_docstring(node)] == []


# Options.

@pytest.mark.parametrize("options", OPTION_GROUPS, ids=lambda options: options.__name__)
def test_every_option_has_a_help_line_and_shows(options):
    shown = command.build_parser(options, "").format_help()
    flat = " ".join(shown.split())
    for entry in dataclasses.fields(options):
        text = entry.metadata["help"]
        assert len(text.split()) >= 3, f"{entry.name}: its help line says too little"
        assert re.search(rf"^  --{entry.name.replace('_', '-')}\b", shown, re.MULTILINE), entry.name
        assert re.sub(r"\s|-", "", text) in re.sub(r"\s|-", "", flat), entry.name  # argparse breaks lines at hyphens, too
    assert "--config FILE" in shown


def shown_as(name, call=None):
    """How --help shows an option: by its flag, or by its metavar if it is positional."""
    arguments = {entry.arg: entry.value.value for entry in getattr(call, "keywords", []) if isinstance(entry.value, ast.Constant)}
    return arguments["metavar"] if arguments.get("positional") else f"--{name.replace('_', '-')}"


def options_of(tree):
    """The options that a script declares itself, as --help shows them, and the classes of pretrain.config that it takes over."""
    declared, taken = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            taken |= {base.id for base in node.bases if isinstance(base, ast.Name)}
            declared |= {shown_as(entry.target.id, entry.value) for entry in node.body if isinstance(entry, ast.AnnAssign)
                         and isinstance(entry.value, ast.Call) and getattr(entry.value.func, "id", "") == "option"}
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "parse":
            taken |= {node.args[1].id}
    return declared, taken


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_shows_every_option(name):
    result = subprocess.run([sys.executable, SCRIPTS[name], "--help"], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    declared, taken = options_of(TREES[name])
    groups = [getattr(config, group) for group in taken if dataclasses.is_dataclass(getattr(config, group, None))]
    declared |= {shown_as(entry.name) for group in groups for entry in dataclasses.fields(group)}
    assert declared, "a script without options"
    for option in declared:
        assert re.search(rf"^  {option}(?!\w)", result.stdout, re.MULTILINE), option
    assert ast.get_docstring(TREES[name]).split("\n")[0][:60] in " ".join(result.stdout.split())


def test_help_and_checks_of_values_do_not_wait_for_torch():
    code = "import sys, pretrain.config; sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_no_option_means_two_things():
    """An option that several commands have is spelled alike and is of one type; its default and help may differ."""
    kinds = {}
    for name in [*SCRIPTS, "pretrain.config"]:
        for node in ast.walk(TREES[name]):
            if isinstance(node, ast.AnnAssign) and getattr(getattr(node.value, "func", None), "id", "") == "option":
                kinds.setdefault(node.target.id, {})[name] = ast.unparse(node.annotation).removesuffix(" | None")
    for option, found in kinds.items():
        assert len(set(found.values())) == 1, f"{option}: {found}"


def test_the_table_of_faults_names_tests_that_there_are():
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "tests" / "README.md").read_text()))
    written = {name for file in (ROOT / "tests").rglob("test_*.py") for name in re.findall(r"^def (test_\w+)", file.read_text(), re.M)}
    assert len(named) > 30 and not named - written
