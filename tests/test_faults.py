"""Whatever happens to processes, numbers, memory or disk, a run resumes as if nothing had happened,
or stops with a message and keeps its checkpoints. tests/README.md lists the faults; stress.py kills
a run many times at random moments."""

import json
import math
import os
import shutil
import signal
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    SIZES,
    arguments_of,
    assert_same,
    assert_same_run,
    at,
    built,
    change_json,
    fail,
    in_processes,
    interrupted_copy,
    leaves,
    make_documents,
    refusal,
    resume,
    rows,
    script,
    send,
    summary_of,
    ten_steps,
    without_privileges,
    write_documents,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from stress import assert_one_curve
from tensorboard.summary.writer import event_file_writer
from test_safety import FUZZ, mutations, put
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.utils.data import get_worker_info

import pretrain.run
from pretrain import files, inputs, plan, train
from pretrain.cli import run_command
from pretrain.commands.pretrain import main
from pretrain.data import loader
from pretrain.data.collate import Collator
from pretrain.model.packed import PackedModel
from pretrain.pretraining import PRETRAINING_FORM, PretrainingRun
from pretrain.runtime import checkpoint as ckpt
from pretrain.runtime import nan_guard
from pretrain.runtime.monitor import Monitor

KILL, TERM, INT, USR1 = signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1
HUP = signal.SIGHUP
FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
WEIGHT = "bert.embeddings.word_embeddings.weight"


# Faults: functions that change the process in which a run will start.


def all_of(*faults):
    return lambda: [fault() for fault in faults]


def in_a_worker(act):
    """Call `act` in each worker process, before it packs a micro-batch."""
    return at(Collator, "__call__", 0, lambda *given: act() if get_worker_info() else None)


def small_memory(tokens):
    """A device on which larger micro-batches do not fit."""

    def act(model, hidden, batch):
        if model.training and len(batch.input_ids) > tokens:
            raise FULL

    return at(PackedModel, "losses", 0, act)


def nan_losses(*steps):
    """The losses of these steps (counted from 1) are NaN."""

    def patch():
        losses, begun = PackedModel.losses, []

        def poisoned(self, hidden, batch):
            factor = math.nan if self.training and len(begun) in steps else 1.0
            terms = losses(self, hidden, batch)
            return {name: replace(term, sum=term.sum * factor) for name, term in terms.items()}

        PackedModel.losses = poisoned
        at(train, "train_step", 0, lambda *given: begun.append(1))()

    return patch


# Runs.


def start(output, *options, count=1, fault=None, victim=None, ends_with=0):
    """Run pretrain.py in `count` new processes, which end with this code, or these by rank; their
    stderr. `fault` happens in the process of rank `victim`, or in all."""

    def prepare(rank):
        if fault and victim in (None, rank):
            fault()

    argv = arguments_of(*options, ["--output", output])
    ended = in_processes(output.parent, main, argv, count, prepare)
    codes = ends_with if isinstance(ends_with, list) else [ends_with] * count
    assert [code for code, _ in ended] == codes, ended
    assert not any("Traceback" in text for _, text in ended), ended
    return [text for _, text in ended]


def printed(output):
    """The output of the first process."""
    return (output.parent / "out-0").read_text()


@pytest.fixture(scope="module")
def options(text_file, cache):
    return ten_steps(text_file, cache, micro_batch_size=4)


@pytest.fixture(scope="module")
def undisturbed(options, tmp_path_factory):
    """The undisturbed run, by optimizer, number of processes and more options."""
    work = tmp_path_factory.mktemp("undisturbed")

    def run(optimizer="adamw", count=1, *more):
        output = work / " ".join([optimizer, str(count), *more])
        if not output.exists():
            start(output, options, ["--optimizer", optimizer, *more], count=count)
        return output

    return run


@pytest.fixture(scope="module")
def finished(undisturbed):
    return undisturbed()


@pytest.fixture
def stopped(finished, output):
    """A run that a crash interrupted after step 4."""
    return interrupted_copy(finished, output, 4)


def newest(output):
    """The step of the newest checkpoint, 0 without one."""
    return max(map(ckpt.step_of, ckpt.checkpoints(output)), default=0)


def micro_batch_size(output):
    return ckpt.read_values(ckpt.newest_good(output), PRETRAINING_FORM)["micro_batch_size"]


def later(seconds):
    """TensorBoard orders the files of a run by the second in their names."""

    def patch():
        event_file_writer.time = SimpleNamespace(time=lambda: time.time() + seconds)

    return patch


# Killed.

PLACES = {
    "tokenizer": (inputs, "make_tokenizer", 1),
    "options": (pretrain.run, "write_json", 1),
    "save of a model": (ckpt, "write_model", 1),
    "first sync": (ckpt, "sync", 3),
    "save of a state": (ckpt, "write_state", 2),
    "later sync": (ckpt, "sync", 30),
    "end": (train, "conclude", 1),
    "between two renames": (Path, "rename", 4),
    "step": (train, "train_step", 6),
    "evaluation": (PretrainingRun, "validate", 2),
    "removal": (ckpt, "remove_leftovers", 2),
    "restart": (ckpt, "read_states", 1),
}
KILLS = [
    ("tokenizer,options,save of a model,first sync,save of a state,later sync,end", "muon"),
    ("step,evaluation,removal,restart", "adamw"),
    ("between two renames", "adamw"),
]


@pytest.mark.parametrize(("places", "optimizer"), KILLS)
def test_killed_anywhere_then_resumed(undisturbed, options, output, places, optimizer):
    """Each restart is killed at the next place, the last one ends."""
    whole = undisturbed(optimizer)
    more = ["--optimizer", optimizer, "--keep", 1, "--resume"]
    for number, place in enumerate(places.split(",")):
        fault = all_of(later(number), at(*PLACES[place], send(KILL)))
        start(output, options, more, fault=fault, ends_with=-KILL)
    if places == "between two renames":
        assert (output / ".best.previous").is_dir() and not (output / "best").exists()
    start(output, options, more, fault=later(number + 1))
    assert_same_run(whole, output)
    assert_one_curve(output)
    assert summary_of(output)["state"] == "finished"
    assert [path.name for path in ckpt.checkpoints(output)] == ["checkpoint-10"]
    assert ckpt.problem_of(output / "best", needed=()) is None
    assert not list(output.glob(".*"))


def test_killed_with_workers_in_the_second_epoch(options, output, tmp_path):
    """The first batch after a restart is the next one, in the middle of an epoch."""
    text = write_documents(tmp_path / "text.txt", make_documents(10))
    more = ["--train", text, "--max-steps", 14, "--eval-every", 60, "--optimizer", "muon"]
    whole = resume(tmp_path / "whole", options, more)
    assert ckpt.read_states(whole / "checkpoint-10")["data"]["position"][0] > 0
    kill = at(train, "train_step", 12, send(KILL))
    start(output, options, more, "--workers 2", fault=kill, ends_with=-KILL)
    resume(output)
    assert_same_run(whole, output, step=14)


def test_a_restart_loop_ends(finished, output):
    """On a finished run, --resume says so and changes nothing, even without its checkpoints."""
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    start(finished, "--resume")
    assert f"{finished} is finished, at step 10" in printed(finished)
    assert before == {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    interrupted_copy(finished, output, 0)
    shutil.copytree(finished / "final", output / "final")
    start(output, "--resume")
    assert f"{output} is finished" in printed(output) and not ckpt.checkpoints(output)
    (told,) = start(output, "--resume --learning-rate 3", ends_with=2)
    assert told.startswith("error: --learning-rate 3.0: ")


def test_a_finished_run_in_a_read_only_folder_is_reported(finished, output):
    """With its summary, and without writing."""
    shutil.copytree(finished, output)
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    output.chmod(0o555)
    try:
        start(output, "--resume", fault=without_privileges)
    finally:
        output.chmod(0o755)
    assert f" {summary_of(finished)['eval_perplexity']:,.4f}\n" in printed(output)
    assert before == {path: path.stat().st_mtime_ns for path in output.rglob("*")}


@pytest.mark.parametrize(
    ("name", "step", "kept"),
    [("best", 6, True), ("best", 6, False), ("best", 10, True), ("final", 10, True)],
)
def test_a_damaged_model_folder_is_rewritten(undisturbed, output, name, step, kept, capsys):
    """`best/` by a later evaluation if the checkpoint of its step is not `kept`."""
    finished = undisturbed("adamw", 1, "--seed", "7")  # its last evaluation is the best
    weights = Path(name, "model.safetensors")
    shutil.copytree(finished, output) if step == 10 else interrupted_copy(finished, output, step)
    (output / weights).write_bytes(b"lost")
    if not kept:
        best = ckpt.read_states(ckpt.newest_good(output))["train"]["best_step"]
        shutil.rmtree(output / f"checkpoint-{best}")
    resume(output)
    assert_same_run(finished, output)
    assert ckpt.problem_of(output / name, needed=()) is None
    assert (output / weights).read_bytes() == (finished / weights).read_bytes()
    if name == "best":
        assert f"{output / weights} is " in capsys.readouterr().out


def test_a_damaged_best_model_of_a_finished_run_whose_checkpoint_is_gone_is_named(
    finished, output, capsys
):
    shutil.copytree(finished, output)
    weights, best = output / "best" / "model.safetensors", summary_of(output)["best_step"]
    weights.write_bytes(b"lost")
    assert best < 10
    shutil.rmtree(output / f"checkpoint-{best}")
    resume(output)
    assert f"{weights} is " in capsys.readouterr().out and weights.read_bytes() == b"lost"


def test_a_finished_run_without_its_summary_writes_it_again(finished, output):
    """Killed between `final/` and the summary, or the disk was full."""
    shutil.copytree(finished, output)
    (output / "summary.json").unlink()
    resume(output)
    before, after = summary_of(finished), summary_of(output)
    assert after["use"].removeprefix(str(output)) == before["use"].removeprefix(str(finished))
    assert after["best_step"] == before["best_step"]
    assert_same_run(finished, output)


def test_a_best_model_that_is_later_than_the_checkpoint_is_that_of_the_checkpoint(finished, output):
    """After a kill: with other options, the run may never evaluate that step again."""
    interrupted_copy(finished, output, 8)
    shutil.rmtree(output / "best")
    shutil.copytree(finished / "final", output / "best")  # of step 10
    run = built(output, "--resume --config", [output / "config.json"])
    assert run.repair_best(6) is None and ckpt.read_facts(output / "best")["step"] == 6


def test_an_extended_run_writes_final_again(finished, output):
    """Killed between the last checkpoint and the new `final/`."""
    shutil.copytree(finished, output)
    resume(output, "--max-steps 12")
    shutil.rmtree(output / "final")
    shutil.copytree(finished / "final", output / "final")
    resume(output)
    assert ckpt.read_facts(output / "final")["step"] == 12


@pytest.mark.parametrize("content", [None, "{", '{"learning_rate": "x"}'])
def test_options_come_from_a_checkpoint_if_config_json_is_lost(finished, output, content, capsys):
    interrupted_copy(finished, output, 8)
    path = output / "config.json"
    path.unlink() if content is None else path.write_text(content)
    resume(output)
    assert_same_run(finished, output)
    assert (str(path) in capsys.readouterr().out) == (content is not None)


def test_an_edited_config_json_is_named(stopped, capsys):
    path = stopped / "config.json"
    change_json(path, lambda options: options | {"seed": 1})
    refusal(main, ["--resume", "--output", stopped], capsys, f"{path}: --seed 1: ")


# Training states from someone else: their hashes match.


def change_state(output, name, change):
    """Change a file of the newest training state, and its hash; returns its folder."""
    folder = ckpt.checkpoints(output)[0]
    path, sums = folder / name, json.loads((folder / ckpt.CHECKSUMS).read_text())
    if name == ckpt.STATE_JSON:
        change_json(path, change)
    else:
        torch.save(change(ckpt.read_states(folder)), folder / "new")
        (folder / "new").replace(path)
    sums[name] = {"bytes": path.stat().st_size, "sha256": files.sha256_of(path)}
    (folder / ckpt.CHECKSUMS).write_text(json.dumps(sums))
    return folder


def test_a_checkpoint_of_another_format_is_refused(stopped, capsys):
    """As from a version without format numbers."""
    folder = change_state(stopped, ckpt.STATE_JSON, lambda values: put(values, ("format",), "drop"))
    before = {path: path.stat().st_mtime_ns for path in stopped.rglob("*")}
    refusal(main, ["--resume", "--output", stopped], capsys, f"--resume {folder}/")
    assert before == {path: path.stat().st_mtime_ns for path in stopped.rglob("*")}


@settings(FUZZ, max_examples=25)
@given(mutate=mutations(), name=st.sampled_from([ckpt.STATE_JSON, ckpt.STATE_TENSORS]))
def test_a_mutated_training_state(finished, tmp_path, mutate, name):
    """The run continues, here for a step, or a message says why not."""
    output, threads = tmp_path / "hostile", torch.get_num_threads()
    shutil.rmtree(output, ignore_errors=True)
    interrupted_copy(finished, output, 2)
    change_state(output, name, mutate)
    try:
        argv = arguments_of("--resume --max-minutes 1e-9", ["--output", output])
        assert run_command(main, argv) in (0, 2)
    finally:
        torch.set_num_threads(threads)
        files.unlock(output)


OF_WEIGHT = ("optimizer", "weights", WEIGHT)
SPOILED = [
    ((), []),
    (("random",), {"processes": [{"cpu": 1}]}),
    (("optimizer", "groups"), []),
    (OF_WEIGHT, "drop"),
    ((*OF_WEIGHT, "exp_avg"), torch.zeros(1, 1).expand(99, 32)),
]


@pytest.mark.parametrize(("place", "value"), SPOILED)
def test_tensors_of_a_training_state_that_do_not_fit(stopped, place, value, capsys):
    folder = change_state(stopped, ckpt.STATE_TENSORS, lambda state: put(state, place, value))
    assert str(folder) in refusal(main, ["--resume", "--output", stopped], capsys)


# Signals.

SIGNALS = [
    (1, train, "train_step", 5, 5, INT, "muon"),
    (1, train, "save_checkpoint", 1, 3, TERM, "muon"),
    (1, PretrainingRun, "validate", 1, 0, TERM, "adamw"),
    (1, PretrainingRun, "validate", 4, 10, HUP, "adamw"),
    (2, train, "train_step", 5, 5, USR1, "adamw"),
]


@pytest.mark.parametrize(("count", "target", "name", "call", "step", "number", "kind"), SIGNALS)
def test_a_signal_saves_and_exits(
    undisturbed, options, output, count, target, name, call, step, number, kind
):
    """A signal to one process stops all of them after the same step."""
    fault = {"fault": at(target, name, call, send(number)), "victim": count - 1}
    code = 128 + number
    for text in start(output, options, ["--optimizer", kind], count=count, **fault, ends_with=code):
        assert number.name in text.splitlines()[-1]
    assert newest(output) == step
    assert number.name in summary_of(output)["state"]
    start(output, "--resume", count=count, fault=later(1))
    assert_same_run(undisturbed(kind, count), output)
    assert_one_curve(output)


def end_with_the_reader(*given):
    """As when Ctrl-C also ends `tee`."""
    reader, writer = os.pipe()
    os.dup2(writer, 2)
    os.close(reader)
    os.close(writer)
    send(TERM)()


TWICE = [at(train, name, 5, send(INT)) for name in ("train_step", "sum_counts")]
# As from a job scheduler or a closed terminal.
TO_GROUP = all_of(os.setsid, at(train, "train_step", 5, lambda *given: os.killpg(0, HUP)))
ENDS = {  # the fault, more options, the exit code, the newest checkpoint
    "second SIGINT": (all_of(*TWICE), "", -INT, 4),
    "before training": (at(plan, "count_epoch", 1, send(TERM)), "", 128 + TERM, 0),
    "workers signaled": (TO_GROUP, "--workers 2", 128 + HUP, 5),
    "no reader": (at(train, "train_step", 5, end_with_the_reader), "", 128 + TERM, 5),
}


@pytest.mark.parametrize("name", ENDS)
def test_how_a_signal_ends_the_run(finished, options, output, name):
    """A second SIGINT ends it at once; others after the step, whoever else gets the signal."""
    fault, more, code, step = ENDS[name]
    (text,) = start(output, options, more, fault=fault, ends_with=code)
    assert name == "no reader" or "SIG" in text.splitlines()[-1]
    assert text.count("SIGINT") == (name == "second SIGINT")
    assert newest(output) == step
    resume(output, options)
    assert_same_run(finished, output)


# Failures: one message, exit code 2, and the run resumes as if nothing had happened.


def spoil_state(part):
    """A value of a weight, or of its optimizer state, becomes infinite before step 6."""

    def act(model, batches, optimizers, *more):
        weight = optimizers[-1].param_groups[0]["params"][0]
        values = weight.data if part == "weight" else optimizers[-1].state[weight][part]
        values.view(-1)[3] = math.inf

    return at(train, "train_step", 6, act)


def lose_a_write(folder, **named):
    """A disk loses an accepted write, before the save of step 6 is read back."""
    path = folder / "model.safetensors"
    if folder.name == ".checkpoint-6.partial":
        path.write_bytes(path.read_bytes()[:-8] + bytes(8))


def stuck_worker():
    loader.SILENCE_SECONDS = 0.5
    in_a_worker(lambda: time.sleep(3))()


NO_SPACE = OSError(28, "No space left on device", "metrics.jsonl")
FAILURES = {  # the fault, more options, what the message names, the newest checkpoint
    "full memory": (at(train, "train_step", 6, fail(FULL)), "", "--micro-batch-size 4", 4),
    "full disk": (at(Monitor, "log", 7, fail(NO_SPACE)), "", "metrics.jsonl: No space left", 4),
    "lost write": (at(ckpt, "problem_of", 0, lose_a_write), "--keep 1", "model.safetensors", 4),
    "dead worker": (in_a_worker(send(KILL)), "--workers 1", "--workers", 0),
    "stuck worker": (stuck_worker, "--workers 1", "--workers", 0),
    "infinite weight": (spoil_state("weight"), "", ".weight", 4),
    "infinite momentum": (spoil_state("momentum_buffer"), "--optimizer muon", ".weight", 4),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_is_reported_and_the_run_resumes(undisturbed, options, output, name):
    fault, more, named, step = FAILURES[name]
    (text,) = start(output, options, more, fault=fault, ends_with=2)
    assert named in text[text.index("error: ") :]
    assert newest(output) == step
    for path in output.glob("*/model.safetensors"):
        assert all(weight.isfinite().all() for weight in load_file(path).values())
    resume(output, "--keep 9")
    assert_same_run(undisturbed("muon" if "muon" in more else "adamw"), output)


# Steps that are not finite.


@pytest.mark.parametrize(
    ("optimizer", "count", "more"), [("adamw", 1, ""), ("muon", 2, ""), ("adamw", 2, "--shard")]
)
def test_a_non_finite_step_keeps_its_number_and_its_data(
    undisturbed, options, output, optimizer, count, more
):
    """It changes nothing on any process, even if only one of them finds it."""
    changes = ["--optimizer", optimizer, "--save-every", 1, "--max-steps", 4]
    fault = {"fault": nan_losses(3), "victim": count - 1}
    messages = start(output, options, changes, more, count=count, **fault)
    assert f"step 3, data position 0 0 8 {2 / 3}: " in messages[0]
    assert summary_of(output)["skipped_steps"] == 1
    assert [row["step"] for row in rows(output)] == [0, 1, 3, 4]
    folders = [output / f"checkpoint-{step}" for step in (2, 3, 4)]
    before, after, last = [ckpt.read_states(folder) for folder in folders]
    assert_same(leaves(before["optimizer"]["weights"]), leaves(after["optimizer"]["weights"]))
    whole = undisturbed(optimizer, count)
    assert last["data"] == ckpt.read_states(whole / "checkpoint-4")["data"]
    before, after, last = [load_file(folder / "model.safetensors") for folder in folders]
    assert_same(before, after)
    assert not torch.equal(after[WEIGHT], last[WEIGHT])


def test_a_run_that_only_skips_stops_and_shows_how_to_see_the_batch(options, output, monkeypatch):
    monkeypatch.setattr(nan_guard, "MAX_SKIPPED_IN_A_ROW", 3)
    path = output.parent / "step 7"

    def save(model, batches, *more):
        torch.save([asdict(batch) for batch in batches], path)

    # After the good step 4, the count starts again.
    fault = all_of(nan_losses(2, 3, 5, 6, 7, 8, 9, 10), at(train, "train_step", 7, save))
    (text,) = start(output, options, "--mask-rate 0.1 0.3", fault=fault, ends_with=2)
    assert "step 7" in text[text.index("error: ") :]
    words = text[text.index("python scripts/show_masks.py") :].split()[2:]
    assert words[-2] == "--save"
    script("show_masks").main([*words[:-1], str(output / "batch.pt"), "--examples", "0"])
    shown, trained = (torch.load(of, weights_only=True) for of in (output / "batch.pt", path))
    assert_same(leaves(shown), leaves(trained))
    # The count continues where the run does, from a checkpoint within it.
    guard = ckpt.read_states(output / "checkpoint-6")["guard"]
    assert guard == {"skipped": 4, "skipped_in_a_row": 2}


# Memory.


def test_a_micro_batch_that_does_not_fit_is_halved(options, output, tmp_path):
    """The command of such a run also resumes it."""
    asked = resume(tmp_path / "asked", options, "--micro-batch-size 2 --max-steps 4")
    command = [*options, "--resume", "--max-steps", 4, "--micro-batch-size"]
    start(output, command, "8", fault=small_memory(70))
    assert "--micro-batch-size 8" in printed(output) and "--micro-batch-size 4" in printed(output)
    assert micro_batch_size(output) == 2
    assert_same_run(asked, output, step=4)
    start(output, command, "8 --max-steps 6")
    assert newest(output) == 6 and micro_batch_size(output) == 2
    assert "--micro-batch-size 4" in start(output, command, "4", ends_with=2)[0]


def test_all_processes_halve_a_micro_batch_that_does_not_fit_one(options, output):
    more = "--max-steps 2 --micro-batch-size 8"
    start(output, options, more, count=2, fault=small_memory(140), victim=1)
    assert printed(output).count("--micro-batch-size 8") == 1
    assert micro_batch_size(output) == 4


def test_nothing_is_left_if_no_micro_batch_fits(options, output):
    (text,) = start(output, options, fault=small_memory(1), ends_with=2)
    assert text.startswith("error: --micro-batch-size 1: ") and not output.exists()


def test_a_smaller_device_cannot_resume_a_run(finished, stopped):
    (text,) = start(stopped, "--resume", fault=small_memory(70), ends_with=2)
    assert "--micro-batch-size 4" in text
    resume(stopped)
    assert_same_run(finished, stopped)


# Disk, and two runs in one folder.


def hold_in_child(folder, then):
    """The process number of a forked process that holds `folder`, then calls `then`."""
    child, held = os.fork(), folder.parent / "held"
    if not child:
        files.lock(folder)
        held.touch()
        then()
        os._exit(0)
    while not held.exists():
        time.sleep(0.01)
    return child


def test_a_second_run_on_a_folder_is_refused(finished, stopped, options, tmp_path, capsys):
    other = hold_in_child(stopped, lambda: time.sleep(60))
    link = tmp_path / "link"
    link.symlink_to(stopped)
    for output, more in ((stopped, "--resume"), (stopped, "--overwrite"), (link, "--resume")):
        text = refusal(main, [*options, "--output", output, more], capsys)
        assert f"process {other} on " in text
    os.kill(other, KILL)
    os.waitpid(other, 0)
    resume(stopped)
    assert_same_run(finished, stopped)


def test_a_killed_overwrite_keeps_a_finished_run(finished, options, output):
    """Whose checkpoints were removed, until the new run has one."""
    interrupted_copy(finished, output, 0)
    shutil.copytree(finished / "final", output / "final")
    kill = at(train, "train_step", 1, send(KILL))
    for _ in range(2):
        start(output, options, "--overwrite", fault=kill, ends_with=-KILL)
        assert f"{output.parent / '.run.replaced'}: " in printed(output)
        assert ckpt.problem_of(output.parent / ".run.replaced" / "final", needed=()) is None
    resume(output, options)
    assert_same_run(finished, output)
    assert not (output.parent / ".run.replaced").exists()


def test_a_lock_whose_file_was_removed_while_another_waited(tmp_path):
    """The one who waited holds the file that is there now."""
    child = hold_in_child(
        tmp_path / "run", lambda: (time.sleep(0.2), files.unlock(tmp_path / "run"))
    )
    files.lock(tmp_path / "run", wait=True)
    try:
        os.waitpid(child, 0)
        assert str(os.getpid()) in (tmp_path / ".run.lock").read_text()
    finally:
        files.unlock(tmp_path / "run")
    assert not (tmp_path / ".run.lock").exists()


def test_workers_of_a_killed_process_do_not_hold_its_lock(tmp_path):
    child = hold_in_child(tmp_path / "run", lambda: os.fork() or time.sleep(5))
    os.waitpid(child, 0)
    files.lock(tmp_path / "run")
    files.unlock(tmp_path / "run")


def test_only_the_folder_itself_is_writable(output, monkeypatch):
    """As a volume mounted into a container: the lock file is inside."""
    output.mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != output.parent)
    files.lock(output)
    assert (output / ".lock").is_file()
    assert [path.name for path in output.parent.iterdir()] == [output.name]
    files.unlock(output)


def test_a_run_whose_folder_is_moved_away_stops(finished, options, output, tmp_path):
    """At the next save."""
    moved = tmp_path / "moved"
    fault = at(train, "train_step", 5, lambda *given: output.rename(moved))
    codes = in_processes(
        tmp_path, main, arguments_of(options, ["--output", output]), prepare=lambda rank: fault()
    )
    assert codes[0][0] == 2 and str(output) in codes[0][1] and not output.exists()
    resume(moved)
    assert_same_run(finished, moved)


def test_a_damaged_cached_tokenizer_is_retrained(finished, options, output, tmp_path):
    """One letter is changed, which gives another valid vocabulary."""
    more = ["--cache", tmp_path / "cache"]
    start(tmp_path / "first", options, more, "--max-steps 1")
    (path,) = tmp_path.glob("cache/tokenizer-*/tokenizer.json")
    path.write_text(path.read_text().replace('"river"', '"rivex"'))
    start(output, options, more)
    assert str(path) in printed(output)
    assert_same_run(finished, output)


# Many processes.


def test_a_process_that_dies_takes_the_run_down(undisturbed, options, output):
    """The first one, through which the others meet."""
    fault = {"fault": at(train, "train_step", 5, send(KILL)), "victim": 0}
    _, text = start(output, options, count=2, **fault, ends_with=[-KILL, 2])
    assert "error: " in text
    start(output, "--resume", count=2)
    assert_same_run(undisturbed("adamw", 2), output)


def test_an_error_of_the_first_process_ends_the_waiting_ones(options, output):
    binary = output.parent / "binary"
    binary.write_bytes(b"\0")
    text, _ = start(output, options, ["--train", binary], count=2, ends_with=2)
    assert text.startswith(f"error: --train {binary}: ")


def test_torchrun_restarts_a_run_from_its_checkpoint(undisturbed, options, output):
    """One process of two is killed once; torchrun --max-restarts=1 ends as the same run."""

    def kill_once(*given):
        mark = output.parent / "killed"
        if os.environ["RANK"] == "1" and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), KILL)

    def torchrun(argv):  # as --standalone --nproc_per_node=2; forked, which saves the imports
        restarts = {"max_restarts": 1, "monitor_interval": 0.1, "start_method": "fork"}
        meeting = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "run_id": "test"}
        elastic_launch(LaunchConfig(1, 1, 2, **restarts, **meeting), main)(argv)

    kill = at(train, "train_step", 5, kill_once)
    argv = arguments_of(options, ["--optimizer", "muon", "--resume", "--output", output])
    ((code, text),) = in_processes(output.parent, torchrun, argv, prepare=lambda rank: kill())
    assert code == 0 and (output.parent / "killed").exists(), text
    assert_same_run(undisturbed("muon", 2), output)


NO_DROPOUT = [*SIZES, "hidden_dropout_prob=0"]


def assert_close_runs(left, right, optimizer):
    """Sums are added up in another order: numbers are within 1e-4 of one another, weights within
    1e-5. Muon may compute in bf16: within 1e-4."""
    assert [row.keys() for row in rows(left)] == [row.keys() for row in rows(right)]
    for one, other in zip(rows(left), rows(right)):
        assert other == pytest.approx(one, rel=1e-4)
    a, b = (load_file(folder / "final" / "model.safetensors") for folder in (left, right))
    torch.testing.assert_close(a, b, atol=1e-5 if optimizer == "adamw" else 1e-4, rtol=0)


def test_two_processes_equal_one(undisturbed):
    one, two = (undisturbed("adamw", count, *NO_DROPOUT) for count in (1, 2))
    assert_close_runs(one, two, "adamw")


@pytest.mark.parametrize(("count", "more"), [(1, ""), (4, ""), (2, "--shard")])
def test_a_run_continues_with_another_number_of_processes(undisturbed, output, count, more):
    """The same global batches, so the same losses, within rounding."""
    whole = undisturbed("adamw", 2, *NO_DROPOUT)
    interrupted_copy(whole, output, 4)
    start(output, "--resume", more, count=count)
    assert_close_runs(whole, output, "adamw")


def test_sharded_weights_train_the_same_and_are_saved_in_full(options, tmp_path):
    more = ["--objective", "mlm", "--optimizer", "muon", "--max-steps", 4, *NO_DROPOUT]
    one, sharded = (tmp_path / name for name in ("one", "sharded"))
    start(one, options, more)
    start(sharded, options, more, "--shard", count=2)
    assert_close_runs(one, sharded, "muon")
    interrupted_copy(sharded, tmp_path / "parts", 2)
    start(tmp_path / "parts", "--resume", count=2)
    assert_same_run(sharded, tmp_path / "parts", step=4)


def test_gradients_travel_once_a_step(options, tmp_path):
    """However many micro-batches a process has in a step."""

    def travel(_, bucket):
        with path.open("a") as file:
            file.write(".")
        return default_hooks.allreduce_hook(None, bucket)

    fault = at(train, "train_step", 1, lambda model, *more: model.register_comm_hook(None, travel))
    counts = []
    for size in (2, 8):  # four of them and one on each process
        path, more = tmp_path / f"trips {size}", ["--micro-batch-size", size, "--max-steps", 3]
        start(tmp_path / str(size), options, more, count=2, fault=fault)
        counts.append(len(path.read_text()))
    assert counts in ([6] * 2, [12] * 2)  # of two processes; the model is one bucket, or two
