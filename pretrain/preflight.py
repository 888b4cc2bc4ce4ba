"""Everything that can be wrong with a command before anything slow is imported or read.

`pretrain/config.py` checks values. This also checks that files and folders exist, and that no
option contradicts another; a run that resumes needs neither.
"""

import difflib
import os
import re
from dataclasses import fields

from pretrain.config import FILES, MODEL_SIZES, OBJECTIVES, PATHS, missing, typed, validate
from pretrain.data.sources import expand
from pretrain.errors import UserError
from pretrain.files import check_writable, file_problem
from pretrain.schema import flag

FILE_OPTIONS = ("lexicon", "similar", "add_tokens", "stop_words", "vectors")
NOT_FILES = {"stop_words": ("auto", "none")}  # values with a meaning of their own
# OWNER/NAME, or an old name, which has a hyphen.
HUB_NAME = re.compile(r"(?!.*\.(txt|json)$)(\w[\w.-]*/[\w.-]+|\w[\w.]*-[\w.-]+)")


def problems_of(options: object, is_new: bool = True) -> list[str]:
    """All problems with the options of a command; a run that resumes is not new."""
    problems = missing(options) + validate(options)
    return problems + start_problems(options) if is_new else problems


def start_problems(options: object) -> list[str]:
    """Problems that matter only to new work: what does not exist, or has no effect."""
    found = _absent_files(options) + _absent_paths(options) + _unknown_names(options)
    return found + _contradictions(options)


def output_problems(options: object, name: str = "output", may_exist: bool = False) -> list[str]:
    """Why the option `name` is no place for a new file or folder."""
    value = getattr(options, name)
    try:
        check_writable(value)
    except UserError as error:
        return [f"{flag(name)} {error}"]
    ways = "another name, or --overwrite" if hasattr(options, "overwrite") else "another name"
    is_taken = os.path.exists(value) and not may_exist
    return [f"{flag(name)} {value}: exists; expected {ways}"] if is_taken else []


def _absent_files(options: object) -> list[str]:
    problems = []
    for name in FILE_OPTIONS:
        value = getattr(options, name, None)
        if value and value.strip() and value not in NOT_FILES.get(name, ()):
            problem = file_problem(value)
            problems += [f"{flag(name)} {value}: {problem}; expected a file"] if problem else []
    cache = getattr(options, "cache", "")
    problems += [f"--cache {cache}: is a file; expected a folder"] if os.path.isfile(cache) else []
    return problems


def _absent_paths(options: object) -> list[str]:
    problems = []
    for entry in fields(options):
        if entry.metadata["form"] in (PATHS, FILES):
            try:
                expand(getattr(options, entry.name))
            except UserError as error:
                problems += [f"{flag(entry.name)} {line}" for line in str(error).splitlines()]
    return problems


def _unknown_names(options: object) -> list[str]:
    """Models and tokenizers that can be neither a folder nor a name on the hub."""
    problems = []
    for name in ("model", "tokenizer"):
        value = getattr(options, name, None) or ""
        takes_size = name == "model" and getattr(type(options), name, None) in MODEL_SIZES
        sizes = MODEL_SIZES if takes_size else {}
        is_there = value in sizes or os.path.exists(os.path.expanduser(value))
        if not value or is_there or HUB_NAME.fullmatch(value):
            continue
        similar = difflib.get_close_matches(value.lower(), sizes, n=1)
        guess = f" (did you mean {similar[0]}?)" if similar else ""
        problem = "is only for training from scratch" if value in MODEL_SIZES else "does not exist"
        expected = f"a size ({', '.join(sizes)}), " if sizes else ""
        expected += "a folder or a hub name"
        problems.append(f"{flag(name)} {value}: {problem}{guess}; expected {expected}")
    return problems


def _contradictions(options: object) -> list[str]:
    """Options that another one leaves without effect; the default counts as not given."""
    problems = []

    def given(name: str) -> bool:
        return getattr(options, name, None) != getattr(type(options), name, None)

    def refuse(expected: str, *names: str) -> None:
        if all(map(given, names)):
            problems.append(f"{typed(options, *names)}: cannot be combined; expected {expected}")

    refuse("one of them: only a new vocabulary has a size", "tokenizer", "vocab_size")
    if OBJECTIVES.get(getattr(options, "objective", None), "") is None:
        refuse("an objective with pairs, or no --nsp-weight", "objective", "nsp_weight")
    if getattr(options, "entity_fill", "") == "none":
        refuse("one of them: nothing fills up to the rate", "entity_fill", "mask_rate")
        if options.masking != "entity":
            problems.append("--entity-fill none: has no effect; expected --masking entity")
    return problems
