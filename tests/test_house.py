"""House rules: which module may import which, which may name an option or read the environment, the
size of the loop, and what the tests may import."""

import ast
import configparser
import re
import subprocess
import sys

import pytest
from conftest import ROOT

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
TREES = {name: ast.parse(path.read_text("utf-8")) for name, path in (MODULES | SCRIPTS).items()}


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


def test_imports_point_down():
    modules = [name for name in MODULES if "." in name]
    pairs = [(module, name) for module in modules for name in imports_of(TREES[module])]
    assert len(pairs) > 100
    for module, name in pairs:
        assert level_of(name) >= level_of(module), f"{module} imports {name}"
        wings = {module.split(".")[1], name.split(".")[1]} & set(WINGS)
        assert len(wings) < 2, f"{module} imports from another wing: {name}"


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


def test_only_commands_and_builders_name_options():
    """In messages: a wing says what is wrong with a value, and its caller adds the option."""
    for module in MODULES:
        nodes = list(ast.walk(TREES[module]))
        docstrings = {node.value for node in nodes if isinstance(node, ast.Expr)}
        named = [
            f"{module}, line {node.lineno}: {node.value}"
            for node in nodes
            if isinstance(node, ast.Constant) and node not in docstrings
            if isinstance(node.value, str) and re.search(r"(?<![\w-])--[a-z]", node.value)
        ]
        assert not named or NAME_FLAGS.fullmatch(module), named


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


HELP = """
import runpy, sys
for path in sys.argv[1:]:
    sys.argv = [path, "--help"]
    try:
        runpy.run_path(path, run_name="__main__")
    except SystemExit as end:
        assert not end.code
assert not {"torch", "transformers"} & sys.modules.keys()
"""


def test_help_of_every_script_imports_no_torch():
    command = [sys.executable, "-c", HELP, *map(str, SCRIPTS.values())]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert re.findall(r"^usage: (\w+)\.py", shown, re.MULTILINE) == list(SCRIPTS)
