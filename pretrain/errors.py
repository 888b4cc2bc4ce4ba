"""Errors that a user can fix, and helpers that turn other errors into them."""

import contextlib
import errno
import importlib
import os
import re
import types
from collections.abc import Iterator

SHOWN_PROBLEMS = 20
MORE = "and "  # begins the line that counts the others
EXPECTED: dict[int | None, str] = {  # by number of an error of the operating system
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "more open files (ulimit -n)"),
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "free disk space"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "permission to read and write"),
    errno.EISDIR: "a file, not a folder",
}
EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # these say nothing about a file
PACKAGES = {"sklearn": "scikit-learn"}  # module -> package, where more than "_" and "-" differ


def counted(number: int, noun: str) -> str:
    """A number and what it counts: "1 step", "2,000 steps", "3 entities", "2 batches"."""
    if number == 1:
        return f"1 {noun}"
    if noun.endswith("y"):
        return f"{number:,} {noun[:-1]}ies"
    ending = "es" if noun.endswith(("s", "x", "ch")) else "s"
    return f"{number:,} {noun}{ending}"


class UserError(ValueError):
    """A problem that the user can fix: printed without a traceback, exit code 2."""


class NotWritable(UserError):
    """There is no permission to write a file or folder."""


def check(problems: list[str]) -> None:
    """Raise one UserError with all `problems`, one per line, up to SHOWN_PROBLEMS."""
    lines, more = problems[:SHOWN_PROBLEMS], len(problems) - SHOWN_PROBLEMS
    if more > 0:
        lines.append(f"{MORE}{counted(more, 'more problem')}")
    if lines:
        raise UserError("\n".join(lines))


@contextlib.contextmanager
def option_named(option: str) -> Iterator[None]:
    """Put `option` before each line of a UserError raised inside, unless it names one already.
    What a wing calls 'the option "max_length"' becomes --max-length."""
    try:
        yield
    except UserError as error:
        lines = str(error).splitlines()
        named = [line if line.startswith(("--", MORE)) else f"{option} {line}" for line in lines]
        text = "\n".join(named)
        typed = re.sub(r'the option "(\w+)"', lambda name: f"--{name[1].replace('_', '-')}", text)
        raise UserError(typed) from error


@contextlib.contextmanager
def refusing(message: str, expected: str) -> Iterator[None]:
    """Turn whatever a library raises inside into a UserError "`message` (...); `expected`".

    transformers raises dozens of types, from OSError to KeyError, and a Rust panic is not an
    Exception."""
    try:
        yield
    except (UserError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        reason = os_error(error)
        if reason and reason.errno in EXPECTED:  # the content of a file is not to blame
            expected = what_it_takes(reason)
        raise UserError(f"{message} ({first_line(error)}); {expected}") from error


def os_error(error: BaseException) -> OSError | None:
    """The error of the operating system that `error` is or reports; None if there is none.

    Libraries in Rust raise errors with the text "No space left on device (os error 28)". On a full
    disk, numpy raises an OSError without a number: "306906 requested and 55232 written"."""
    if isinstance(error, OSError) and re.fullmatch(r"\d+ requested and \d+ written", str(error)):
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if isinstance(error, OSError):
        return error
    found = re.search(r"\(os error (\d+)\)", str(error))
    if not found:
        return None
    number = int(found[1])
    return OSError(number, os.strerror(number))


def what_it_takes(error: OSError) -> str:
    """What the operation that raised `error` needs: "expected ..."."""
    anything = "an existing path, free disk space, and permission to read and write"
    return f"expected {EXPECTED.get(error.errno, anything)}"


def first_line(error: BaseException) -> str:
    """A library's error in brief: its class and first sentence, without advice."""
    sentence = str(error).strip().split("\n")[0].split(". ")[0]
    return f"{type(error).__name__}: {sentence[:200]}"


def require(module: str, what: str, ways: str = "") -> types.ModuleType:
    """Import an optional module; if it is not installed, UserError with the pip command and with
    `ways` to do without it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        name = module.partition(".")[0]
        package = PACKAGES.get(name, name.replace("_", "-"))
        advice = f"install it with: pip install {package}{ways and f', or {ways}'}"
        raise UserError(f"{what}: needs the package {package}; {advice}") from error
