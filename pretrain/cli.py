"""From a command line to options: argparse from a dataclass, `--config FILE`, and exit codes.

What the options mean is in pretrain/config.py. Nothing here is slow to import.
"""

import argparse
import contextlib
import errno
import io
import json
import os
import shlex
import signal
import sys
import traceback
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import Field, fields
from itertools import takewhile
from pathlib import Path

from pretrain import __version__
from pretrain.errors import UserError, check, option_named, os_error, refusing, what_it_takes
from pretrain.files import locks_released, read_text
from pretrain.preflight import misfits
from pretrain.schema import AUTO, flag
from pretrain.signals import Interrupted, handled

FORMER_NAMES = {"--colour": "--color"}  # still accepted, in no help
CONSOLE_PREFIX = "bert-"  # of the commands that a wheel installs
SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"  # only in a clone


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        """One line instead of a page of usage."""
        raise UserError(f"{message.removeprefix('argument ')}; --help lists the options")


def build_parser(options: type, description: str) -> argparse.ArgumentParser:
    """A parser with an option for each field of the dataclass `options`, in groups.

    Its result has only what was typed, no defaults."""
    parser = _Parser(
        description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS
    )
    parser.add_argument("--version", action="version", version=f"bert-pretrain {__version__}")
    config_help = "YAML or JSON file of options; the command line overrides it"
    parser.add_argument("--config", metavar="FILE", help=config_help)
    groups, hints = {}, typing.get_type_hints(options)
    for entry in fields(options):
        # Named in the docstring of the most general class with the option.
        kinds = [kind for kind in options.__mro__ if hasattr(kind, entry.name)]
        title = kinds[-1].__doc__.partition(":")[0].rstrip(".").lower()
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        _add_option(groups[title], entry, hints[entry.name])
    return parser


def _add_option(group: argparse._ArgumentGroup, entry: Field, hint: object) -> None:
    arguments, default = dict(entry.metadata["argparse"]), entry.default
    name = entry.name if arguments.pop("positional", False) else flag(entry.name)
    if isinstance(default, bool):
        arguments["action"] = argparse.BooleanOptionalAction
    else:
        kinds = [part for part in typing.get_args(hint) if part is not types.NoneType] or [hint]
        takes_auto = default == AUTO or entry.metadata["takes_auto"]
        arguments["type"] = _auto_or(kinds[0]) if takes_auto else kinds[0]
        if entry.metadata["takes_auto"]:
            arguments["action"] = _AutoOrValues
        arguments.setdefault("metavar", kinds[0].__name__.upper())
    text = entry.metadata["help"].replace("%", "%%")
    if "default:" not in text and default not in ((), None, False, ""):
        shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
        text = f"{text} (default: {shown})"
    group.add_argument(name, help=text, **arguments)


def _auto_or(kind: type) -> Callable:
    """A type for argparse: `kind`, or the word auto."""

    def read(text: str) -> object:
        return text if text == AUTO else kind(text)

    read.__name__ = kind.__name__  # for argparse's messages
    return read


class _AutoOrValues(argparse.Action):
    """Stores the values; for the word auto, none."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        if AUTO in values and len(values) > 1:
            shown = " ".join(map(str, values))
            raise argparse.ArgumentError(self, f"{shown}; expected values, or auto alone")
        setattr(namespace, self.dest, [value for value in values if value != AUTO])


def parse(
    argv: Sequence[str],
    options: type,
    description: str,
    ignored: type | None = None,
    defaults: dict | None = None,
):
    """An instance of the dataclass `options`: its own defaults, then `defaults`, then the options
    of --config FILE, then `argv`.

    An option, unless it has its default, also overrides the one it cannot be combined with. The
    file may also have options of `ignored`, without effect. UserError for what the options' types
    do not allow."""
    parser = build_parser(options, description)
    typed, from_file, values = _parse(parser, argv), {}, {}
    path = typed.pop("config", None)
    if path is not None:
        with option_named("--config"):
            in_file = read_options(path)
        try:
            in_file = _known(in_file, options, ignored or options)
            from_file = _parse(parser, _as_flags(in_file, options))
        except UserError as error:
            raise UserError(f"--config {path}: {error}") from error
    of_caller = _as_flags(_known(defaults or {}, options, options), options)
    for layer in (_parse(parser, of_caller), from_file, typed):
        for entry in fields(options):
            pair = (entry.name, entry.metadata["excludes"])
            for name, other in (pair, pair[::-1]):  # the second is "" for most options
                if name in layer and layer[name] != getattr(options, name):
                    values.pop(other, None)
        values |= layer
    made = options(**values)
    problems = misfits(made)
    of_file = problems.keys() & (from_file.keys() - typed.keys())
    for name in of_file:
        problems[name] = f"--config {path}: {problems[name]}"
    if of_file:  # else the command checks all values
        check(list(problems.values()))
    return made


def join_quoted(argv: Sequence[str], options: type) -> list[str]:
    """`argv` with each of --pretrain and --finetune and its value as one word: argparse would read
    a separate value that starts with dashes as another option."""
    joined, own = [], {flag(entry.name) for entry in fields(options)}
    for place, word in enumerate(argv):
        if joined and joined[-1] in ("--pretrain", "--finetune"):
            name, rest = joined[-1], argv[place + 1 :]
            values = list(takewhile(lambda other: other.partition("=")[0] not in own, rest))
            if word.startswith("--") and " " not in word and values:
                expected = f'{name} "{" ".join([word, *values])}"'
                raise UserError(f"{name} {word}: needs quotes; expected {expected}")
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return joined


def read_options(path: str | Path) -> dict:
    """The {option: value} of a YAML or JSON file."""
    import yaml  # installed with transformers

    expected = "expected YAML or JSON"
    text = read_text(path, "YAML or JSON")
    is_json = str(path).endswith(".json")
    with refusing(f"{path}: is not {'JSON' if is_json else 'YAML'}", expected):
        try:
            values = json.loads(text) if is_json else yaml.safe_load(text)
        except yaml.MarkedYAMLError as error:  # its own message has eight lines
            line, problem = error.problem_mark.line + 1, error.problem
            raise UserError(f"{path}, line {line}: {problem}; {expected}") from error
    if values is None:  # an empty file
        return {}
    if not isinstance(values, dict):
        found = type(values).__name__
        raise UserError(f"{path}: is {found}; expected a mapping of options to values")
    return {str(key).replace("-", "_"): value for key, value in values.items()}


def _known(values: dict, options: type, ignored: type) -> dict:
    """`values` of `options`; UserError for names that neither it nor `ignored` has."""
    known = {entry.name for entry in fields(options)}
    unknown = values.keys() - known - {entry.name for entry in fields(ignored)}
    if unknown:
        expected = "expected those of this command, which --help lists"
        raise UserError(f"unknown option {', '.join(sorted(unknown))}; {expected}")
    return {name: value for name, value in values.items() if name in known}


def _parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> dict:
    words, option = [], ""
    for word in argv:
        name, equals, value = word.partition("=")
        option = name if name.startswith("--") else option
        shown = word.encode("utf-8", "backslashreplace").decode()
        if shown != word:  # bytes that are not UTF-8 arrive as halves of surrogate pairs
            place = shown if word.startswith("--") else f"{option} {shown}".strip()
            raise UserError(f"{place}: not UTF-8; expected UTF-8 and a locale such as C.UTF-8")
        if word.startswith("--"):
            words.append(FORMER_NAMES.get(name, name) + equals + _at_home(value))
        else:
            words.append(_at_home(word))
    values = vars(parser.parse_args(words))
    return {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}


def _at_home(text: str) -> str:
    """`text` with ~/ expanded, which no shell does after "=" or in a file."""
    return os.path.expanduser(text) if text.startswith("~/") else text


def _as_flags(values: dict, options: type) -> list[str]:
    switches = {entry.name for entry in fields(options) if isinstance(entry.default, bool)}
    flags = []
    for name, value in values.items():
        for item in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(item, (list, dict)):  # YAML reads [name] as a list, too
                raise UserError(f"{flag(name)} {item}: not plain text; expected it in quotes")
        if isinstance(value, bool) and name in switches:
            flags.append(flag(name) if value else flag(f"no_{name}"))
        elif isinstance(value, bool):  # YAML reads on and off as booleans
            flags.append(f"{flag(name)}={'on' if value else 'off'}")
        elif isinstance(value, (list, tuple)):
            words = list(map(str, value))
            if len(words) == 1 and words[0].startswith("-"):  # argparse sees an option elsewhere
                flags.append(f"{flag(name)}={words[0]}")
            else:
                flags += [flag(name), *words] if words else []
        elif value is not None:
            flags.append(f"{flag(name)}={value}")
    return flags


def command(name: str, *words: object) -> str:
    """The command line that runs the command `name` with `words`, quoted for a shell.

    As this process was started: `bert-NAME` from a console script or without a clone, else `python
    scripts/NAME.py`, with a path that is valid in the current folder."""
    started = Path(getattr(sys.modules["__main__"], "__file__", None) or "").name
    if started.startswith(CONSOLE_PREFIX) or not (SCRIPTS / "pretrain.py").is_file():
        begin = [CONSOLE_PREFIX + name.replace("_", "-")]
    else:
        path = SCRIPTS / f"{name}.py"
        if path.is_relative_to(Path.cwd()):
            path = path.relative_to(Path.cwd())
        begin = ["python", path]
    return shlex.join(map(str, [*begin, *words]))


def as_command(name: str, options: object) -> str:
    """The command line of `options`: every value that is not its default."""
    changed = {}
    for entry in fields(options):
        value = getattr(options, entry.name)
        if value != entry.default:
            changed[entry.name] = value
    return command(name, *_as_flags(changed, type(options)))


def run_command(
    main: Callable[[Sequence[str]], int | None], argv: Sequence[str], hint: str = ""
) -> int:
    """The exit code of `main(argv)`: 2 with messages for a UserError, 1 with a traceback for other
    errors, 128 + its number for a signal. `hint` says how to continue an interrupted command."""
    hint, stops = f"; {hint}" if hint else "", []
    _keep_output_open()

    def interrupt(number: int, frame: types.FrameType | None) -> typing.NoReturn:
        stops.append(Interrupted(number))
        raise stops[0]

    with locks_released(), handled(interrupt):
        message, code = _end_of(main, argv, hint, stops)
    if message:
        with contextlib.suppress(OSError):  # stderr may be on the full disk
            print(message, file=sys.stderr)
    return code


def _end_of(main: Callable, argv: Sequence[str], hint: str, stops: list) -> tuple[str, int]:
    """(message, exit code) of `main(argv)`; `stops` has the signals that arrived."""
    try:
        return "", main(argv) or 0
    except KeyboardInterrupt as stop:
        message = f"{str(stop) or 'interrupted'}{hint}"
        return message, 128 + getattr(stop, "number", signal.SIGINT)
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None:  # free what the frames refer to, such as a loader's workers
            traceback.clear_frames(cause.__traceback__)
            cause = cause.__cause__ or cause.__context__
        if stops:  # a library may have replaced it, and `refusing` made a UserError of that
            return f"{stops[0]}{hint}", 128 + stops[0].number
        if isinstance(error, UserError):
            return "\n".join(f"error: {line}" for line in str(error).splitlines()), 2
        if reason := os_error(error):
            place = reason.filename2 or reason.filename or "a file"  # the first: of a rename
            what = f"{place}: {reason.strerror or reason}"
            return f"error: {what}; {what_it_takes(reason)}{hint}", 2
        traceback.print_exception(error)
        return "", 1


class _Output(io.FileIO):
    """A standard stream that drops what nobody can read, after `| head` or in a closed terminal."""

    is_lost = False

    def write(self, data: memoryview) -> int:
        """Write `data`; returns the number of bytes. Raises other OSErrors, such as a full disk,
        once."""
        try:
            return len(data) if self.is_lost else super().write(data)
        except OSError as error:
            self.is_lost = True
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise OSError(error.errno, error.strerror, "the output") from error
            return len(data)


def _keep_output_open() -> None:
    """Make stdout and stderr outlive their readers, escape the characters that their encoding
    lacks, and write whole lines, so that a common log file has them in order."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # closed; otherwise the next opened file would get its number
            os.open(os.devnull, os.O_RDWR)
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is getattr(sys, f"__{name}__"):
            encoding = stream.encoding if stream else "utf-8"
            raw = io.BufferedWriter(_Output(number, "w", closefd=False))
            stream = io.TextIOWrapper(raw, encoding, "backslashreplace", line_buffering=True)
            setattr(sys, name, stream)
