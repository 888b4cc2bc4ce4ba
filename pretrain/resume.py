"""From the folder of a run to the checkpoint that it continues from, with options that still fit.

Options are saved as plain values with absolute paths, so that a run resumes from any folder.
"""

import datetime
import glob
import os
from dataclasses import asdict
from pathlib import Path

import torch

from pretrain.config import MODEL_SIZES, may_change, typed
from pretrain.errors import UserError, check, option_named
from pretrain.files import read_json
from pretrain.runtime import checkpoint as ckpt
from pretrain.runtime.distributed import World, gather
from pretrain.schema import flag

MODEL_OPTIONS = {"model", "tokenizer"}  # a folder, or a size or a name on the hub
PATTERNS = {"train", "valid", "test"}  # paths or globs
PATH_OPTIONS = {*PATTERNS, "lexicon", "similar", "add_tokens", "cache"}


def run_folder(output: str | None, prefix: str = "") -> Path:
    """The folder of --output; by default runs/DATE-TIME, where `open_output` may add a number."""
    if not output:
        return Path(f"runs/{prefix}{datetime.datetime.now():%Y%m%d-%H%M%S}")
    path = Path(output)
    return path if path.name not in ("", "..") else Path(os.path.abspath(output))


def resume_point(output: Path, config, form: dict, world: World) -> tuple[Path | None, dict]:
    """(checkpoint to resume from, its plain values); (None, {}) for a new run.

    UserError for a folder in use without --resume or --overwrite, or for a changed option. Restores
    the number of threads: they split sums, so a different number gives different bits."""
    checkpoint = gather(_find_checkpoint(output, config) if world.is_main else None)[0]
    if not checkpoint:
        return None, {}
    with option_named("--resume"):
        saved = ckpt.read_values(checkpoint, form)
    check(changed_options(config, saved, output / "config.json"))
    if saved["processes"] == world.size:
        torch.set_num_threads(saved["threads"])
    return checkpoint, saved


def _find_checkpoint(output: Path, config) -> Path | None:
    ways = "a new folder, --resume to continue its run, or --overwrite to replace it"
    with option_named("--output"):
        may_exist = config.resume or not config.output  # else `open_output` chooses a free name
        ckpt.check_output(output, config.overwrite, None if may_exist else ways)
    if not config.resume:
        return None
    for previous in output.glob(".*.previous"):  # left by an interrupted save
        ckpt.put_back(previous.with_name(previous.name[1:].removesuffix(".previous")))
    with option_named("--resume --output"):
        checkpoint = ckpt.newest_good(output)
    if checkpoint:
        print(f"continuing from {checkpoint}")
    elif (output / "metrics.jsonl").exists():
        print(f"--resume --output {output}: has no checkpoint; the run starts again")
    return checkpoint


def portable_options(config) -> dict:
    """The options as plain values, with absolute paths that work from any folder."""
    options = {}
    for name, value in asdict(config).items():
        if isinstance(value, tuple):
            options[name] = [_portable(name, item) for item in value]
        else:
            options[name] = _portable(name, value)
    if type(config).model in MODEL_SIZES and config.model in MODEL_SIZES:
        options["model"] = config.model  # a size, even if there is a folder of this name
    return options


def _portable(name: str, value: object) -> object:
    is_path = name in PATH_OPTIONS and value and not value.startswith("hub:")
    if name in MODEL_OPTIONS and value:
        is_path = Path(value).exists()
    if not is_path:
        return value
    path = os.path.expanduser(value)
    is_glob = name in PATTERNS and glob.escape(path) != path and not os.path.exists(path)
    folder = glob.escape(os.getcwd()) if is_glob else os.getcwd()
    return os.path.normpath(os.path.join(folder, path))


def _has_moved(name: str, before: object, now: object) -> bool:
    """Whether the files of an option are in another place, under the same names. What decides a run
    is checked elsewhere: text, rows and similar words by their content; the model is in the
    checkpoint."""
    if name not in PATH_OPTIONS | MODEL_OPTIONS or not before or not now:
        return False
    old, new = ([value] if isinstance(value, str) else value for value in (before, now))
    if not (isinstance(old, list) and all(isinstance(item, str) for item in old)):
        return False

    def is_same(was: str, path: str) -> bool:
        # A folder may since have been given the name of the hub model.
        is_named = was not in MODEL_SIZES and path == os.path.abspath(was)
        is_gone = os.path.isabs(was) and not os.path.exists(was)
        return path == was or is_named or (Path(was).name == Path(path).name and is_gone)

    return len(old) == len(new) and all(map(is_same, old, new))


def changed_options(config, saved: dict, path: Path) -> list[str]:
    """A problem, with both values, for each option that changed but must not on resume.

    `saved`: the plain values of a checkpoint, or only its "options". Names `path`, the run's
    config.json, if the new value comes from there."""
    before, now, problems = saved["options"], portable_options(config), []
    try:
        in_file = read_json(path)
    except UserError:
        in_file = {}
    changed = {name for name in before.keys() & now.keys() if before[name] != now[name]}
    changed -= may_change(type(config))
    changed = {name for name in changed if not _has_moved(name, before[name], now[name])}
    if now["micro_batch_size"] == saved.get("micro_batch_size"):
        changed.discard("micro_batch_size")
    if (before.get("lowercase"), now.get("lowercase")) == ("on", "auto"):
        changed.discard("lowercase")  # the default of earlier versions; the tokenizer is saved
    replaced = {}
    if {"phases", "max_length"} <= changed:  # one replaced the other
        pair = ("phases", "max_length") if config.phases else ("max_length", "phases")
        replaced = {pair[0]: pair[1]}
        changed.remove(pair[1])
    for name in sorted(changed):
        old = replaced.get(name, name)
        values = before[old] if isinstance(before[old], list) else [before[old]]
        shown = " ".join(map(str, [flag(old), *values]))
        start = "without it" if values in ([], [None]) else f"with {shown}"
        where, way = "", "omit the option"
        if name in in_file and in_file[name] == now[name]:
            where, way = f"{path}: ", "restore the value"
        problems.append(
            f"{where}{typed(config, name)}: the run started {start}, which a resume cannot change; "
            f"{way}, or start a new run in another --output"
        )
    return problems
