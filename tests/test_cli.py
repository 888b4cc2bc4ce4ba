"""Options from a command line and from a file; commands from options; exit codes and messages."""

import dataclasses
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import typing

import pytest
from conftest import ROOT, fail, refusal, refused, script
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.cli import as_command, parse, run_command
from pretrain.config import AdaptOptions, Config, FinetuneOptions
from pretrain.errors import UserError
from pretrain.preflight import validate

VALUES = {
    bool: st.booleans(),
    int: st.integers(-5, 10**6),
    float: st.floats(0, 1e9),
    str: st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=8)
    .flatmap(lambda text: st.sampled_from([text, f"-{text}"]))
    .filter(lambda text: text != "--"),
}


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from([Config, FinetuneOptions, AdaptOptions]))
def test_a_command_parses_to_its_options(data, kind):
    hints, changes = typing.get_type_hints(kind), {}
    for entry in data.draw(st.lists(st.sampled_from(dataclasses.fields(kind)), max_size=6)):
        if {"phases", "max_length"} & changes.keys() and entry.name in ("phases", "max_length"):
            continue
        arguments, hint = entry.metadata["argparse"], hints[entry.name]
        inner = next(part for part in (*typing.get_args(hint), hint) if part in VALUES)
        choices = getattr(entry.metadata["form"], "choices", ())
        values = st.sampled_from(choices) if choices else VALUES[inner]
        if typing.get_origin(hint) is tuple:
            count = arguments["nargs"] if isinstance(arguments["nargs"], int) else 0
            values = st.lists(values, min_size=count or 1, max_size=count or 3).map(tuple)
            values = values.filter(lambda v: len(v) == 1 or not any(str(w)[0] == "-" for w in v))
        changes[entry.name] = data.draw(values)
    options = kind(**changes)
    python, path, *argv = shlex.split(as_command("some", options))
    assert (python, path) == ("python", "scripts/some.py") and parse(argv, kind, "") == options


# Files.


def in_file(folder, content, name="options.yaml"):
    """Write a file of options; returns the arguments that name it."""
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")
    return ["--config", str(path)]


def test_the_command_line_overrides_the_file_and_the_file_the_defaults(tmp_path):
    argv = in_file(tmp_path, "batch-size: 8\nkeep: 5\nlowercase: off\nshard: true\nvalid: [a, b]\n")
    argv += ["--keep", "7", "--no-shard"]
    defaults = {"batch_size": 4, "mask_rate": [0.3, 0.1], "lexicon": None}
    config = parse(argv, Config, "", defaults=defaults)
    assert (config.batch_size, config.keep, config.mask_rate) == (8, 7, (0.3, 0.1))
    assert (config.lowercase, config.shard, config.valid) == ("off", False, ("a", "b"))
    assert parse(argv, Config, "") == dataclasses.replace(config, mask_rate=())


def test_the_home_folder_is_found_where_no_shell_puts_it(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    argv = [*in_file(tmp_path, "train: [~/a, b~/c]\n"), "--cache=~/cache"]
    config = parse(argv, Config, "")
    assert (config.train, config.cache) == (("/home/ada/a", "b~/c"), "/home/ada/cache")


@pytest.mark.parametrize("typed", [["--phases", "32:1"], ["--max-length", "64"]])
def test_a_typed_option_replaces_one_that_it_excludes(typed, tmp_path):
    other = {"max_length": 16} if typed[0] == "--phases" else {"phases": ["16:1"]}
    argv = in_file(tmp_path, other | {"seed": 3})
    for config in (
        parse([*argv, *typed], Config, ""),
        parse([*typed, "--seed", "3"], Config, "", defaults=other),
    ):
        assert validate(config) == [] and config.seed == 3
        assert (config.max_length, config.phases) in ((None, ("32:1",)), (64, ()))
    assert len(validate(parse([*argv, "--max-length", "8", "--phases", "8:1"], Config, ""))) == 1


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("learning_rate: fast", "--learning-rate: "),
        ("width: 3", "width"),
        ("- 1", "list"),
        ("output: {a: b}", "--output {'a': 'b'}: "),
        ("seed: 1\na: [", "line 2"),
    ],
)
def test_a_wrong_file_is_named(content, named, tmp_path):
    argv = in_file(tmp_path, content)
    told = refused(parse, argv, Config, "")
    assert re.match(f"--config {argv[1]}(, line 2)?: ", told) and named in told
    assert "\n" not in told


def test_a_file_with_values_out_of_bounds_is_named(tmp_path, capsys):
    main, argv = script("pretrain").main, in_file(tmp_path, {"precision": "fp8", "max_length": 1})
    told = refusal(main, argv, capsys)
    for value in ("--precision fp8", "--max-length 1"):
        assert f"--config {argv[1]}: {value}: " in told
    told = refusal(main, [*argv, "--precision", "fp32", "--max-length", "2"], capsys)
    assert "--config" not in told and "--max-length 2: " in told


def test_a_file_that_cannot_be_read_is_named_and_an_empty_one_is_none(tmp_path):
    for path in (tmp_path / "absent.yaml", in_file(tmp_path, "{", "garbled.json")[1], tmp_path):
        refused(parse, ["--config", str(path)], Config, "", begins=f"--config {path}: ")
    assert parse(in_file(tmp_path, ""), Config, "") == Config()


def test_a_file_may_hold_options_of_another_command(tmp_path):
    argv = in_file(tmp_path, {"eval_tokens": 5, "seed": 2})
    assert parse(argv, FinetuneOptions, "", ignored=Config).seed == 2
    refused(parse, argv, FinetuneOptions, "", names="eval_tokens")


MISSING = {
    "adapt": "--train --valid --test --model --text",
    "fill_mask": "--model TEXT",
    "predict": "--input --output --model",
}


@pytest.mark.parametrize("name", MISSING)
def test_missing_options_are_reported_at_once(name, capsys):
    lines = refusal(script(name).main, [], capsys).splitlines()
    assert sorted(line.partition(":")[0] for line in lines) == sorted(MISSING[name].split())


# Exit codes.


def kills(number):
    def main(argv):
        try:
            os.kill(os.getpid(), number)
        except KeyboardInterrupt:
            if argv:  # as an import may do, or loading a model
                error = {"import": ImportError, "model": UserError}[argv[0]]
                raise error("broken") from None
            raise

    return main


@pytest.mark.parametrize(
    ("main", "argv", "code", "said"),
    [
        (lambda argv: len(argv), ["a", "b"], 2, ""),
        (fail(UserError("--a 1: x\n--b 2: y")), [], 2, "error: --a 1: x\nerror: --b 2: y\n"),
        (fail(OSError(28, "No space", "disk")), [], 2, "error: disk: No space"),
        (fail(Exception("Too long (os error 36)")), [], 2, "error: a file: "),
        (fail(KeyboardInterrupt()), [], 130, "interrupted; way on\n"),
        (fail(RuntimeError("unexpected")), [], 1, "Traceback"),
        (kills(signal.SIGTERM), [], 143, "interrupted by SIGTERM; way on\n"),
        (kills(signal.SIGUSR1), ["import"], 138, "interrupted by SIGUSR1; way on\n"),
        (kills(signal.SIGTERM), ["model"], 143, "interrupted by SIGTERM; way on\n"),
    ],
)
def test_exit_code_and_messages(main, argv, code, said, capsys):
    before = signal.getsignal(signal.SIGTERM)
    assert run_command(main, argv, "way on") == code
    assert capsys.readouterr().err.startswith(said)
    assert signal.getsignal(signal.SIGTERM) == before


OUTPUT = r"""
import sys
sys.path.insert(0, sys.argv[1])
from pretrain.cli import run_command

def main(argv):
    with open(argv[0], "w") as file:  # not the place of a closed stream
        for number in range(5000):
            print("\u5317\u4eac", number)
        print("end", file=file)
        print("end", file=sys.stderr)

sys.exit(run_command(main, sys.argv[2:]))
"""
OUTPUTS = {  # how the shell runs it, the exit code
    "no reader": ("{} | head -n 1", 0),
    "no output": ("{} >&- 2>&- <&-", 0),
    "ascii": ("LC_ALL=C PYTHONUTF8=0 {}", 0),
    "full disk": ("{} >/dev/full", 2),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_a_lost_output_costs_nothing_else(name, tmp_path):
    line, code = OUTPUTS[name]
    path = tmp_path / "file"
    command = shlex.join([sys.executable, "-c", OUTPUT, str(ROOT), str(path)])
    bash = ["bash", "-c", f"set -o pipefail; {line.format(command)}"]
    ended = subprocess.run(bash, capture_output=True, text=True)
    assert ended.returncode == code and "Traceback" not in ended.stderr, ended
    assert path.read_text() == ("end\n" if code == 0 else "")
    assert ended.stderr.count("\n") == (name != "no output")


def test_an_unknown_or_shortened_option_is_refused(capsys):
    for argv in (["--batch", "8"], ["more"], ["--train", "\udce5"]):
        message = refusal(lambda argv: parse(argv, Config, ""), argv, capsys)
        shown = " ".join(argv).encode("utf-8", "backslashreplace").decode()
        assert shown in message and "\n" not in message
