"""Whatever happens to the process, the numbers, the memory or the disk: a run resumes as if nothing
had happened, or stops with a message and keeps what it saved. tests/README.md lists the faults;
stress.py does the same many times at random moments."""

import functools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import (
    ROOT,
    SIZES,
    arguments_of,
    assert_same,
    assert_same_run,
    in_processes,
    interrupted_copy,
    leaves,
    make_documents,
    refusal,
    resume,
    rows,
    script,
    write_documents,
)
from conftest import ten_steps as options_of_ten_steps
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from stress import assert_one_curve
from test_safety import mutations
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.utils.data import get_worker_info

from pretrain import files, inputs, plan, train
from pretrain import run as run_module
from pretrain.cli import run_command
from pretrain.commands.pretrain import HINT, main
from pretrain.data import loader
from pretrain.data.collate import Collator
from pretrain.data.loader import TrainData
from pretrain.model.packed import PackedModel
from pretrain.run import PRETRAINING_FORM, PretrainingRun
from pretrain.runtime import checkpoint as ckpt
from pretrain.runtime import nan_guard
from pretrain.runtime.monitor import Monitor

KILL, TERM, INT, USR1 = signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1


# Faults: functions of a MonkeyPatch.


def at(target, name, call, act):
    """Call `act` before call number `call`, from 1 on, of a function; 0: before each call."""

    def patch(patched):
        original, calls = getattr(target, name), []

        def watched(*given, **named):
            calls.append(name)
            if call in (0, len(calls)):
                act()
            return original(*given, **named)

        patched.setattr(target, name, watched)

    return patch


def send(number):
    return lambda: os.kill(os.getpid(), number)


def fail(error):
    def act():
        raise error

    return act


def nan_losses(*steps):
    """The losses of these steps, from 1 on, are NaN."""

    def patch(patched):
        step, losses, calls = train.train_step, PackedModel.losses, []

        def counted(*given):
            calls.append(1)
            return step(*given)

        def poisoned(self, hidden, batch):
            terms = losses(self, hidden, batch)
            if not (self.training and len(calls) in steps):
                return terms
            return {name: replace(term, sum=term.sum * math.nan) for name, term in terms.items()}

        patched.setattr(train, "train_step", counted)
        patched.setattr(PackedModel, "losses", poisoned)

    return patch


FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def small_memory(tokens):
    """A device on which larger micro-batches do not fit."""

    def patch(patched):
        losses = PackedModel.losses

        def limited(self, hidden, batch):
            if len(batch.input_ids) > tokens and self.training:
                raise FULL
            return losses(self, hidden, batch)

        patched.setattr(PackedModel, "losses", limited)

    return patch


# Runs.


def start(folder, *options, count=1, fault=None, victim=None, ends_with=0):
    """Run pretrain.py in `count` processes, all of which end with this code; their stderr. `fault`
    happens in the process of rank `victim`, or in all."""

    def prepare(rank):
        if fault and victim in (None, rank):
            fault(pytest.MonkeyPatch())

    ended = in_processes(folder, main, arguments_of(*options), count, prepare)
    assert [code for code, _ in ended] == [ends_with] * count, ended
    return [text for _, text in ended]


def code_of(*options, fault=lambda patched: None):
    """The exit code of pretrain.py in this process."""
    with pytest.MonkeyPatch.context() as patched:
        fault(patched)
        return run_command(main, arguments_of(*options), HINT)


def failure(capsys, *options, fault=lambda patched: None):
    """The messages of a run that stops with exit code 2."""
    capsys.readouterr()
    assert code_of(*options, fault=fault) == 2
    text = capsys.readouterr().err
    assert "Traceback" not in text
    return text[text.index("error: ") :]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="module")
def options(text_file, cache):
    return options_of_ten_steps(text_file, cache, micro_batch_size=4)


@pytest.fixture(scope="module")
def undisturbed(workplace, options):
    """The run that nothing disturbs, by optimizer and number of processes."""

    def run(optimizer="adamw", count=1):
        output = workplace / f"{optimizer} {count}"
        if not output.exists():
            start(workplace, options, ["--optimizer", optimizer, "--output", output], count=count)
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
    """The step of the newest checkpoint."""
    return ckpt.step_of(ckpt.checkpoints(output)[0])


def saved_values(output, step):
    return ckpt.read_values(output / f"checkpoint-{step}", PRETRAINING_FORM)


def wait_for_the_next_second():
    """TensorBoard orders the files of a run by the second in their names."""
    time.sleep(1.01 - time.time() % 1)


# Killed.

PLACES = {
    "tokenizer": (inputs, "make_tokenizer", 1),
    "plan": (plan, "count_epoch", 1),
    "options": (run_module, "write_json", 1),
    "first evaluation": (PretrainingRun, "validate", 1),
    "first step": (train, "train_step", 1),
    "batches": (TrainData, "__next__", 8),
    "step": (train, "train_step", 6),
    "evaluation": (PretrainingRun, "validate", 2),
    "save of a model": (ckpt, "write_model", 1),
    "save of a state": (ckpt, "write_state", 2),
    "first sync": (ckpt, "sync", 3),
    "later sync": (ckpt, "sync", 30),
    "removal": (ckpt, "remove_leftovers", 3),
    "end": (train, "conclude", 1),
    "restart": (ckpt, "read_states", 1),
}
OF_MUON = ("step", "save of a state", "restart")
KILLS = [(place, "adamw") for place in PLACES] + [(place, "muon") for place in OF_MUON]


@pytest.mark.parametrize(("place", "optimizer"), KILLS)
def test_killed_anywhere_then_resumed(undisturbed, options, output, place, optimizer):
    whole = undisturbed(optimizer)
    if place == "restart":
        interrupted_copy(whole, output, 4)
    more = ["--optimizer", optimizer, "--keep", 1, "--resume"]
    kill = at(*PLACES[place], send(KILL))
    start(output.parent, options, more, ["--output", output], fault=kill, ends_with=-KILL)
    if "step" in place:
        wait_for_the_next_second()
    resume(output, options, more)
    assert_same_run(whole, output)
    if "step" in place:
        assert_one_curve(output)
    assert json.loads((output / "summary.json").read_text())["state"] == "finished"
    assert [path.name for path in ckpt.checkpoints(output)] == ["checkpoint-10"]
    assert not list(output.glob(".*"))


def test_killed_between_two_renames_of_a_save(finished, options, output):
    """`best/` is moved aside and the new one not yet in its place."""
    kill, command = at(Path, "rename", 4, send(KILL)), [*options, "--output", output]
    start(output.parent, command, fault=kill, ends_with=-KILL)
    assert (output / ".best.previous").is_dir() and not (output / "best").exists()
    resume(output)
    assert_same_run(finished, output)
    assert ckpt.problem_of(output / "best", needed=()) is None


def test_killed_with_workers_in_the_second_epoch(options, output, tmp_path):
    """The first batch after a restart is the next one of the middle of an epoch."""
    text = write_documents(tmp_path / "text.txt", make_documents(10))
    more = ["--train", text, "--max-steps", 14, "--eval-every", 60, "--optimizer", "muon"]
    whole = resume(tmp_path / "whole", options, more)
    assert ckpt.read_states(whole / "checkpoint-10")["data"]["position"][0] > 0
    command = [*options, *more, "--output", output, "--workers", 2]
    kill = at(train, "train_step", 12, send(KILL))
    start(tmp_path, command, fault=kill, ends_with=-KILL)
    resume(output)
    assert_same_run(whole, output, step=14)


def test_a_restart_loop_ends(finished, capsys):
    """On a finished run --resume says so, and changes nothing."""
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    assert code_of("--resume", ["--output", finished]) == 0
    assert f"{finished} is finished, at step 10" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in finished.rglob("*")}


def test_a_finished_run_without_checkpoints_is_not_started_again(finished, output, capsys):
    interrupted_copy(finished, output, 0)
    shutil.copytree(finished / "final", output / "final")
    assert code_of("--resume", ["--output", output]) == 0
    assert f"{output} is finished" in capsys.readouterr().out
    assert not ckpt.checkpoints(output)


@pytest.mark.parametrize("name", ["best", "final"])
def test_a_damaged_model_folder_is_made_again(finished, output, name, capsys):
    if name == "best":  # of step 8 at the latest, then
        interrupted_copy(finished, output, 6)
    else:
        shutil.copytree(finished, output)
    (output / name / "model.safetensors").write_bytes(b"lost")
    resume(output)
    assert_same_run(finished, output)
    assert ckpt.problem_of(output / name, needed=()) is None
    if name == "best":
        assert f"{output / name / 'model.safetensors'} has 4 bytes" in capsys.readouterr().out


def test_the_model_of_a_run_that_was_extended_is_the_last(finished, output):
    """Killed between the last checkpoint and the new `final/`."""
    shutil.copytree(finished, output)
    resume(output, "--max-steps 12")
    shutil.rmtree(output / "final")
    shutil.copytree(finished / "final", output / "final")
    resume(output)
    assert ckpt.read_facts(output / "final")["step"] == 12


def test_a_lost_reader_of_the_messages_costs_no_step(options, output):
    """Ctrl-C ends `tee`, too."""

    def close_stderr():
        ends = os.pipe()
        os.dup2(ends[1], 2)
        os.close(ends[0])
        os.close(ends[1])
        os.kill(os.getpid(), TERM)

    fault = at(train, "train_step", 5, close_stderr)
    in_processes(
        output.parent,
        main,
        arguments_of(options, ["--output", output]),
        prepare=lambda rank: fault(pytest.MonkeyPatch()),
    )
    assert newest(output) == 5


@pytest.mark.parametrize("text", [None, "{", "[]", ""])
def test_options_come_from_a_checkpoint_if_config_json_is_lost(finished, output, text):
    interrupted_copy(finished, output, 6)
    (output / "config.json").unlink()
    if text is not None:
        (output / "config.json").write_text(text)
    resume(output)
    assert_same_run(finished, output)


# Training states that somebody else made: their hashes fit.


def seal(path):
    """Give a changed file of a checkpoint the hash that fits."""
    sums = json.loads((path.parent / ckpt.CHECKSUMS).read_text())
    sums[path.name] = {"bytes": path.stat().st_size, "sha256": files.sha256_of(path)}
    (path.parent / ckpt.CHECKSUMS).write_text(json.dumps(sums))


def change_state(output, step, change, name=ckpt.STATE_TENSORS):
    """Change a file of a checkpoint's training state, and its hash; returns its path."""
    path = output / f"checkpoint-{step}" / name
    if name == ckpt.STATE_JSON:
        path.write_text(json.dumps(change(json.loads(path.read_text()))))
    else:
        torch.save(change(ckpt.read_states(path.parent)), path.with_name("new"))
        path.with_name("new").replace(path)
    seal(path)
    return path


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(mutate=mutations(), name=st.sampled_from([ckpt.STATE_JSON, ckpt.STATE_TENSORS]))
def test_a_training_state_of_any_content(finished, workplace, mutate, name):
    """The run continues, here for a step, or a message says why not."""
    output = workplace / "hostile"
    shutil.rmtree(output, ignore_errors=True)
    interrupted_copy(finished, output, 2)
    change_state(output, 2, mutate, name)
    threads = torch.get_num_threads()
    try:
        assert code_of("--resume --max-minutes 1e-9", ["--output", output]) in (0, 2)
    finally:
        torch.set_num_threads(threads)
        files.let_go(output)


def each_weight(state, **values):
    """`state` with other optimizer state, the same for each weight."""
    weights = {name: {**kept, **values} for name, kept in state["optimizer"]["weights"].items()}
    return {**state, "optimizer": {**state["optimizer"], "weights": weights}}


def without(state, *keys):
    """`state` without the entry at the end of a path of keys."""
    first, *rest = keys
    if rest:
        return {**state, first: without(state[first], *rest)}
    return {key: value for key, value in state.items() if key != first}


WEIGHT = "bert.embeddings.word_embeddings.weight"


@pytest.mark.parametrize(
    "spoil",
    [
        lambda state: {},
        lambda state: [],
        lambda state: {**state, "random": {"processes": [{"cpu": 1}]}},
        lambda state: without(state, "data"),
        lambda state: without(state, "optimizer", "weights", WEIGHT),
        lambda state: without(state, "optimizer", "weights", WEIGHT, "step"),
        lambda state: each_weight(state, exp_avg=torch.zeros(3)),
        lambda state: each_weight(state, exp_avg=torch.zeros(1, 1).expand(99, 32)),
        lambda state: each_weight(state, exp_avg=None),
        lambda state: {**state, "optimizer": {**state["optimizer"], "groups": []}},
    ],
)
def test_tensors_of_a_training_state_that_do_not_fit(stopped, spoil, capsys):
    path = change_state(stopped, 4, spoil)
    assert str(path.parent) in failure(capsys, "--resume", ["--output", stopped])


@pytest.mark.parametrize("number", [1, 99, "2", None])
def test_a_checkpoint_of_another_format_is_refused(stopped, number, capsys):
    path = change_state(stopped, 4, lambda values: values | {"format": number}, ckpt.STATE_JSON)
    text = refusal(main, ["--resume", "--output", stopped], capsys)
    assert text.startswith(f"--resume {path.parent}") and "\n" not in text


# Signals.


@pytest.mark.parametrize(
    ("target", "name", "call", "step", "number", "optimizer"),
    [
        (train, "train_step", 5, 5, TERM, "adamw"),
        (train, "train_step", 5, 5, INT, "muon"),
        (train, "train_step", 5, 5, USR1, "adamw"),
        (train, "train_step", 10, 10, TERM, "adamw"),
        (train, "save_checkpoint", 1, 3, TERM, "muon"),
        (PretrainingRun, "validate", 2, 4, TERM, "adamw"),
        (PretrainingRun, "validate", 4, 10, TERM, "muon"),
    ],
)
def test_a_signal_saves_and_leaves(
    undisturbed, options, output, capsys, target, name, call, step, number, optimizer
):
    fault, more = at(target, name, call, send(number)), ["--optimizer", optimizer]
    assert code_of(options, more, ["--output", output], fault=fault) == 128 + number
    text = capsys.readouterr().err
    assert number.name in text.splitlines()[-1] and HINT in text and "Traceback" not in text
    assert newest(output) == step
    assert number.name in json.loads((output / "summary.json").read_text())["state"]
    wait_for_the_next_second()
    resume(output)
    assert_same_run(undisturbed(optimizer), output)
    assert_one_curve(output)


def test_a_signal_in_the_first_evaluation_leaves_nothing_to_resume(finished, options, output):
    fault = at(PretrainingRun, "validate", 1, send(TERM))
    assert code_of(options, ["--output", output], fault=fault) == 128 + TERM
    assert not ckpt.checkpoints(output)
    resume(output)
    assert_same_run(finished, output)


def test_a_second_sigint_stops_at_once(options, output):
    def fault(patched):
        at(train, "train_step", 5, send(INT))(patched)
        at(train, "sum_counts", 5, send(INT))(patched)

    start(output.parent, options, ["--output", output], fault=fault, ends_with=-INT)
    assert newest(output) == 4


def test_a_signal_before_training_ends_the_command(options, output, capsys):
    fault = at(plan, "count_epoch", 1, send(TERM))
    assert code_of(options, ["--output", output], fault=fault) == 128 + TERM
    text = capsys.readouterr().err
    assert "SIGTERM" in text and "Traceback" not in text
    assert signal.getsignal(TERM) == signal.SIG_DFL


def test_a_signal_to_the_whole_group_does_not_end_the_workers(finished, options, output):
    """As a job scheduler sends it, and a terminal."""

    def fault(patched):
        os.setsid()
        at(train, "train_step", 5, lambda: os.killpg(0, TERM))(patched)

    command = [*options, "--workers", 2, "--output", output]
    (text,) = start(output.parent, command, fault=fault, ends_with=128 + TERM)
    assert newest(output) == 5 and "Traceback" not in text
    resume(output)
    assert_same_run(finished, output)


# Worker processes.


def in_a_worker(act):
    """Call `act` in each worker process, before it packs a micro-batch."""
    return at(Collator, "__call__", 0, lambda: act() if get_worker_info() else None)


def test_a_worker_that_dies_is_reported(options, output, capsys):
    """The kernel kills the largest process first."""
    command = [*options, "--workers", 1, "--output", output]
    assert "--workers" in failure(capsys, command, fault=in_a_worker(send(KILL)))


def test_a_worker_that_is_stuck_is_reported(options, output, capsys, monkeypatch):
    monkeypatch.setattr(loader, "SILENCE_SECONDS", 1)
    command = [*options, "--workers", 1, "--output", output]
    assert "--workers" in failure(capsys, command, fault=in_a_worker(lambda: time.sleep(3)))


# Numbers that are not finite.


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize(("count", "more"), [(1, []), (2, []), (2, ["--shard"])])
def test_a_step_that_is_not_finite_keeps_its_number_and_its_data(
    undisturbed, options, output, optimizer, count, more
):
    """And changes nothing on any process, if one of them finds it."""
    changed = ["--optimizer", optimizer, "--save-every", 1, "--max-steps", 6, *more]
    command = [*options, *changed, "--output", output]
    messages = start(
        output.parent, command, count=count, fault=nan_losses(5), victim=count - 1, ends_with=0
    )
    assert "step 5, data position 0 0 16: " in messages[0]
    assert json.loads((output / "summary.json").read_text())["skipped_steps"] == 1
    folders = [output / f"checkpoint-{step}" for step in (4, 5, 6)]
    before, after, last = [ckpt.read_states(folder) for folder in folders]
    assert_same(leaves(before["optimizer"]["weights"]), leaves(after["optimizer"]["weights"]))
    before, after, later = [load_file(folder / "model.safetensors") for folder in folders]
    assert_same(before, after)
    assert not torch.equal(after[WEIGHT], later[WEIGHT])
    expected = ckpt.read_states(undisturbed(optimizer, count) / "checkpoint-6")
    assert last["data"] == expected["data"]
    assert [row["step"] for row in rows(output)] == [0, 1, 3, 4, 6]


def test_a_run_that_only_skips_stops_and_shows_how_to_see_the_batch(
    options, output, capsys, monkeypatch, steps_seen
):
    monkeypatch.setattr(nan_guard, "MAX_SKIPPED_IN_A_ROW", 3)
    command = [*options, "--mask-rate", 0.1, 0.3, "--output", output]
    text = failure(capsys, command, fault=nan_losses(5, 6, 7, 8, 9, 10))
    assert "step 7" in text
    words = text[text.index("python scripts/show_masks.py") :].split()[2:]
    assert words[-2] == "--save"
    script("show_masks").main([*words[:-1], str(output / "batch.pt"), "--examples", "0"])
    shown = torch.load(output / "batch.pt", weights_only=True)
    for left, right in zip(shown, steps_seen[6], strict=True):
        for name in ("input_ids", "masked_positions"):
            assert torch.equal(left[name], getattr(right, name))
    # The count continues where the run does, from a checkpoint within it.
    assert ckpt.read_states(output / "checkpoint-6")["guard"]["skipped_in_a_row"] == 2


@pytest.mark.parametrize(
    ("optimizer", "part"), [("adamw", "weight"), ("adamw", "exp_avg"), ("muon", "momentum_buffer")]
)
def test_nothing_that_is_not_finite_is_saved(undisturbed, options, output, capsys, optimizer, part):
    def fault(patched):
        step, calls = train.train_step, []

        def spoil(model, batches, optimizers, *more):
            result = step(model, batches, optimizers, *more)
            calls.append(1)
            if len(calls) == 5:
                weight = optimizers[-1].param_groups[0]["params"][0]
                values = weight.data if part == "weight" else optimizers[-1].state[weight][part]
                values.view(-1)[3] = math.inf
            return result

        patched.setattr(train, "train_step", spoil)

    command = [*options, "--optimizer", optimizer, "--output", output]
    assert ".weight" in failure(capsys, command, fault=fault)
    assert newest(output) == 4
    for folder in [output / "best", *ckpt.checkpoints(output)]:
        weights = load_file(folder / "model.safetensors")
        assert all(weight.isfinite().all() for weight in weights.values())
    resume(output)
    assert_same_run(undisturbed(optimizer), output)


# Memory.


def test_a_micro_batch_that_does_not_fit_is_halved(options, output, tmp_path, capsys):
    asked = resume(tmp_path / "asked", options, "--micro-batch-size 2")
    capsys.readouterr()
    command = [*options, "--micro-batch-size", 8, "--output", output]
    assert code_of(command, fault=small_memory(70)) == 0
    text = capsys.readouterr().out
    assert "--micro-batch-size 8" in text and "--micro-batch-size 4" in text
    assert saved_values(output, 10)["micro_batch_size"] == 2
    assert_same_run(asked, output)


def test_the_command_of_a_halved_run_resumes_it(options, output, capsys):
    command = [*options, "--resume", "--micro-batch-size", 8, "--output", output]
    assert code_of(command, "--max-steps 4", fault=small_memory(140)) == 0
    assert code_of(command) == 0
    assert saved_values(output, 10)["micro_batch_size"] == 4
    assert code_of(command) == 0 and "is finished, at step 10" in capsys.readouterr().out
    assert "--micro-batch-size 2" in failure(capsys, command, "--micro-batch-size 2")


def test_nothing_is_left_if_no_micro_batch_fits(options, output, capsys):
    command = [*options, "--output", output]
    assert "--micro-batch-size 1" in failure(capsys, command, fault=small_memory(1))
    assert not output.exists()


def test_a_smaller_device_cannot_resume_a_run(finished, stopped, capsys):
    command = ["--resume", "--output", stopped]
    assert "--micro-batch-size 4" in failure(capsys, command, fault=small_memory(70))
    resume(stopped)
    assert_same_run(finished, stopped)


def test_full_memory_stops_the_run_and_leaves_its_checkpoints(finished, options, output, capsys):
    fault = at(train, "train_step", 6, fail(FULL))
    assert "--micro-batch-size 4" in failure(capsys, options, ["--output", output], fault=fault)
    resume(output)
    assert_same_run(finished, output)


SMALL_ADDRESS_SPACE = """
import resource, sys
sys.path.insert(0, sys.argv.pop(1))
from pretrain import build
from pretrain.commands.pretrain import main

def limited(*given):
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (24 << 20), -1))
    has_room = fits(*given)
    resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
    build.micro_batch_fits = fits
    return has_room

fits, build.micro_batch_fits = build.micro_batch_fits, limited
main(sys.argv[1:])
"""


def test_address_space_that_is_too_small(options, output):
    """ulimit -v, in a new process, whose heap has nothing to spare: PyTorch then raises no
    OutOfMemoryError."""
    sizes = "--max-length 512 --config-override hidden_size=128 --max-steps 1"
    size = "--micro-batch-size 8 --batch-size 8"
    command = [sys.executable, "-c", SMALL_ADDRESS_SPACE, ROOT]
    command += arguments_of(options, sizes, size, ["--output", output])
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert ended.returncode == 0 and "--micro-batch-size 8" in ended.stdout, ended
    assert saved_values(output, 1)["micro_batch_size"] == 4


# Disk, and two runs in one folder.

HOLD = """
import sys, time
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from pretrain.files import hold
hold(Path(sys.argv[2]))
print("held", flush=True)
time.sleep(60)
"""


def test_a_second_run_on_a_folder_is_refused(finished, stopped, options, tmp_path, capsys):
    command = [sys.executable, "-c", HOLD, str(ROOT), str(stopped)]
    other = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert other.stdout.readline() == b"held\n"
    (tmp_path / "link").symlink_to(stopped)
    for output, more in (
        (stopped, ["--resume"]),
        (stopped, [*options, "--overwrite"]),
        (tmp_path / "link", ["--resume"]),
    ):
        text = refusal(main, [*more, "--output", output], capsys)
        assert str(stopped) in text and f"process {other.pid} on " in text
    other.kill()
    other.wait()
    resume(stopped)
    assert_same_run(finished, stopped)


def test_only_the_folder_itself_is_writable(finished, options, output, monkeypatch):
    """As a volume that is mounted into a container: the lock lies in it."""
    output.mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != output.parent)
    assert code_of(options, ["--output", output]) == 0
    assert_same_run(finished, output)
    assert (output / ".lock").is_file()
    assert [path.name for path in output.parent.iterdir()] == [output.name]


def test_workers_of_a_killed_process_do_not_hold_its_lock(tmp_path):
    child = os.fork()
    if not child:
        files.hold(tmp_path / "run")
        worker = os.fork()
        if not worker:
            time.sleep(30)
            os._exit(0)
        (tmp_path / "worker").write_text(str(worker))
        os.kill(os.getpid(), KILL)
    os.waitpid(child, 0)
    try:
        files.hold(tmp_path / "run")
    finally:
        files.let_go(tmp_path / "run")
        os.kill(int((tmp_path / "worker").read_text()), KILL)


def test_a_save_that_does_not_read_back_replaces_nothing(finished, stopped, capsys):
    """A disk that loses what it has accepted."""

    def fault(patched):
        sync = ckpt.sync

        def forget(path):
            sync(path)
            if path.name == "model.safetensors":
                path.write_bytes(path.read_bytes()[:-8] + bytes(8))

        patched.setattr(ckpt, "sync", forget)

    text = failure(capsys, "--resume --keep 1", ["--output", stopped], fault=fault)
    assert "checkpoint-6" in text and "model.safetensors" in text
    assert [ckpt.step_of(path) for path in ckpt.checkpoints(stopped)] == [4, 2]
    resume(stopped, "--keep 9")
    assert_same_run(finished, stopped)


def test_a_full_disk_for_the_log_is_reported(finished, stopped, capsys):
    full = OSError(28, "No space left on device", "metrics.jsonl")
    fault = at(Monitor, "log", 2, fail(full))
    text = failure(capsys, "--resume", ["--output", stopped], fault=fault)
    assert "metrics.jsonl: No space left on device" in text
    resume(stopped)
    assert_same_run(finished, stopped)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_run_whose_folder_is_moved_away_stops(finished, options, output, tmp_path, capsys):
    """At the next save, or when TensorBoard's own thread writes."""
    fault = at(train, "train_step", 5, lambda: output.rename(tmp_path / "moved"))
    assert str(output) in failure(capsys, options, ["--output", output], fault=fault)
    assert not output.exists()
    resume(tmp_path / "moved")
    assert_same_run(finished, tmp_path / "moved")


def test_a_damaged_tokenizer_of_the_cache_is_made_again(finished, options, output, capsys):
    """One letter changed: valid, and another vocabulary."""
    cache = output.parent / "cache"
    resume(output.parent / "first", options, ["--cache", cache, "--max-steps", 1])
    (path,) = cache.glob("tokenizer-*/tokenizer.json")
    path.write_text(path.read_text().replace('"river"', '"rivex"'))
    resume(output, options, ["--cache", cache])
    assert str(path) in capsys.readouterr().out
    assert_same_run(finished, output)


# Many processes.


@pytest.mark.parametrize(
    ("target", "name", "call", "step", "number", "optimizer"),
    [
        (train, "train_step", 5, 5, USR1, "adamw"),
        (PretrainingRun, "validate", 2, 4, TERM, "muon"),
    ],
)
def test_a_signal_to_one_process_stops_all_by_agreement(
    undisturbed, options, output, target, name, call, step, number, optimizer
):
    command = [*options, "--optimizer", optimizer, "--output", output]
    ends = {"victim": 1, "ends_with": 128 + number}
    fault = at(target, name, call, send(number))
    for text in start(output.parent, command, count=2, fault=fault, **ends):
        assert number.name in text.splitlines()[-1] and "Traceback" not in text
    assert newest(output) == step
    start(output.parent, "--resume", ["--output", output], count=2)
    assert_same_run(undisturbed(optimizer, 2), output)


@pytest.mark.parametrize(("victim", "optimizer"), [(0, "adamw"), (1, "muon")])
def test_a_process_that_dies_takes_the_run_down(undisturbed, options, output, victim, optimizer):
    fault = at(train, "train_step", 5, send(KILL))
    command = arguments_of(options, ["--optimizer", optimizer, "--output", output])

    def prepare(rank):
        if rank == victim:
            fault(pytest.MonkeyPatch())

    ended = in_processes(output.parent, main, command, 2, prepare, seconds=30)
    assert ended[victim][0] == -KILL and ended[1 - victim][0] == 2, ended
    assert "error: " in ended[1 - victim][1] and "Traceback" not in ended[1 - victim][1]
    start(output.parent, "--resume", ["--output", output], count=2)
    assert_same_run(undisturbed(optimizer, 2), output)


def test_an_error_of_the_first_process_ends_the_others_that_wait_for_it(options, output, tmp_path):
    command = [*options, "--train", tmp_path / "absent", "--output", output]
    first, second = start(tmp_path, command, count=2, ends_with=2)
    assert f"--train {tmp_path / 'absent'}" in first and "Traceback" not in first + second


def test_all_processes_halve_a_micro_batch_that_one_has_no_room_for(options, output):
    command = [*options, "--max-steps", 3, "--micro-batch-size", 8, "--output", output]
    start(output.parent, command, count=2, fault=small_memory(140), victim=1)
    assert (output.parent / "out-0").read_text().count("--micro-batch-size 8") == 1
    assert saved_values(output, 3)["micro_batch_size"] == 4


@pytest.fixture(scope="module")
def without_dropout(options, workplace):
    """By optimizer: options of a run without dropout, and such a run in two processes."""

    @functools.cache
    def run(optimizer):
        more = ["--optimizer", optimizer, *SIZES, "hidden_dropout_prob=0"]
        output = workplace / f"no dropout {optimizer}"
        start(workplace, options, more, ["--output", output], count=2)
        return [*options, *more], output

    return run


def assert_close_runs(left, right, optimizer="adamw"):
    """Sums are added up in another order: numbers are within 1e-4 of one another, weights within
    1e-5. Muon may compute in bf16: within 1e-4."""
    assert [row.keys() for row in rows(left)] == [row.keys() for row in rows(right)]
    for one, other in zip(rows(left), rows(right)):
        assert other == pytest.approx(one, rel=1e-4)
    a, b = (load_file(folder / "final" / "model.safetensors") for folder in (left, right))
    torch.testing.assert_close(a, b, atol=1e-5 if optimizer == "adamw" else 1e-4, rtol=0)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_two_processes_equal_one(without_dropout, output, optimizer):
    options, whole = without_dropout(optimizer)
    assert_close_runs(whole, resume(output, options), optimizer)


CHANGES = [(1, [], "adamw"), (4, [], "adamw"), (2, ["--shard"], "adamw"), (1, ["--shard"], "adamw")]
CHANGES += [(1, [], "muon"), (2, ["--shard"], "muon")]


@pytest.mark.parametrize(("count", "more", "optimizer"), CHANGES)
def test_a_run_continues_with_another_number_of_processes(
    without_dropout, output, count, more, optimizer
):
    """The same global batches, so the same losses, within rounding."""
    _, whole = without_dropout(optimizer)
    interrupted_copy(whole, output, 4)
    start(output.parent, "--resume", more, ["--output", output], count=count)
    assert_close_runs(whole, output, optimizer)


def test_gradients_travel_once_a_step(options, tmp_path, monkeypatch):
    """However many micro-batches a process has in it."""
    wrap, trips = train.wrap, []

    def count(model, *given):
        def travel(_, bucket):
            with trips[-1].open("a") as file:
                file.write(".")
            return default_hooks.allreduce_hook(None, bucket)

        wrapped = wrap(model, *given)
        wrapped.register_comm_hook(None, travel)
        return wrapped

    monkeypatch.setattr(train, "wrap", count)
    counts = []
    for size in (2, 4, 8):  # four, two and one of them on each process
        trips.append(tmp_path / f"trips {size}")
        more = ["--micro-batch-size", size, "--max-steps", 3, "--output", tmp_path / str(size)]
        start(tmp_path, options, more, count=2)
        counts.append(len(trips[-1].read_text()))
    assert counts[0] in (6, 12), counts  # of two processes; the model is one bucket, or two
    assert counts == counts[:1] * 3


@pytest.mark.parametrize(
    ("objective", "optimizer"), [("mlm+nsp", "adamw"), ("mlm", "adamw"), ("mlm+nsp", "muon")]
)
def test_sharded_weights_train_alike_and_are_saved_whole(options, tmp_path, objective, optimizer):
    more = ["--objective", objective, "--optimizer", optimizer, "--max-steps", 6]
    command = [*options, *more, *SIZES, "hidden_dropout_prob=0"]
    one, sharded, parts = (tmp_path / name for name in ("one", "sharded", "parts"))
    resume(one, command)
    start(tmp_path, command, ["--shard", "--output", sharded], count=2)
    assert_close_runs(one, sharded, optimizer)
    states = [ckpt.read_states(folder / "checkpoint-6") for folder in (one, sharded)]
    shapes = [{name: value.shape for name, value in tensors_of(state).items()} for state in states]
    assert shapes[0] == shapes[1]
    interrupted_copy(sharded, parts, 2)
    start(tmp_path, "--resume", ["--output", parts], count=2)
    assert_same_run(sharded, parts, step=6)


def tensors_of(state):
    """By its place: every tensor of the optimizer state."""
    found = leaves(state["optimizer"]["weights"])
    return {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}


KILLED_ONCE = """
import os, signal, sys
mark, root = sys.argv[1:3]
sys.argv[:3] = [root + "/scripts/pretrain.py"]
sys.path.insert(0, root)
from pretrain import train
original, calls = train.train_step, []

def step(*given):
    calls.append(1)
    if len(calls) == 5 and os.environ["RANK"] == "1" and not os.path.exists(mark):
        open(mark, "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*given)

train.train_step = step
exec(compile(open(sys.argv[0]).read(), sys.argv[0], "exec"))
"""


def test_torchrun_restarts_a_run_from_its_checkpoint(undisturbed, options, output, tmp_path):
    """One process of two is killed once; with --max-restarts the command ends as the same run."""
    (tmp_path / "killed_once.py").write_text(KILLED_ONCE)
    torchrun = "-m torch.distributed.run --standalone --nproc_per_node=2 --max-restarts=1"
    command = [sys.executable, *torchrun.split(), tmp_path / "killed_once.py"]
    command += [tmp_path / "mark", ROOT, *options, "--optimizer", "muon", "--resume"]
    ended = subprocess.run(
        arguments_of(command, ["--output", output]),
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 0 and (tmp_path / "mark").exists(), ended.stderr[-3000:]
    assert_same_run(undisturbed("muon", 2), output)
