"""Folders that are whole or absent: written aside, synced, renamed, with the size and hash of every file.

A checkpoint is such a folder with the model and tokenizer (`save_pretrained`) and the training state: tensors and random
states in `training_state.pt` (read with `weights_only=True`), everything else in `training_state.json`.
"""
from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pretrain.command import UserError, first_line
from pretrain.config import OBJECTIVES
from pretrain.files import integer, markdown_table, misfit, read_json, sha256_of, sync, write_json

RUN_ENTRY = (r"(config|summary)\.json|metrics\.jsonl|added_tokens\.tsv|events\.out\.tfevents.*|test_predictions\.csv"
             r"|confusion\.png|\.?(best|final|checkpoint-\d+)(\.\w+)?|.*\.(tmp|partial)|\.lock")  # --overwrite replaces nothing else
CHECKSUMS = "checksums.json"
FACTS = "pretraining.json"  # what scripts/evaluate.py reads its defaults from
FACTS_FORM = {"objective": (OBJECTIVES.__contains__, "an objective"), "max_length": integer(8, 1 << 16), "eval_tokens": integer(1, 1 << 40),
              "eval_batch_size": integer(1, 1 << 20)}
STATE_JSON, STATE_TENSORS = "training_state.json", "training_state.pt"
DISK_ERRORS = (OSError, RuntimeError, SafetensorError)  # torch.save and safetensors raise their own on a full disk


def write_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a folder beside `folder` and put it in its place; what was there stays whole until it has been read back.

    UserError where the disk is full or not writable; nothing else is changed then."""
    temporary, previous = folder.with_name(f".{folder.name}.partial"), folder.with_name(f".{folder.name}.previous")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        write(temporary)
        files = sorted(path for path in temporary.rglob("*") if path.is_file())
        sums = {str(path.relative_to(temporary)): {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in files}
        (temporary / CHECKSUMS).write_text(json.dumps(sums, indent=1), encoding="utf-8")
        for path in [*files, temporary / CHECKSUMS, temporary]:
            sync(path)
        problem = problem_of(temporary, needed=())
        if problem:
            raise OSError(f"reading it again, {problem}")
        shutil.rmtree(previous, ignore_errors=True)
        if folder.exists():
            folder.rename(previous)
        temporary.rename(folder)
        sync(folder.parent)
        shutil.rmtree(previous, ignore_errors=True)
    except DISK_ERRORS as error:
        if isinstance(error, torch.OutOfMemoryError) or "DataLoader" in str(error):
            raise
        shutil.rmtree(temporary, ignore_errors=True)
        put_back(folder)
        reason = getattr(error, "strerror", None) or str(error).split("\n")[0]
        raise UserError(f"{folder}: cannot be written ({reason}); needed is room and the right to write. "
                        "What was there before is whole") from error


def check_output(output: Path, overwrite: bool, other_way: str | None = "", entries_of_a_run: str = RUN_ENTRY) -> None:
    """UserError where `output` holds something and --overwrite is not given, or something that no run has written; `other_way` out is
    told, with None what is there may stay."""
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output}: is a file; needed is a folder")
    entries = {entry.name for entry in output.iterdir()} - {".lock"} if output.is_dir() else set()
    strange = sorted(name for name in entries if not re.fullmatch(entries_of_a_run, name))
    if overwrite and strange:
        raise UserError(f"--output {output} --overwrite: holds {strange[0]}, which no run has written; needed is the folder of a run")
    if entries and not overwrite and other_way is not None:
        raise UserError(f"--output {output}: is not empty; needed is another folder, {other_way}or --overwrite to replace it")


def make_output(output: Path, overwrite: bool, has_result: bool) -> Path | None:
    """Make the folder of a run; with `overwrite` what is there is renamed, and is to be removed once the new run has a result: its
    name. What has no result has not replaced anything yet: then what stands aside already is worth more."""
    replaced = output.with_name(f".{output.name}.replaced")
    if overwrite and output.is_dir():
        shutil.rmtree(replaced if has_result or not replaced.exists() else output, ignore_errors=True)
        if output.exists():
            output.rename(replaced)
    output.mkdir(parents=True, exist_ok=True)
    remove_leftovers(output)
    return replaced if replaced.exists() else None


def put_back(folder: Path) -> None:
    """Put back what an interrupted `write_folder` had moved aside."""
    previous = folder.with_name(f".{folder.name}.previous")
    if previous.exists() and not folder.exists():
        previous.rename(folder)


def problem_of(folder: Path, needed: tuple[str, ...] = (STATE_JSON, STATE_TENSORS)) -> str | None:
    """What is wrong with a folder of `write_folder`, naming the file; None if sizes and hashes agree."""
    if not (folder / CHECKSUMS).is_file():  # else reading a pipe of that name would wait
        return f"{folder / CHECKSUMS} cannot be read (there is no such file)"
    try:
        sums = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8"))
        for name, expected in sums.items():
            path = folder / name
            if Path(name).is_absolute() or ".." in Path(name).parts:
                return f"{folder / CHECKSUMS} names {name}, outside the folder"
            if not path.is_file():
                return f"{path} is missing"
            if path.stat().st_size != expected["bytes"]:
                return f"{path} has {path.stat().st_size} bytes, needed are {expected['bytes']}"
        with ThreadPoolExecutor() as pool:  # a resumed run waits for it; hashing leaves other threads their way
            for name, digest in zip(sums, pool.map(sha256_of, [folder / name for name in sums])):
                if digest != sums[name]["sha256"]:
                    return f"{folder / name} is damaged (its hash differs)"
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        return f"{folder / CHECKSUMS} cannot be read ({error})"
    return None if set(needed) <= set(sums) else f"{folder} holds no training state"


def checkpoints(output: Path) -> list[Path]:
    """Checkpoint folders of a run, newest first."""
    return sorted((path for path in output.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)), key=step_of, reverse=True)


def newest_good(output: Path) -> Path | None:
    """The newest checkpoint that verifies; damaged ones are named and passed over. None where there is no checkpoint.

    UserError where there are some and none verifies: a run never restarts silently."""
    problems = []
    for folder in checkpoints(output):
        problem = problem_of(folder)
        if problem is None:
            return folder
        print(f"passed over: {problem}")
        problems.append(problem)
    if problems:
        raise UserError(f"--resume --output {output}: none of its {len(problems)} checkpoints verifies ({problems[0]}); "
                        "restore one, or start anew with --overwrite")
    return None


def step_of(folder: Path) -> int:
    """The step in a checkpoint's name."""
    return int(folder.name.rpartition("-")[2])


def set_aside_after(output: Path, step: int) -> None:
    """Rename checkpoints beyond `step`, which a resumed run has passed over as damaged: they must not count as the newest."""
    for folder in checkpoints(output):
        if step_of(folder) > step:
            aside = folder.with_name(f".{folder.name}.damaged")
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)


def prune(output: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints; the folder's name goes first, so that none is found half-removed."""
    for folder in checkpoints(output)[keep:]:
        folder.rename(folder.with_name(f".{folder.name}.removed"))
    remove_leftovers(output)


def remove_leftovers(output: Path) -> None:
    """Remove what an interrupted save or removal has left."""
    for leftover in [*output.glob(".*.partial"), *output.glob(".*.removed"), *output.glob(".*.previous")]:
        shutil.rmtree(leftover, ignore_errors=True) if leftover.is_dir() else leftover.unlink(missing_ok=True)


def check_finite(tensors: dict[str, torch.Tensor]) -> None:
    """UserError where one of `tensors` holds a number that is not finite: it must not reach a checkpoint."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise UserError(f"{name} holds numbers that are not finite: nothing is saved, the run stops; what was saved before is whole. A "
                            "lower --learning-rate, --max-grad-norm 1 or --precision fp32 may help")


def write_model(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, facts: dict,
                weights: dict[str, torch.Tensor]) -> None:
    """A model folder that opens with transformers: `weights`, tokenizer, a model card, and the card's facts as JSON."""
    check_finite(weights)
    model.save_pretrained(folder, state_dict=weights)
    tokenizer.save_pretrained(folder)
    write_json(folder / FACTS, facts)
    (folder / "README.md").write_text(_pretraining_card(facts, model.config.model_type), encoding="utf-8")


def read_facts(folder: Path) -> dict:
    """The facts that `write_model` has left in a model folder, without garbled ones; {} for any other checkpoint."""
    try:
        content = read_json(folder / FACTS)
    except UserError:
        return {}
    return {name: value for name, value in content.items() if name not in FACTS_FORM or not misfit(value, FACTS_FORM[name])}


def _pretraining_card(facts: dict, family: str) -> str:
    rows = [[name.replace("_", " "), value] for name, value in facts.items() if not isinstance(value, dict)]
    rows += [[f"held-out {name.replace('_', ' ')}", f"{value:.4f}"] for name, value in facts["held_out"].items()]
    untrained = ("\n\nThe pooler and the NSP head (`bert.pooler`, `cls.seq_relationship`) were not trained: the objective is MLM "
                 "alone." if facts["objective"] == "mlm" and family == "bert" else "")
    return model_card("fill-mask", [family, "pretraining"], f"{family}, pretrained with {facts['objective']}", "`AutoModelForPreTraining`, "
                      f"`AutoModelForMaskedLM`, `AutoModel` and `pipeline(\"fill-mask\")` of transformers.{untrained}", rows)


def model_card(task: str, tags: list[str], title: str, opens_with: str, rows: list[list[object]]) -> str:
    """README.md of a model folder, as the hub reads it."""
    return (f"---\nlibrary_name: transformers\npipeline_tag: {task}\ntags:\n" + "".join(f"- {tag}\n" for tag in tags)
            + f"---\n\n# {title}\n\nOpens with {opens_with}\n\n{markdown_table(['what', 'value'], rows)}\n")


def write_state(folder: Path, tensors: dict, values: dict) -> None:
    """Training state into a checkpoint under construction."""
    check_finite({f"the optimizer's {part} of {name}": tensor for name, parts in tensors["optimizer"].items()
                  for part, tensor in parts.items()})
    torch.save(tensors, folder / STATE_TENSORS)
    (folder / STATE_JSON).write_text(json.dumps(values, indent=1), encoding="utf-8")


def read_values(folder: Path, form: object = MappingProxyType({})) -> dict:
    """The training state's plain values, which fit `form` (pretrain/files.py)."""
    return read_json(folder / STATE_JSON, form, "a checkpoint as a run has written it")


def read_tensors(folder: Path) -> dict:
    """The training state's tensors, mapped from the file; nothing is unpickled."""
    try:
        return torch.load(folder / STATE_TENSORS, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch has a dozen kinds for what it cannot read
        raise UserError(f"{folder / STATE_TENSORS}: cannot be read ({first_line(error)})") from error


def random_states(device: torch.device) -> dict[str, torch.Tensor]:
    """Random states of this process: the streams that dropout draws from."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_random_states(states: dict[str, torch.Tensor], device: torch.device) -> None:
    """The counterpart of `random_states`."""
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
