"""From a command line to options: argparse built from a dataclass, `--config FILE`, and errors told in one message.

Knows nothing of what the options mean (pretrain/config.py does), and nothing here imports torch, so `--help` is fast.
"""
from __future__ import annotations

import argparse
import contextlib
import ctypes
import importlib
import json
import shlex
import signal
import sys
import traceback
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import field, fields
from pathlib import Path

SHOWN_PROBLEMS = 20
UNSET = object()  # of an option that was not typed
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
PR_SET_PDEATHSIG = 1  # of Linux's prctl.h


class UserError(ValueError):
    """A problem that the user can mend: shown as one message without a traceback, exit code 2."""


class Interrupted(KeyboardInterrupt):
    """Signal `number` has ended the command: exit code 128 + `number`."""

    def __init__(self, number: int, told: str = "interrupted by"):
        super().__init__(f"{told} {signal.Signals(number).name}")
        self.number = number


def option(default: object, text: str, **argparse_arguments: object):
    """A dataclass field that is also a command-line option (an argument without a name if `positional`); `text` is its help."""
    metadata = {"help": text, "argparse": argparse_arguments}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        """One line instead of the usage of sixty options."""
        raise UserError(f"{message.removeprefix('argument ')}; --help lists the options")


def build_parser(options: type, description: str) -> argparse.ArgumentParser:
    """Argparse parser with one option for each field of the dataclass `options`."""
    parser = _Parser(description=description, allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE", help="YAML or JSON with options; flags override it")
    hints = typing.get_type_hints(options)
    for entry in fields(options):
        arguments = dict(entry.metadata["argparse"])
        hint = hints[entry.name]
        if hint is bool:
            arguments["action"] = argparse.BooleanOptionalAction
        else:
            inner = [part for part in typing.get_args(hint) if part is not type(None)] or [hint]
            arguments["type"] = inner[0]
            if "choices" not in arguments:
                arguments.setdefault("metavar", inner[0].__name__.upper())
        text = entry.metadata["help"].replace("%", "%%")
        default = entry.default_factory() if callable(entry.default_factory) else entry.default
        if "default:" not in text and default != []:
            shown = " ".join(map(str, default)) if isinstance(default, list) else default
            text = f"{text} (default: {shown})"
        name = entry.name if arguments.pop("positional", False) else f"--{entry.name.replace('_', '-')}"
        parser.add_argument(name, help=text, default=default, **arguments)
    return parser


def parse(argv: Sequence[str], options: type, description: str, defaults: dict | None = None, passed_over: type | None = None):
    """Instance of the dataclass `options`, from `defaults`, then `--config FILE`, then the flags in `argv`.

    Values of `defaults` and of the file pass through the same types and choices as flags do. The file may hold options of
    `passed_over` that the command has not."""
    parser = build_parser(options, description)
    path = parser.parse_known_args(list(argv))[0].config
    known = {entry.name for entry in fields(options) if not entry.metadata["argparse"].get("positional")}
    others = {entry.name for entry in fields(passed_over)} - known if passed_over else set()
    from_file = {name: value for name, value in (read_options(path) if path else {}).items() if name not in others}
    unknown = sorted(set(from_file) - known)
    if unknown:
        raise UserError(f"--config {path}: unknown option {', '.join(unknown)}; known are {', '.join(sorted(known))}")
    try:
        parser.parse_args(_as_flags(from_file, options))
    except UserError as error:
        raise UserError(f"--config {path}: {error}") from error
    typed = vars(parser.parse_known_args(list(argv), argparse.Namespace(**dict.fromkeys(known, UNSET)))[0])
    aside = {name for group in getattr(options, "exclusive", ()) if any(typed[name] is not UNSET for name in group)
             for name in group if typed[name] is UNSET}  # what is typed takes the place of what it excludes
    given = {name: value for name, value in {**(defaults or {}), **from_file}.items() if name not in aside}
    namespace = vars(parser.parse_args(_as_flags(given, options) + list(argv)))
    namespace.pop("config")
    return options(**namespace)


def read_options(path: str | Path) -> dict:
    """The mapping in a YAML or JSON file; UserError where it cannot be read or is no mapping."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        if str(path).endswith(".json"):
            values = json.loads(text)
        else:
            import yaml  # comes with transformers

            values = yaml.safe_load(text)
    except OSError as error:
        raise UserError(f"--config {path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise UserError(f"--config {path}: is neither YAML nor JSON ({error})") from error
    except Exception as error:  # yaml.YAMLError is no ValueError, and yaml may not have been imported
        raise UserError(f"--config {path}: is not valid YAML ({error})") from error
    values = {} if values is None else values  # an empty file
    if not isinstance(values, dict):
        raise UserError(f"--config {path}: holds {type(values).__name__}, needed is a mapping of options to values")
    return {str(key).replace("-", "_"): value for key, value in values.items()}


def _as_flags(values: dict, options: type) -> list[str]:
    switches = {name for name, hint in typing.get_type_hints(options).items() if hint is bool}
    flags = []
    for name, value in values.items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool) and name in switches:
            flags.append(flag if value else flag.replace("--", "--no-", 1))
        elif isinstance(value, bool):  # YAML reads on and off as booleans
            flags += [flag, "on" if value else "off"]
        elif isinstance(value, (list, tuple)):
            flags += [flag, *map(str, value)] if value else []
        elif value is not None:
            flags.append(f"{flag}={value}")
    return flags


def as_command(script: str, options: object) -> str:
    """The command that means `options`: every value that is not its default."""
    changed = {}
    for entry in fields(options):
        default = entry.default_factory() if callable(entry.default_factory) else entry.default
        if getattr(options, entry.name) != default:
            changed[entry.name] = getattr(options, entry.name)
    return shlex.join(["python", f"scripts/{script}.py", *_as_flags(changed, type(options))])


def check(problems: list[str]) -> None:
    """Raise one UserError that tells all `problems`, a line each (of very many the first); nothing where there are none."""
    if problems:
        more = len(problems) - SHOWN_PROBLEMS
        raise UserError("\n".join(problems[:SHOWN_PROBLEMS] + [f"and {more:,} problems more"] * (more > 0)))


def run_command(main: Callable[[Sequence[str]], int | None], argv: Sequence[str], way_on: str = "") -> int:
    """Exit code of `main(argv)`; a UserError becomes a message on stderr and 2, any other error a traceback and 1. `way_on` tells what
    goes on with what was interrupted."""
    stops = []

    def interrupt(number: int, frame: types.FrameType | None) -> typing.NoReturn:
        stops.append(Interrupted(number))
        raise stops[0]

    before = {number: signal.signal(number, interrupt) for number in STOP_SIGNALS}
    sys.stdout.reconfigure(line_buffering=True)  # stays in order with stderr in a log file
    try:
        return main(argv) or 0
    except UserError as error:
        print("\n".join(f"error: {line}" for line in str(error).splitlines()), file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error.filename or 'a file'}: {error.strerror or error}; needed is a path that exists, room on the disk and the "
              f"right to read and write{way_on and f'; {way_on}'}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(f"{stop if str(stop) else 'interrupted'}{way_on and f'; {way_on}'}", file=sys.stderr)
        return 128 + getattr(stop, "number", signal.SIGINT)
    except Exception as error:
        if not stops:
            traceback.print_exc()
            _free_frames(error)
            return 1
        print(stops[0], file=sys.stderr)  # raised where it came, in the middle of an import, say, and made something else of there
        return 128 + stops[0].number
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _free_frames(error: BaseException | None) -> None:
    """Free what the frames of an error and of its causes hold, such as a loader's workers."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def ignore_stop_signals() -> None:
    """For worker processes, which end with their parent: what is sent to the whole group is the parent's to answer."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def signal_at_parents_end(number: int) -> bool:
    """Ask the kernel to send `number` to this process when the thread that started it ends.

    Returns whether it will: False on systems other than Linux."""
    return sys.platform == "linux" and ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number) == 0


@contextlib.contextmanager
def refusing(message: str, needed: str) -> Iterator[None]:
    """Whatever a library raises inside becomes a UserError. Of every kind: transformers raises dozens, from OSError to KeyError, and a
    panic of Rust code is no Exception."""
    try:
        yield
    except (UserError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise UserError(f"{message} ({first_line(error)}); {needed}") from error


def first_line(error: BaseException) -> str:
    """What a library's error says, in short: its first sentence, without the advice that follows."""
    return f"{type(error).__name__}: " + str(error).strip().split("\n")[0].split(". ")[0][:200]


def require(module: str, what: str) -> types.ModuleType:
    """An optional module; UserError with the pip command where it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = {"sklearn": "scikit-learn"}.get(name := module.partition(".")[0], name.replace("_", "-"))
        raise UserError(f"{what}: needs the package {package}, which is not installed: pip install {package}") from error
