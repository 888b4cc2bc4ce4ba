"""Everything that can be wrong with a command before anything slow is imported or read.

Values are checked by the bounds beside each option in pretrain/config.py, and with each other. For
new work, files and folders must exist, and no option may contradict another.
"""

import difflib
import math
import os
import re
from collections.abc import Iterator
from dataclasses import fields

from pretrain.config import (
    ARCHITECTURES,
    FILES,
    MODEL_SIZES,
    NAMED_PATHS,
    OBJECTIVES,
    PATHS,
    PHASES,
    SHARES,
    TASK_METRICS,
    min_micro_batch_size,
    typed,
)
from pretrain.data.sources import by_name, expand
from pretrain.errors import UserError, counted
from pretrain.files import check_writable, file_problem
from pretrain.schema import AUTO, flag

FILE_OPTIONS = ("lexicon", "similar", "add_tokens", "stop_words", "vectors")
NOT_FILES = {"stop_words": ("auto", "none")}  # values with a meaning of their own
# OWNER/NAME, or an old name, which has a hyphen.
HUB_NAME = re.compile(r"(?!.*\.(txt|json)$)(\w[\w.-]*/[\w.-]+|\w[\w.]*-[\w.-]+)")


def problems_of(options: object, is_new: bool = True) -> list[str]:
    """All problems with the options of a command; a run that resumes is not new."""
    problems = [*missing(options), *validate(options)]
    return problems + start_problems(options) if is_new else problems


def start_problems(options: object) -> list[str]:
    """Problems that matter only to new work: what does not exist, or has no effect."""
    absent = [*_absent_files(options), *_absent_paths(options), *_unknown_names(options)]
    return absent + _contradictions(options)


def output_problems(options: object, name: str = "output", may_exist: bool = False) -> list[str]:
    """Why no new file or folder can be written where the option `name` says."""
    value = getattr(options, name)
    try:
        check_writable(value)
    except UserError as error:
        return [f"{flag(name)} {error}"]
    ways = "another name, or --overwrite" if hasattr(options, "overwrite") else "another name"
    is_taken = os.path.exists(value) and not may_exist
    return [f"{flag(name)} {value}: exists; expected {ways}"] if is_taken else []


def missing(options: object) -> Iterator[str]:
    """A problem for each required option that is not given."""
    for entry in fields(options):
        if entry.metadata["required"] and not getattr(options, entry.name):
            arguments = entry.metadata["argparse"]
            name = arguments["metavar"] if "positional" in arguments else flag(entry.name)
            yield f"{name}: missing; expected {entry.metadata['help']}"


def validate(options: object) -> list[str]:
    """All problems with the values that can be found without opening a file."""
    problems = list(misfits(options).values())
    for entry in fields(options):
        if getattr(options, entry.name) == entry.default:
            continue
        other = entry.metadata["excludes"]
        if other and getattr(options, other) != getattr(type(options), other):
            pair = typed(options, entry.name, other)
            problems.append(f"{pair}: cannot be combined; expected one of them")
    return problems + _conflicts(options)


def misfits(options: object) -> dict[str, str]:
    """By name, the problem of each value that is out of its own bounds."""
    problems = {}
    for entry in fields(options):
        value, form = getattr(options, entry.name), entry.metadata["form"]
        if form and value != entry.default and not form.holds(value):
            problems[entry.name] = f"{typed(options, entry.name)}: expected {form.expected}"
    return problems


def _conflicts(options: object) -> list[str]:
    """Problems of values with each other. Options that the command lacks count as None."""
    problems = []
    value = {entry.name: getattr(options, entry.name) for entry in fields(options)}.get

    def refuse(problem: str, *names: str) -> None:
        problems.append(f"{typed(options, *names)}: {problem}")

    batch = 0 if value("batch_size") in (None, AUTO) else value("batch_size")
    micro = value("micro_batch_size") or 0
    phases = value("phases")
    if batch > 0 and micro > 0 and batch % micro:
        expected = f"expected a divisor, such as {math.gcd(batch, micro)}"
        refuse(f"does not divide evenly; {expected}", "batch_size", "micro_batch_size")
    if micro > 0 and phases and PHASES.holds(phases) and micro < min_micro_batch_size(options):
        expected = f"expected at least {min_micro_batch_size(options)}"
        refuse(f"no room for the longest sequence; {expected}", "micro_batch_size", "phases")
    mix, num_texts = value("mix") or (), len(value("train") or ())
    is_whole = len(mix) == num_texts > 1
    if mix and SHARES.holds(mix) and not is_whole:
        expected = "a number for each of two or more entries (a folder or a quoted glob is one)"
        found = f"{len(mix)} for {counted(num_texts, 'entry')} of --train"
        refuse(f"{found}; expected {expected}", "mix")
    has_pairs = OBJECTIVES.get(value("objective")) is not None
    if has_pairs and not ARCHITECTURES.get(value("architecture"), True):
        refuse("has no NSP head; expected --objective mlm", "architecture", "objective")
    masking, similar, replaces = value("masking"), value("similar"), value("replace") == "similar"
    lacks = ["--similar FILE"] if not similar else []
    lacks += ["--masking word, span or entity"] if masking == "token" else []
    if replaces and lacks:
        refuse(f"expected {' and '.join(lacks)}", "replace")
    if similar and not replaces:
        refuse("has no effect; expected --replace similar", "similar")
    for name in ("lexicon", "entity_field"):
        if value(name) and masking not in (None, "entity"):
            refuse(f"expected --masking entity, not {masking}", name)
    if value("resume") and not value("output"):
        refuse("no run folder; expected --output DIR", "resume")
    is_patient = value("patience") not in (None, 0, AUTO)
    if is_patient and value("valid_fraction") == 0 and not value("valid"):
        expected = "expected --valid PATHS, or a share above 0"
        refuse(f"no validation text; {expected}", "patience", "valid_fraction")
    metrics = TASK_METRICS.get(value("task"), ())
    if metrics and value("metric") not in (AUTO, *metrics):
        refuse(f"the task has no such score; expected {', '.join(metrics)}", "task", "metric")
    if metrics and value("class_weights") == "balanced" and value("task") != "classification":
        refuse("has no classes; expected --task classification", "class_weights", "task")
    if value("text_pair_field") and value("task") == "ner":
        refuse("entities are in one text; expected no second one", "text_pair_field", "task")
    if value("replay") and not value("general"):
        refuse("no general text; expected --general PATHS", "replay")
    if value("precision") == "fp16" and value("device") == "cpu":
        refuse("a CPU does not train in fp16; expected bf16 or fp32", "precision")
    return problems


def _absent_files(options: object) -> Iterator[str]:
    for name in FILE_OPTIONS:
        value = getattr(options, name, None)
        is_file = value and value.strip() and value not in NOT_FILES.get(name, ())
        if is_file and (problem := file_problem(value)):
            yield f"{flag(name)} {value}: {problem}; expected a file"
    tasks = getattr(options, "tasks", None)
    if tasks and not os.path.isdir(tasks):
        yield f"--tasks {tasks}: is not a folder; expected one with a subfolder per task"
    cache = getattr(options, "cache", "")
    if os.path.isfile(cache):
        yield f"--cache {cache}: is a file; expected a folder"


def _absent_paths(options: object) -> Iterator[str]:
    for entry in fields(options):
        form, values = entry.metadata["form"], getattr(options, entry.name)
        if form in (PATHS, FILES, NAMED_PATHS):
            try:
                expand(sum(by_name(values).values(), ()) if form is NAMED_PATHS else values)
            except UserError as error:
                yield from (f"{flag(entry.name)} {line}" for line in str(error).splitlines())


def _unknown_names(options: object) -> Iterator[str]:
    """Models and tokenizers that can be neither a folder nor a name on the hub."""
    for name in ("model", "baseline", "tokenizer"):
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
        yield f"{flag(name)} {value}: {problem}{guess}; expected {expected}a folder or a hub name"


def _contradictions(options: object) -> list[str]:
    """Options that another one leaves without effect; the default counts as not given."""
    problems = []

    def given(name: str) -> bool:
        return getattr(options, name, None) != getattr(type(options), name, None)

    def refuse(expected: str, *names: str) -> None:
        if all(map(given, names)):
            problems.append(f"{typed(options, *names)}: cannot be combined; expected {expected}")

    refuse("one of them: only a new vocabulary has a size", "tokenizer", "vocab_size")
    if getattr(options, "model", None) not in MODEL_SIZES:
        refuse(f"a size ({', '.join(MODEL_SIZES)}) as the --model", "model", "architecture")
    if OBJECTIVES.get(getattr(options, "objective", None), "") is None:
        refuse("an objective with pairs, or no --nsp-weight", "objective", "nsp_weight")
    if getattr(options, "entity_fill", "") == "none":
        refuse("one of them: nothing fills up to the rate", "entity_fill", "mask_rate")
    for name in ("entity_probability", "entity_budget", "entity_fill"):
        if given(name) and options.masking != "entity":
            problems.append(f"{typed(options, name)}: has no effect; expected --masking entity")
    for name in getattr(options, "unused", ()):
        if getattr(options, name):
            problems.append(f"{typed(options, name)}: has no effect here; omit the option")
    return problems
