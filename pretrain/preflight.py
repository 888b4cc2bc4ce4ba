"""Everything that can be wrong with a command before anything slow is imported or read.

`pretrain/config.py` checks values. This also looks whether files and folders exist, and finds
options that contradict each other; a run that resumes needs neither.
"""

import difflib
import glob
import os
from dataclasses import fields

from pretrain.config import FILES, MODEL_SIZES, OBJECTIVES, PATHS, missing, typed, validate
from pretrain.files import file_problem, is_path
from pretrain.schema import flag

FILE_OPTIONS = ("lexicon", "similar", "add_tokens", "stop_words")
NAMES = {"stop_words": ("auto", "none")}  # values that are no files


def problems_of(options: object, is_new: bool = True) -> list[str]:
    """All problems with the options of a command; a run that resumes is not new."""
    problems = missing(options) + validate(options)
    return problems + start_problems(options) if is_new else problems


def start_problems(options: object) -> list[str]:
    """Problems that matter only to new work: what does not exist, or has no effect."""
    found = _absent_files(options) + _absent_paths(options) + _unknown_names(options)
    return found + _contradictions(options)


def _absent_files(options: object) -> list[str]:
    problems = []
    for name in FILE_OPTIONS:
        value = getattr(options, name, None)
        if value and value.strip() and value not in NAMES.get(name, ()):
            problem = file_problem(value)
            problems += [f"{flag(name)} {value}: {problem}; expected a file"] if problem else []
    return problems


def _absent_paths(options: object) -> list[str]:
    problems = []
    for entry in fields(options):
        paths = getattr(options, entry.name) if entry.metadata["form"] in (PATHS, FILES) else ()
        for path in paths:
            place = os.path.expanduser(path)
            is_there = path.startswith("hub:") or os.path.exists(place)
            if not is_there and not any(glob.iglob(place, recursive=True)):
                expected = "expected a file, a folder with files, or a glob"
                problems.append(f"{flag(entry.name)} {path}: no files; {expected}")
    return problems


def _unknown_names(options: object) -> list[str]:
    """Models and tokenizers that can be neither a folder nor a name on the hub."""
    takes_size = getattr(type(options), "model", None) in MODEL_SIZES
    problems = []
    for name in ("model", "tokenizer"):
        value = getattr(options, name, None)
        sizes = MODEL_SIZES if takes_size and name == "model" else {}
        if not value or value in sizes or os.path.exists(os.path.expanduser(value)):
            continue
        similar = difflib.get_close_matches(value.lower(), sizes, n=1)
        guess = f" (did you mean {similar[0]}?)" if similar else ""
        expected = f"a size ({', '.join(sizes)}), " if sizes else ""
        expected += "a folder or a hub name"
        if is_path(value):
            problems.append(f"{flag(name)} {value}: does not exist; expected {expected}")
        elif "/" not in value and "-" not in value:  # old names on the hub have a hyphen
            problem = "is only for training from scratch" if value in MODEL_SIZES else "is unknown"
            problems.append(f"{flag(name)} {value}: {problem}{guess}; expected {expected}")
    return problems


def _contradictions(options: object) -> list[str]:
    """Options that another one leaves without effect; the default counts as not given."""
    problems = []

    def given(name: str) -> bool:
        return getattr(options, name, None) != getattr(type(options), name, None)

    def refuse(expected: str, *names: str) -> None:
        if all(map(given, names)):
            problems.append(f"{typed(options, *names)}: contradict each other; expected {expected}")

    refuse("one of them: only a new vocabulary has a size", "tokenizer", "vocab_size")
    if OBJECTIVES.get(getattr(options, "objective", None), "") is None:
        refuse("an objective with pairs, or no weight of theirs", "objective", "nsp_weight")
    if getattr(options, "entity_fill", "") == "none":
        refuse("one of them: nothing is filled up to the rate", "entity_fill", "mask_rate")
        if options.masking != "entity":
            problems.append("--entity-fill none: has no effect; expected --masking entity")
    return problems
