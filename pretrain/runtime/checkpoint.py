"""Folders that are whole or absent: written aside, synced, read back and renamed, all files hashed.

A checkpoint is one with model and tokenizer (`save_pretrained`) and the training state: state dicts
in `training_state.pt`, read without unpickling, and plain values in `training_state.json`.
"""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_PRETRAINING_MAPPING,
    AutoModelForMaskedLM,
    PreTrainedModel,
)
from transformers import PreTrainedTokenizerBase as Tokenizer

from pretrain.card import results, write_card
from pretrain.config import OBJECTIVES
from pretrain.errors import EXHAUSTED, UserError, first_line, os_error, what_it_takes
from pretrain.files import (
    CHECKSUMS,
    check_writable,
    read_json,
    remove_leftovers,
    sums_of,
    sync,
    write_json,
)
from pretrain.runtime.sharding import is_part, map_tensors
from pretrain.schema import Form, Rule, integer, misfit, number, one_of

RUN_ENTRY = (  # what a run writes; nothing else may be overwritten
    r"(config|summary)\.json|metrics\.jsonl|added_tokens\.tsv|events\.out\.tfevents.*"
    r"|test_predictions\.(csv|jsonl)|confusion\.png|scores\.txt"
    r"|best|final|checkpoint-\d+|\.(best|final|checkpoint-\d+)\.\w+"
    r"|\..*\.partial|\.lock"
)
FACTS = "pretraining.json"  # has the defaults of scripts/evaluate.py
FACTS_FORM = {
    "objective": one_of(*OBJECTIVES),
    "max_length": integer(8, 1 << 16),
    "eval_tokens": integer(1, 1 << 40),
    "eval_batch_size": integer(1, 1 << 20),
    "nsp_weight": number(0),
}
# Scores for the hub's index of models, and its names for them.
PUBLISHED = {"perplexity": "perplexity", "mlm_accuracy": "accuracy"}
TASK = "fill-mask"  # of the pipeline that a pretrained model is for
OWN_CODE = "the code that trained it: its layers are not those of transformers."
STATE_FORMAT = 3
STATE_FORMAT_RULE = Rule(
    lambda value: value == STATE_FORMAT,
    f"{STATE_FORMAT} (another version of this program wrote it; start a new run from its model)",
)
STATE_JSON, STATE_TENSORS = "training_state.json", "training_state.pt"
TORCH_DISK_ERRORS = (RuntimeError, SafetensorError)  # of torch.save and safetensors


def write_folder(folder: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a new folder, which replaces `folder` once it has been read back. UserError
    if the disk is full or not writable; the old folder is then intact."""
    partial, previous = (_aside(folder, suffix) for suffix in ("partial", "previous"))
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write(partial)
        _seal(partial)
        shutil.rmtree(previous, ignore_errors=True)
        if folder.exists():
            folder.rename(previous)
        partial.rename(folder)
        sync(folder.parent)
        shutil.rmtree(previous, ignore_errors=True)
    except UserError:
        raise
    except Exception as error:
        reason = os_error(error)
        if reason is None and not isinstance(error, TORCH_DISK_ERRORS):
            raise
        if isinstance(error, torch.OutOfMemoryError) or "DataLoader" in str(error):
            raise
        shutil.rmtree(partial, ignore_errors=True)
        put_back(folder)
        shown = reason.strerror or reason if reason else str(error).split("\n")[0]
        expected = what_it_takes(reason or OSError())
        problem = f"cannot be written ({shown}); {expected}; its old content is intact"
        raise UserError(f"{folder}: {problem}") from error


def _seal(folder: Path) -> None:
    """Write the size and hash of every file, and verify that all of it reached the disk."""
    sums = sums_of(folder)
    (folder / CHECKSUMS).write_text(json.dumps(sums, indent=1), encoding="utf-8")
    mode = (folder / CHECKSUMS).stat().st_mode & 0o777  # by the umask; safetensors ignores it
    for name in sums:
        with contextlib.suppress(OSError):  # a file system without modes
            (folder / name).chmod(mode)
    for name in [*sums, CHECKSUMS, ""]:
        sync(folder / name)
    problem = problem_of(folder, needed=())
    if problem:
        raise OSError(f"after writing, {problem}")


def _aside(folder: Path, suffix: str) -> Path:
    return folder.with_name(f".{folder.name}.{suffix}")


def put_back(folder: Path) -> None:
    """Restore what an interrupted `write_folder` moved aside."""
    previous = _aside(folder, "previous")
    if previous.exists() and not folder.exists():
        previous.rename(folder)


def problem_of(folder: Path, needed: tuple[str, ...] = (STATE_JSON, STATE_TENSORS)) -> str | None:
    """What is wrong with a folder of `write_folder`, and in which file; None if hashes match."""
    path = folder / CHECKSUMS
    try:
        if not path.is_file():  # opening a pipe of that name would block
            return f"{path} is missing"
        expected, found = read_json(path), sums_of(folder)
    except (UserError, OSError) as error:
        reason = os_error(error.__cause__ or error)
        if reason and reason.errno in EXHAUSTED:
            raise
        return f"{path} cannot be read ({error.strerror})" if reason is error else str(error)
    for name, facts in expected.items():
        if found.get(name) != facts:
            return f"{folder / name} is missing or damaged"
    return None if expected.keys() >= set(needed) else f"{folder} has no training state"


def check_output(
    output: Path, overwrite: bool, ways: str | None = "a new folder", entries: str = RUN_ENTRY
) -> None:
    """UserError if `output` is a file, is not empty or, with `overwrite`, has a name that does not
    match `entries`. `ways` says what to do about a folder that is not empty; None: that is fine."""
    check_writable(output)
    if output.exists() and not output.is_dir():
        raise UserError(f"{output}: is a file; expected a folder")
    names = {entry.name for entry in output.iterdir()} - {".lock"} if output.is_dir() else set()
    # A sealed folder is ours, too: an edited loop may write more than `best` and `final`.
    ours = {name for name in names if os.path.isfile(output / name / CHECKSUMS)}
    foreign = sorted(name for name in names - ours if not re.fullmatch(entries, name))
    if overwrite and foreign:
        expected = "expected a run folder to overwrite"
        raise UserError(f"{output}: contains {foreign[0]}, which no run wrote; {expected}")
    if names and not overwrite and ways is not None:
        raise UserError(f"{output}: is not empty; expected {ways}")


def make_output(output: Path, overwrite: bool, has_result: bool) -> Path | None:
    """Create a run folder. With `overwrite`, moves the old run aside and returns where, so that it
    can be deleted once the new run has a result. A run without a result replaces nothing. A link
    stays: what it leads to is replaced."""
    if output.is_symlink():
        output = output.resolve()
    replaced = _aside(output, "replaced")
    if overwrite and output.is_dir():
        keeps_older = replaced.exists() and not has_result
        shutil.rmtree(output if keeps_older else replaced, ignore_errors=True)
        if not keeps_older:
            output.rename(replaced)
    output.mkdir(parents=True, exist_ok=True)
    remove_leftovers(output)
    if not replaced.exists():
        return None
    print(f"{replaced}: holds the old run until the new one has a result")
    return replaced


def new_folder(wanted: Path) -> Path:
    """Create `wanted` or, if it exists already, `wanted`-2, -3 ...; returns its path."""
    folder, number = wanted, 1
    while True:
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            number += 1
            folder = wanted.with_name(f"{wanted.name}-{number}")


def write_copy(source: Path, folder: Path) -> None:
    """Write the model of the checkpoint `source` to `folder`."""
    state = shutil.ignore_patterns(CHECKSUMS, STATE_JSON, STATE_TENSORS)
    write_folder(folder, lambda new: shutil.copytree(source, new, ignore=state, dirs_exist_ok=True))


def checkpoints(output: Path) -> list[Path]:
    """Checkpoint folders of a run, newest first."""
    folders = output.glob("checkpoint-*")
    found = [path for path in folders if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=step_of, reverse=True)


def step_of(folder: Path) -> int:
    """The step in a checkpoint's name."""
    return int(folder.name.rpartition("-")[2])


def newest_good(output: Path) -> Path | None:
    """The newest intact checkpoint, None if there are none; prints damaged ones. UserError if there
    are only damaged ones: a run never silently starts over."""
    found = checkpoints(output)
    for folder in found:
        problem = problem_of(folder)
        if problem is None:
            return folder
        print(f"skipped: {problem}")
    if found:
        raise UserError(f"{output}: has only damaged checkpoints; restore one, or start over")
    return None


def set_aside_after(output: Path, step: int) -> None:
    """Rename the checkpoints after `step`, which are damaged and must not count as the newest."""
    for folder in checkpoints(output):
        if step_of(folder) > step:
            shutil.rmtree(_aside(folder, "damaged"), ignore_errors=True)
            folder.rename(_aside(folder, "damaged"))


def prune(output: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints, renamed first: none is ever found in part."""
    for folder in checkpoints(output)[keep:]:
        folder.rename(_aside(folder, "removed"))
    remove_leftovers(output)


def check_finite(values: object) -> None:
    """UserError if a tensor in `values`, at any depth, is not finite. None may be sharded."""

    def check(tensor: Tensor, label: str) -> None:
        assert not is_part(tensor), f"{label.strip()} is sharded; gather it in state_dict"
        if not tensor.isfinite().all():
            advice = "try a lower learning rate, gradient clipping or fp32"
            raise UserError(f"{label.strip()}: not finite, so nothing is saved; {advice}")

    map_tensors(check, values, "")


def _shown(fact: object) -> str:
    """A value of `facts` in a model card."""
    if isinstance(fact, (list, tuple)):
        return " ".join(map(_shown, fact))
    return f"{fact:.4g}" if isinstance(fact, float) else str(fact)


def write_model(
    folder: Path, model: PreTrainedModel, tokenizer: Tokenizer, facts: dict, weights: dict
) -> None:
    """A model folder that opens with transformers: `weights`, tokenizer, `facts` and model card.

    `facts` has "objective", "started_from", "held_out" (scores), and may have "language" and
    "datasets", see `write_card`."""
    check_finite(weights)
    model.save_pretrained(folder, state_dict=weights)
    tokenizer.save_pretrained(folder)
    write_json(folder / FACTS, facts)
    shown = {name: _shown(value) for name, value in facts.items() if not isinstance(value, dict)}
    shown |= {f"validation {name}": f"{value:.4f}" for name, value in facts["held_out"].items()}
    opens_with = _opens_with(model)
    frozen = {
        name.rpartition(".")[0]
        for name, weight in model.named_parameters()
        if not weight.requires_grad
    }
    if frozen:
        opens_with += f"\n\nNot trained: `{'`, `'.join(sorted(frozen))}`."
    family = model.config.model_type
    write_card(
        folder,
        TASK,
        title=f"{family}, pretrained with {facts['objective']}",
        opens_with=opens_with,
        rows=[[name.replace("_", " "), value] for name, value in shown.items()],
        tags=[family, "pretraining"],
        started_from=facts["started_from"],
        language=facts.get("language"),
        datasets=facts.get("datasets", ()),
        mask_token=tokenizer.mask_token,
        scores=results(TASK, "held-out text", facts["held_out"], PUBLISHED),
    )


def _opens_with(model: PreTrainedModel) -> str:
    """What opens `model`: an edited encoder may have other weights than that of transformers."""
    config = model.config
    if type(config) not in MODEL_FOR_MASKED_LM_MAPPING:
        return OWN_CODE
    with torch.device("meta"):  # allocates nothing
        stock = AutoModelForMaskedLM.from_config(config)
    if not stock.state_dict().keys() <= model.state_dict().keys():
        return OWN_CODE
    autos = "`AutoModelForMaskedLM`, `AutoModel`"
    if type(config) in MODEL_FOR_PRETRAINING_MAPPING:
        autos = f"`AutoModelForPreTraining`, {autos}"
    return f'{autos} and `pipeline("fill-mask")` of transformers.'


def read_facts(folder: Path) -> dict:
    """The facts of `write_model`, except invalid ones; {} if another program wrote the folder."""
    try:
        facts = read_json(folder / FACTS)
    except UserError:
        return {}
    invalid = {name for name, rule in FACTS_FORM.items() if misfit(facts.get(name), rule)}
    return {name: value for name, value in facts.items() if name not in invalid}


def write_state(folder: Path, states: dict[str, dict], values: dict) -> None:
    """Write the training state into a new checkpoint: state dicts by name, and plain values.
    UserError if a tensor is not finite or something cannot be read without unpickling."""
    check_finite(states)
    torch.save(states, folder / STATE_TENSORS)
    read_states(folder)
    write_json(folder / STATE_JSON, {"format": STATE_FORMAT, **values})


def read_values(folder: Path, form: dict[str, Form]) -> dict:
    """The plain values of a training state; UserError if they do not fit `form`."""
    return read_json(folder / STATE_JSON, {"format": STATE_FORMAT_RULE, **form})


def read_states(folder: Path) -> dict[str, dict]:
    """The state dicts of a training state, mapped from the file; nothing is unpickled."""
    path = folder / STATE_TENSORS
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises a dozen types
        raise UserError(f"{path}: cannot be read ({first_line(error)})") from error
