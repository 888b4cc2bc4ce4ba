"""Whatever happens to the process, the numbers, the memory or the disk: the run goes on as if nothing had, or stops with a word and all
it had. tests/README.md says what is shown where; stress.py does the same many times at random moments."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SIZES, assert_same_run, in_processes, interrupted_copy, refusal, rows, script, ten_steps
from hypothesis import HealthCheck, given, settings
from safetensors.torch import load_file
from stress import assert_one_curve
from test_safety import mutations
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

from pretrain import files, parts, setup, train
from pretrain.batch import Output
from pretrain.command import UserError, parse, run_command
from pretrain.config import Config
from pretrain.model.bert import BertForPreTraining
from pretrain.runtime import checkpoint as ckpt
from pretrain.runtime import optim

PRETRAIN = script("pretrain")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="module")
def arguments(workplace, text_file):
    return ten_steps(text_file, workplace / "cache", micro_batch_size=4)


@pytest.fixture(scope="module")
def finished(workplace, arguments):
    """The run that nothing has disturbed."""
    PRETRAIN.main([*arguments, "--output", str(workplace / "finished")])
    return workplace / "finished"


@pytest.fixture(scope="module")
def finished_by_two(workplace, arguments, finished):
    """The same in two processes."""
    codes = in_processes(workplace, PRETRAIN.main, [*arguments, "--output", workplace / "two"], count=2)
    assert [code for code, _ in codes] == [0, 0], codes
    return workplace / "two"


def during(monkeypatch, name, call, act, target=train):
    """Call `act` before the call of that number, from 1 on, of a function."""
    original, seen = getattr(target, name), []

    def watched(*more, **options):
        seen.append(name)
        if len(seen) == call:
            act()
        return original(*more, **options)

    monkeypatch.setattr(target, name, watched)


def wait_for_the_next_second():
    """TensorBoard orders the files of a run by the second in their names."""
    time.sleep(1.01 - time.time() % 1)


def send(number):
    return lambda: os.kill(os.getpid(), number)


# Killed.

@pytest.mark.parametrize(("name", "call", "target"), [
    ("train_step", 1, train), ("train_step", 6, train), ("evaluate", 1, train), ("evaluate", 2, train), ("write_model", 1, ckpt),
    ("write_state", 2, ckpt), ("sync", 3, ckpt), ("sync", 30, ckpt), ("prune", 3, ckpt), ("finish", 1, train), ("read_tensors", 1, ckpt),
    ("write_json", 1, setup), ("make_tokenizer", 1, sys.modules["pretrain.text"]), ("check_plan", 1, parts)])
def test_killed_anywhere_then_resumed(finished, arguments, tmp_path, monkeypatch, name, call, target):
    if name == "read_tensors":  # in a restart, then
        interrupted_copy(finished, tmp_path / "run", 4)
    command = [*arguments, "--output", tmp_path / "run", "--resume"]
    (code, told), = in_processes(tmp_path, PRETRAIN.main, command,
                                 prepare=lambda rank: during(monkeypatch, name, call, send(signal.SIGKILL), target))
    assert code == -signal.SIGKILL, told
    if name == "train_step":
        wait_for_the_next_second()
    PRETRAIN.main([str(part) for part in command])
    assert_same_run(finished, tmp_path / "run")
    if name == "train_step":
        assert_one_curve(tmp_path / "run")
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["state"] == "finished"
    assert not list((tmp_path / "run").glob(".*"))


def test_killed_between_two_renames_of_a_save(finished, arguments, tmp_path, monkeypatch):
    """`best/` is moved aside and the new one not yet in its place."""
    def prepare(rank):
        original = Path.rename

        def rename(path, target):
            moved = original(path, target)
            if Path(target).name == ".best.previous":
                os.kill(os.getpid(), signal.SIGKILL)
            return moved
        monkeypatch.setattr(Path, "rename", rename)

    command = [*arguments, "--output", tmp_path / "run", "--resume"]
    assert in_processes(tmp_path, PRETRAIN.main, command, prepare=prepare)[0][0] == -signal.SIGKILL
    assert not (tmp_path / "run" / "best").exists()
    PRETRAIN.main([str(part) for part in command])
    assert_same_run(finished, tmp_path / "run")
    assert ckpt.problem_of(tmp_path / "run" / "best", needed=()) is None


def test_killed_with_workers_in_the_second_epoch(arguments, tmp_path, monkeypatch):
    """The first batch after a restart is the next one of the middle of an epoch."""
    more = [*arguments, "--batch-size", "64", "--max-steps", "20", "--save-every", "16", "--eval-every", "60"]
    PRETRAIN.main([*more, "--output", str(tmp_path / "whole")])
    assert ckpt.read_values(tmp_path / "whole" / "checkpoint-16")["progress"]["position"][0] > 0
    command = [*more, "--output", tmp_path / "run", "--resume", "--workers", "2"]
    assert in_processes(tmp_path, PRETRAIN.main, command, prepare=lambda rank: during(
        monkeypatch, "train_step", 19, send(signal.SIGKILL)))[0][0] == -signal.SIGKILL
    PRETRAIN.main([str(part) for part in command])
    assert_same_run(tmp_path / "whole", tmp_path / "run", step=20)


def test_a_restart_loop_ends(finished, capsys):
    """On a finished run --resume says so, and changes nothing."""
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    assert run_command(PRETRAIN.main, ["--resume", "--output", str(finished)]) == 0
    assert f"{finished} is finished, at step 10" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in finished.rglob("*")}


def test_a_finished_run_without_checkpoints_is_not_started_again(finished, tmp_path, capsys):
    interrupted_copy(finished, tmp_path / "run", 0)
    shutil.copytree(finished / "final", tmp_path / "run" / "final")
    assert run_command(PRETRAIN.main, ["--resume", "--output", str(tmp_path / "run")]) == 0
    assert "is finished, its checkpoints are gone; its model is" in capsys.readouterr().out
    assert not ckpt.checkpoints(tmp_path / "run")


@pytest.mark.parametrize("name", ["best", "final"])
def test_a_damaged_model_folder_is_made_again(finished, tmp_path, name, capsys):
    output = tmp_path / "run"
    if name == "best":  # its evaluation is that of step 4 at the earliest
        interrupted_copy(finished, output, 6)
    else:
        shutil.copytree(finished, output)
    (output / name / "model.safetensors").write_bytes(b"lost")
    PRETRAIN.main(["--resume", "--output", str(output)])
    assert_same_run(finished, output)
    assert ckpt.problem_of(output / name, needed=()) is None
    if name == "best":
        assert "model.safetensors has 4 bytes" in capsys.readouterr().out


def seal(path):
    """Give a changed file of a checkpoint the hash that fits."""
    sums = json.loads((path.parent / ckpt.CHECKSUMS).read_text())
    sums[path.name] = {"bytes": path.stat().st_size, "sha256": files.sha256_of(path)}
    (path.parent / ckpt.CHECKSUMS).write_text(json.dumps(sums))


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(mutate=mutations())
def test_a_training_state_of_any_content(finished, workplace, mutate):
    """With fitting hashes, as somebody else may have made it: the run goes on, or a message tells why not."""
    output = workplace / "hostile"
    shutil.rmtree(output, ignore_errors=True)
    interrupted_copy(finished, output, 2)
    path = output / "checkpoint-2" / ckpt.STATE_JSON
    path.write_text(json.dumps(mutate(json.loads(path.read_text()))))
    seal(path)
    threads = torch.get_num_threads()
    try:
        config = parse(["--resume", "--output", str(output)], Config, "", defaults=json.loads((output / "config.json").read_text()))
        train.Progress.restored(setup.build(config).state.get("progress"))
    except UserError:
        pass
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("spoil", [
    lambda state: {}, lambda state: [], lambda state: state | {"random_states": [{"cpu": 1}]},
    lambda state: state | {"optimizer": {}}, lambda state: state | {"optimizer": dict(list(state["optimizer"].items())[1:])},
    lambda state: state | {"optimizer": {name: {**parts, "exp_avg": torch.zeros(3)} for name, parts in state["optimizer"].items()}},
    lambda state: state | {"optimizer": {name: {} for name in state["optimizer"]}}])
def test_tensors_of_a_training_state_that_do_not_fit(finished, tmp_path, spoil, capsys):
    interrupted_copy(finished, tmp_path / "run", 2)
    path = tmp_path / "run" / "checkpoint-2" / ckpt.STATE_TENSORS
    torch.save(spoil(ckpt.read_tensors(path.parent)), path.with_name("new"))
    path.with_name("new").replace(path)
    seal(path)
    told = refusal(PRETRAIN.main, ["--resume", "--output", tmp_path / "run"], capsys)
    assert told.startswith(f"{path}: does not fit the model (")


def test_the_model_of_a_run_that_has_been_made_longer_is_the_last(finished, tmp_path):
    """Killed between the last checkpoint and the new final/."""
    shutil.copytree(finished, tmp_path / "run")
    shutil.copytree(finished / "final", tmp_path / "stale")
    PRETRAIN.main(["--resume", "--output", str(tmp_path / "run"), "--max-steps", "12"])
    shutil.rmtree(tmp_path / "run" / "final")
    (tmp_path / "stale").rename(tmp_path / "run" / "final")
    PRETRAIN.main(["--resume", "--output", str(tmp_path / "run")])
    assert ckpt.read_facts(tmp_path / "run" / "final")["step"] == 12


def test_a_reader_of_the_messages_that_is_gone_costs_no_step(finished, arguments, tmp_path, monkeypatch):
    """Ctrl-C ends `tee`, too."""
    def prepare(rank):
        def stop():
            ends = os.pipe()
            os.dup2(ends[1], 2)
            os.close(ends[0])
            os.close(ends[1])
            os.kill(os.getpid(), signal.SIGTERM)
        during(monkeypatch, "train_step", 5, stop)

    in_processes(tmp_path, PRETRAIN.main, [*arguments, "--output", tmp_path / "run"], prepare=prepare)
    assert ckpt.checkpoints(tmp_path / "run")[0].name == "checkpoint-5"


def test_options_come_from_a_checkpoint_where_config_json_is_lost(finished, tmp_path):
    for number, text in enumerate((None, "{", "[]", "")):
        output = tmp_path / str(number)
        interrupted_copy(finished, output, 6)
        (output / "config.json").unlink()
        if text is not None:
            (output / "config.json").write_text(text)
        assert run_command(PRETRAIN.main, ["--resume", "--output", str(output)]) == 0
        assert_same_run(finished, output)


# Signals.

@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
@pytest.mark.parametrize(("name", "call", "steps"), [("train_step", 5, 5), ("evaluate", 2, 4), ("save", 1, 3), ("train_step", 10, 10),
                                                     ("evaluate", 4, 10)])
def test_a_signal_saves_and_leaves(finished, arguments, tmp_path, monkeypatch, capsys, number, name, call, steps):
    if (name, call) != ("train_step", 5) and number != signal.SIGTERM:
        pytest.skip("the signals differ in their number alone")
    with monkeypatch.context() as patched:
        during(patched, name, call, send(number))
        assert run_command(PRETRAIN.main, [*arguments, "--output", str(tmp_path / "run")], "way on") == 128 + number
    told = capsys.readouterr().err
    assert f"step {steps} of 10 is saved; stopped by {number.name}; way on" in told and "Traceback" not in told
    assert ckpt.checkpoints(tmp_path / "run")[0].name == f"checkpoint-{steps}"
    assert number.name in json.loads((tmp_path / "run" / "summary.json").read_text())["state"]
    wait_for_the_next_second()
    PRETRAIN.main(["--resume", "--output", str(tmp_path / "run")])
    assert_same_run(finished, tmp_path / "run")
    assert_one_curve(tmp_path / "run")


def test_a_signal_in_the_first_evaluation_leaves_nothing_to_resume_from(finished, arguments, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        during(patched, "evaluate", 1, send(signal.SIGTERM))
        assert run_command(PRETRAIN.main, [*arguments, "--output", str(tmp_path / "run")]) == 143
    assert not ckpt.checkpoints(tmp_path / "run")
    PRETRAIN.main(["--resume", "--output", str(tmp_path / "run")])
    assert_same_run(finished, tmp_path / "run")


def test_a_second_sigint_stops_at_once(arguments, tmp_path, monkeypatch):
    def prepare(rank):
        during(monkeypatch, "train_step", 5, send(signal.SIGINT))
        during(monkeypatch, "sum_counts", 5, send(signal.SIGINT))

    (code, told), = in_processes(tmp_path, PRETRAIN.main, [*arguments, "--output", tmp_path / "run"], prepare=prepare)
    assert code == -signal.SIGINT and "once more stops at once" in told
    assert ckpt.checkpoints(tmp_path / "run")[0].name == "checkpoint-4"


def test_a_signal_before_training_ends_the_command(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(parts, "check_plan", lambda *more: send(signal.SIGTERM)())
    assert run_command(PRETRAIN.main, [*arguments, "--output", str(tmp_path / "run")]) == 143
    assert capsys.readouterr().err.endswith("interrupted by SIGTERM\n")
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_signal_to_the_whole_group_does_not_end_the_workers(finished, arguments, tmp_path, monkeypatch):
    """As a job scheduler sends it, and a terminal."""
    def prepare(rank):
        os.setsid()
        during(monkeypatch, "train_step", 5, lambda: os.killpg(0, signal.SIGTERM))

    (code, told), = in_processes(tmp_path, PRETRAIN.main, [*arguments, "--workers", "2", "--output", tmp_path / "run"], prepare=prepare)
    assert code == 143 and "step 5 of 10 is saved" in told and "Traceback" not in told
    PRETRAIN.main(["--resume", "--output", str(tmp_path / "run")])
    assert_same_run(finished, tmp_path / "run")


def test_a_worker_that_dies_is_told(arguments, tmp_path, monkeypatch, capsys):
    """The kernel kills the largest process first."""
    original = setup.Collator.__call__

    def collate(self, examples):
        if torch.utils.data.get_worker_info():
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, examples)

    monkeypatch.setattr(setup.Collator, "__call__", collate)
    told = refusal_after_messages(PRETRAIN.main, [*arguments, "--workers", "1", "--output", tmp_path / "run"], capsys)
    assert "--workers: RuntimeError: DataLoader worker" in told and "or fewer workers; checkpoints are whole" in told


# Bad numbers.

def poison(monkeypatch, steps, rank=0):
    """Losses of the given steps, from 1 on, that are no numbers."""
    number, forward, original = [0], BertForPreTraining.forward, train.train_step

    def counted(*more):
        number[0] += 1
        return original(*more)

    def poisoned(self, batch):
        output = forward(self, batch)
        factor = float("nan") if self.training and number[0] in steps and int(os.environ.get("RANK", 0)) == rank else 1.0
        return Output({name: value * factor for name, value in output.loss_sums.items()}, output.num_correct)

    monkeypatch.setattr(train, "train_step", counted)
    monkeypatch.setattr(BertForPreTraining, "forward", poisoned)


def test_a_step_that_is_not_finite_keeps_its_number_and_its_data(finished, arguments, tmp_path, monkeypatch, capsys, steps_seen):
    poison(monkeypatch, {5})
    PRETRAIN.main([*arguments, "--output", str(tmp_path / "run")])
    assert "gradients not finite at step 5, data position (0, 0, 16, None): the step changed nothing" in capsys.readouterr().err
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["skipped_steps"] == 1
    logged = rows(tmp_path / "run")
    assert [row["step"] for row in logged] == [row["step"] for row in rows(finished)]
    states = [ckpt.read_tensors(tmp_path / "run" / f"checkpoint-{step}")["optimizer"] for step in (4, 6)]
    assert [int(next(iter(state.values()))["step"]) for state in states] == [4, 5]


def test_a_run_that_only_skips_stops_and_tells_how_to_see_the_batch(arguments, tmp_path, monkeypatch, capsys, steps_seen):
    monkeypatch.setattr(optim, "MAX_SKIPPED_IN_A_ROW", 3)
    with monkeypatch.context() as patched:
        poison(patched, {5, 6, 7, 8, 9, 10})
        told = refusal_after_messages(PRETRAIN.main, [*arguments, "--mask-rate", "0.1", "0.3", "--output", tmp_path / "run"], capsys)
    assert "the gradients of 3 steps in a row were not finite, last at step 7" in told
    words = told.partition("Its data: ")[2].split()
    assert words[:2] == ["python", "scripts/show_masks.py"]
    script("show_masks").main([*words[2:-1], str(tmp_path / "batch.pt"), "--examples", "0"])
    shown = torch.load(tmp_path / "batch.pt", weights_only=True)
    assert len(shown) == len(steps_seen[6]) == 4
    for left, right in zip(shown, steps_seen[6]):
        assert torch.equal(left["input_ids"], right.input_ids) and torch.equal(left["masked_positions"], right.masked_positions)
    # The row goes on where the run does, from a checkpoint within it.
    assert ckpt.read_values(tmp_path / "run" / "checkpoint-6")["progress"]["skipped_in_a_row"] == 2


def test_a_scale_of_fp16_that_collapses_is_told_once():
    watch, scaler = optim.FiniteWatch(), torch.amp.GradScaler("cpu", init_scale=4.0, backoff_factor=0.25, growth_interval=1)
    told = []
    for overflows in (True, True, True, False, False, False, False, True, True):
        weight = torch.nn.Parameter(torch.ones(1))
        optimizer = torch.optim.AdamW([weight], fused=True)
        scaler.scale(weight.sum() * (float("inf") if overflows else 1.0)).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        told.append(watch.observe_scale(scaler))
    assert [bool(line) for line in told] == [False, True, False, False, False, False, False, True, False]
    assert told[1].startswith("the scale of the fp16 gradients has fallen to 0.25: ")


@pytest.mark.parametrize("part", ["weight", "average"])
def test_nothing_that_is_not_finite_is_saved(finished, arguments, tmp_path, monkeypatch, capsys, part):
    original = train.train_step

    def spoil(model, weights, batches, optimizer, *more):
        result, parameter = original(model, weights, batches, optimizer, *more), next(model.parameters())
        if optimizer.state[parameter]["step"] == 5:
            with torch.no_grad():
                (parameter if part == "weight" else optimizer.state[parameter]["exp_avg"]).view(-1)[3] = float("inf")
        return result

    with monkeypatch.context() as patched:
        patched.setattr(train, "train_step", spoil)
        told = refusal_after_messages(PRETRAIN.main, [*arguments, "--output", tmp_path / "run"], capsys)
    assert "word_embeddings.weight holds numbers that are not finite: nothing is saved" in told
    assert ckpt.checkpoints(tmp_path / "run")[0].name == "checkpoint-4"
    for folder in [tmp_path / "run" / "best", *ckpt.checkpoints(tmp_path / "run")]:
        assert all(torch.isfinite(weight).all() for weight in load_file(folder / "model.safetensors").values())
    PRETRAIN.main(["--resume", "--output", str(tmp_path / "run")])
    assert_same_run(finished, tmp_path / "run")


def refusal_after_messages(main, argv, capsys):
    """`refusal` of a command that has trained before."""
    capsys.readouterr()
    assert run_command(main, [str(part) for part in argv]) == 2
    told = capsys.readouterr().err
    assert "Traceback" not in told
    return told


# Memory.

def limit_memory(monkeypatch, tokens, rank=0, training=True):
    """A device on which larger micro-batches do not fit."""
    forward = BertForPreTraining.forward

    def limited(self, batch):
        if int(os.environ.get("RANK", 0)) == rank and len(batch.input_ids) > tokens and self.training:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return forward(self, batch)

    monkeypatch.setattr(BertForPreTraining, "forward", limited)


def test_a_micro_batch_that_does_not_fit_is_halved(arguments, tmp_path, monkeypatch, capsys):
    PRETRAIN.main([*arguments, "--micro-batch-size", "2", "--output", str(tmp_path / "asked")])
    with monkeypatch.context() as patched:
        limit_memory(patched, 70)
        PRETRAIN.main([*arguments, "--micro-batch-size", "8", "--output", str(tmp_path / "halved")])
    told = capsys.readouterr().out
    assert all(f"{size}: the memory of cpu is too small for it, so it is {size // 2} in this run" in told for size in (8, 4))
    assert json.loads((tmp_path / "halved" / "config.json").read_text())["micro_batch_size"] == 2
    assert_same_run(tmp_path / "asked", tmp_path / "halved")


def test_the_command_of_a_halved_run_goes_on_with_it(arguments, tmp_path, monkeypatch, capsys):
    command = [*arguments, "--resume", "--micro-batch-size", "8", "--output", str(tmp_path / "run")]
    with monkeypatch.context() as patched:
        limit_memory(patched, 140)
        PRETRAIN.main([*command, "--max-steps", "4"])
    PRETRAIN.main(command)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["micro_batch_size"] == 4
    assert run_command(PRETRAIN.main, command) == 0 and "is finished, at step 10" in capsys.readouterr().out
    assert "--micro-batch-size 2: the run was started with 4" in refusal(PRETRAIN.main, [*command, "--micro-batch-size", "2"], capsys)


def test_where_no_micro_batch_fits_nothing_is_left(arguments, tmp_path, monkeypatch, capsys):
    limit_memory(monkeypatch, 1)
    told = refusal(PRETRAIN.main, [*arguments, "--output", tmp_path / "run"], capsys)
    assert told.startswith("--micro-batch-size 1: the memory of cpu is too small for it; needed is a larger device, --gradient-check")
    assert not (tmp_path / "run").exists()


def test_a_smaller_device_cannot_go_on_with_a_run(finished, tmp_path, monkeypatch, capsys):
    interrupted_copy(finished, tmp_path / "run", 4)
    with monkeypatch.context() as patched:
        limit_memory(patched, 70)
        told = refusal_after_messages(PRETRAIN.main, ["--resume", "--output", tmp_path / "run"], capsys)
    assert "--micro-batch-size 4: memory is full" in told and "needed is a smaller one, in a new run" in told
    PRETRAIN.main(["--resume", "--output", str(tmp_path / "run")])
    assert_same_run(finished, tmp_path / "run")


def test_memory_that_is_full_later_stops_the_run_and_leaves_its_checkpoints(finished, arguments, tmp_path, monkeypatch, capsys):
    def fill():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    with monkeypatch.context() as patched:
        during(patched, "train_step", 6, fill)
        told = refusal_after_messages(PRETRAIN.main, [*arguments, "--output", tmp_path / "run"], capsys)
    assert "--micro-batch-size 4: memory is full (OutOfMemoryError: CUDA out of memory)" in told and "checkpoints are whole" in told
    PRETRAIN.main(["--resume", "--output", str(tmp_path / "run")])
    assert_same_run(finished, tmp_path / "run")


def test_address_space_that_is_too_small(arguments, tmp_path):
    """ulimit -v, in a new process, whose heap has nothing to spare: what PyTorch tells then is no OutOfMemoryError."""
    code = """if True:
        import resource, sys
        sys.path.insert(0, sys.argv.pop(1))
        from conftest import script
        from pretrain import setup

        def limited(*given):
            used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + (100 << 20), used + (100 << 20)))
            setup.micro_batch_fits = fits
            return fits(*given)

        fits, setup.micro_batch_fits = setup.micro_batch_fits, limited
        script("pretrain").main(sys.argv[1:])"""
    more = [*arguments, "--max-length", "512", "--config-override", "hidden_size=128", "--micro-batch-size", "32", "--batch-size", "32",
            "--max-steps", "1", "--output", tmp_path / "run"]
    done = subprocess.run([sys.executable, "-c", code, ROOT / "tests", *more], capture_output=True, text=True, cwd=ROOT)
    assert "32: the memory of cpu is too small for it, so it is 16 in this run" in done.stdout, (done.stdout, done.stderr)


# Disk, and two runs on one folder.

def test_a_second_run_on_a_folder_is_refused(finished, arguments, tmp_path, capsys):
    output = tmp_path / "run"
    interrupted_copy(finished, output, 4)
    code = "import sys, time; sys.path.insert(0, sys.argv[1]); from pathlib import Path; from pretrain.files import hold; " \
           "hold(Path(sys.argv[2])); print('held', flush=True); time.sleep(60)"
    other = subprocess.Popen([sys.executable, "-c", code, str(ROOT), str(output)], stdout=subprocess.PIPE)
    assert other.stdout.readline() == b"held\n"
    (tmp_path / "link").symlink_to(output)
    for path, more in ((output, ["--resume"]), (output, [*arguments, "--overwrite"]), (tmp_path / "link", ["--resume"])):
        told = refusal(PRETRAIN.main, [*more, "--output", path], capsys)
        assert f"{output}: another process (process {other.pid} on " in told and "is at work in it" in told
    other.kill()
    other.wait()
    PRETRAIN.main(["--resume", "--output", str(output)])
    assert_same_run(finished, output)


def test_a_folder_that_alone_is_writable(finished, arguments, tmp_path, monkeypatch):
    """As a volume that is mounted into a container: the lock lies in it."""
    (tmp_path / "run").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    PRETRAIN.main([*arguments, "--output", str(tmp_path / "run")])
    assert_same_run(finished, tmp_path / "run")
    assert (tmp_path / "run" / ".lock").is_file() and [path.name for path in tmp_path.iterdir()] == ["run"]


def test_workers_of_a_killed_process_do_not_hold_its_lock(tmp_path):
    child = os.fork()
    if not child:
        files.hold(tmp_path / "run")
        worker = os.fork()
        if not worker:
            time.sleep(30)
            os._exit(0)
        (tmp_path / "worker").write_text(str(worker))
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    try:
        files.hold(tmp_path / "run")
    finally:
        files.let_go(tmp_path / "run")
        os.kill(int((tmp_path / "worker").read_text()), signal.SIGKILL)


def test_a_save_that_does_not_read_back_replaces_nothing(finished, tmp_path, monkeypatch, capsys):
    """A disk that loses what it has taken."""
    interrupted_copy(finished, tmp_path / "run", 4)
    original = ckpt.sync

    def forget(path):
        original(path)
        if path.name == "model.safetensors":
            path.write_bytes(path.read_bytes()[:-8] + b"\0" * 8)

    with monkeypatch.context() as patched:
        patched.setattr(ckpt, "sync", forget)
        told = refusal_after_messages(PRETRAIN.main, ["--resume", "--output", tmp_path / "run", "--keep", "1"], capsys)
    assert "cannot be written (reading it again," in told and "model.safetensors is damaged (its hash differs)" in told
    assert [path.name for path in ckpt.checkpoints(tmp_path / "run")] == ["checkpoint-4", "checkpoint-2"]
    PRETRAIN.main(["--resume", "--output", str(tmp_path / "run"), "--keep", "9"])
    assert_same_run(finished, tmp_path / "run")


def test_a_run_whose_folder_is_moved_away_stops(finished, arguments, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patched:
        during(patched, "train_step", 5, lambda: (tmp_path / "run").rename(tmp_path / "moved"))
        told = refusal_after_messages(PRETRAIN.main, [*arguments, "--output", tmp_path / "run"], capsys)
    assert "has been moved or removed while its run was at work" in told or "No such file" in told  # of TensorBoard's own thread
    assert not (tmp_path / "run").exists()
    PRETRAIN.main(["--resume", "--output", str(tmp_path / "moved")])
    assert_same_run(finished, tmp_path / "moved")


def test_a_damaged_tokenizer_of_the_cache_is_made_again(finished, arguments, tmp_path, capsys):
    """One letter changed: valid, and another vocabulary."""
    cache = tmp_path / "cache"
    PRETRAIN.main([*arguments, "--cache", str(cache), "--max-steps", "1", "--output", str(tmp_path / "one")])
    path, = cache.glob("tokenizer-*/tokenizer.json")
    path.write_text(path.read_text().replace('"river"', '"rivex"'))
    PRETRAIN.main([*arguments, "--cache", str(cache), "--output", str(tmp_path / "two")])
    assert f"{path} is damaged (its hash differs): the tokenizer is made again" in capsys.readouterr().out
    assert_same_run(finished, tmp_path / "two")


def test_a_worker_that_is_stuck_is_told(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("pretrain.data.dataset.SILENCE_SECONDS", 1)
    original = setup.Collator.__call__
    monkeypatch.setattr(setup.Collator, "__call__", lambda self, examples: time.sleep(
        3 if torch.utils.data.get_worker_info() else 0) or original(self, examples))
    told = refusal_after_messages(PRETRAIN.main, [*arguments, "--workers", "1", "--output", tmp_path / "run"], capsys)
    assert "--workers: RuntimeError: DataLoader timed out after 1 seconds" in told


def test_a_full_disk_for_the_log_is_told(finished, tmp_path, monkeypatch, capsys):
    interrupted_copy(finished, tmp_path / "run", 4)

    def full():
        raise OSError(28, "No space left on device", "metrics.jsonl")

    with monkeypatch.context() as patched:
        during(patched, "log", 2, full, target=train.Monitor)
        told = refusal_after_messages(PRETRAIN.main, ["--resume", "--output", tmp_path / "run"], capsys)
    assert "error: metrics.jsonl: No space left on device" in told
    PRETRAIN.main(["--resume", "--output", str(tmp_path / "run")])
    assert_same_run(finished, tmp_path / "run")


# Many processes.

@pytest.mark.parametrize(("name", "call", "number", "steps"), [("train_step", 5, signal.SIGUSR1, 5), ("evaluate", 2, signal.SIGTERM, 4)])
def test_a_signal_to_one_process_stops_all_by_agreement(finished_by_two, arguments, tmp_path, monkeypatch, name, call, number, steps):
    def prepare(rank):
        if rank == 1:
            during(monkeypatch, name, call, send(number))

    ended = in_processes(tmp_path, PRETRAIN.main, [*arguments, "--output", tmp_path / "run"], count=2, prepare=prepare)
    assert [code for code, _ in ended] == [128 + number] * 2, ended
    assert all(f"step {steps} of 10 is saved; stopped by {number.name}" in told for _, told in ended)
    resumed = in_processes(tmp_path, PRETRAIN.main, ["--resume", "--output", tmp_path / "run"], count=2)
    assert [code for code, _ in resumed] == [0, 0], resumed
    assert_same_run(finished_by_two, tmp_path / "run")


@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_dies_takes_the_run_down(finished_by_two, arguments, tmp_path, monkeypatch, victim):
    def prepare(rank):
        if rank == victim:
            during(monkeypatch, "train_step", 5, send(signal.SIGKILL))

    ended = in_processes(tmp_path, PRETRAIN.main, [*arguments, "--output", tmp_path / "run"], count=2, prepare=prepare, seconds=30)
    assert ended[victim][0] == -signal.SIGKILL and ended[1 - victim][0] == 2, ended
    assert "error: another process of this run has gone (" in ended[1 - victim][1] and "Traceback" not in ended[1 - victim][1]
    assert [code for code, _ in in_processes(tmp_path, PRETRAIN.main, ["--resume", "--output", tmp_path / "run"], count=2)] == [0, 0]
    assert_same_run(finished_by_two, tmp_path / "run")


def test_an_error_of_the_first_process_ends_the_others_that_wait_for_it(arguments, tmp_path):
    ended = in_processes(tmp_path, PRETRAIN.main, [*arguments, "--train", tmp_path / "absent", "--output", tmp_path / "run"], count=2,
                         seconds=30)
    assert [code for code, _ in ended] == [2, 2] and "no such file" in ended[0][1] and "Traceback" not in ended[1][1], ended


def test_numbers_that_are_not_finite_on_one_process_change_nothing_on_any(arguments, tmp_path, monkeypatch):
    ended = in_processes(tmp_path, PRETRAIN.main, [*arguments, "--output", tmp_path / "run"], count=2,
                         prepare=lambda rank: poison(monkeypatch, {5}, rank=1))
    assert [code for code, _ in ended] == [0, 0], ended
    assert "gradients not finite at step 5, data position (0, 0, 16, None): the step changed nothing" in ended[0][1]
    state = ckpt.read_tensors(tmp_path / "run" / "checkpoint-10")["optimizer"]
    assert {int(parts["step"]) for parts in state.values()} == {9}


def test_all_processes_halve_a_micro_batch_that_one_has_no_room_for(arguments, tmp_path, monkeypatch):
    more = [*arguments, "--batch-size", "16", "--max-steps", "3"]
    ended = in_processes(tmp_path, PRETRAIN.main, [*more, "--micro-batch-size", "8", "--output", tmp_path / "run"], count=2,
                         prepare=lambda rank: limit_memory(monkeypatch, 140, rank=1))
    assert [code for code, _ in ended] == [0, 0], ended
    assert (tmp_path / "out-0").read_text().count("so it is 4 in this run") == 1
    assert json.loads((tmp_path / "run" / "config.json").read_text())["micro_batch_size"] == 4


@pytest.fixture(scope="module")
def by_two(arguments, workplace):
    """A run in two processes, without dropout: its options and its folder."""
    options = [*arguments, "--config-override", *SIZES[1:], "hidden_dropout_prob=0"]
    assert [code for code, _ in in_processes(workplace, PRETRAIN.main, [*options, "--output", workplace / "by two"], count=2)] == [0, 0]
    return options, workplace / "by two"


def test_two_processes_equal_one(by_two, tmp_path):
    options, whole = by_two
    PRETRAIN.main([*options, "--output", str(tmp_path / "one")])
    assert_close_runs(whole, tmp_path / "one")


def test_gradients_travel_once_a_step(by_two, tmp_path, monkeypatch):
    """However many micro-batches a process has in it."""
    def count(rank):
        def wrap(model, compiled):
            trained = original(model, compiled)
            def travel(_, bucket):
                with (folder / "buckets").open("a") as told:
                    told.write("." if rank == 0 else "")
                return default_hooks.allreduce_hook(None, bucket)
            trained.register_comm_hook(None, travel)
            return trained
        original = train.wrap
        monkeypatch.setattr(train, "wrap", wrap)

    travelled = {}
    for micro in ("2", "4", "8"):  # four, two and one of them on each process
        (folder := tmp_path / micro).mkdir()
        argv = [*by_two[0], "--micro-batch-size", micro, "--max-steps", "3", "--output", folder / "run"]
        ended = in_processes(folder, PRETRAIN.main, argv, count=2, prepare=count)
        assert [code for code, _ in ended] == [0, 0], ended
        travelled[micro] = len((folder / "buckets").read_text())
    assert travelled["2"] == travelled["4"] == travelled["8"] in (3, 6), travelled  # the model is one bucket, or two


@pytest.mark.parametrize(("count", "more"), [(1, []), (4, []), (2, ["--shard"]), (1, ["--shard"])])
def test_a_run_goes_on_with_another_number_of_processes(by_two, tmp_path, count, more):
    """The same global batches, so the same losses, within rounding."""
    _, whole = by_two
    interrupted_copy(whole, tmp_path / "run", 4)
    ended = in_processes(tmp_path, PRETRAIN.main, ["--resume", "--output", tmp_path / "run", *more], count=count)
    assert {code for code, _ in ended} == {0}, ended
    assert_close_runs(whole, tmp_path / "run")


def assert_close_runs(left, right):
    """Numbers within 1e-4 of one another, weights within 1e-5: sums are added up in another order."""
    assert [row.keys() for row in rows(left)] == [row.keys() for row in rows(right)]
    for one, other in zip(rows(left), rows(right)):
        assert other == pytest.approx(one, rel=1e-4)
    a, b = (load_file(folder / "final" / "model.safetensors") for folder in (left, right))
    assert a.keys() == b.keys() and all(torch.allclose(a[name], b[name], atol=1e-5) for name in a)


@pytest.mark.parametrize("objective", ["mlm+nsp", "mlm"])
def test_sharded_weights_train_alike_and_are_saved_whole(arguments, tmp_path, objective):
    options = [*arguments, "--config-override", *SIZES[1:], "hidden_dropout_prob=0", "--objective", objective, "--max-steps", "6"]
    PRETRAIN.main([*options, "--output", str(tmp_path / "one")])
    ended = in_processes(tmp_path, PRETRAIN.main, [*options, "--shard", "--output", tmp_path / "sharded"], count=2)
    assert [code for code, _ in ended] == [0, 0], ended
    assert_close_runs(tmp_path / "one", tmp_path / "sharded")
    assert ckpt.read_tensors(tmp_path / "one" / "checkpoint-6")["optimizer"].keys() == \
        ckpt.read_tensors(tmp_path / "sharded" / "checkpoint-6")["optimizer"].keys()
    interrupted_copy(tmp_path / "sharded", tmp_path / "parts", 2)
    ended = in_processes(tmp_path, PRETRAIN.main, ["--resume", "--output", tmp_path / "parts"], count=2)
    assert [code for code, _ in ended] == [0, 0], ended
    assert_same_run(tmp_path / "sharded", tmp_path / "parts", step=6)


def test_torchrun_restarts_a_run_from_its_checkpoint(finished_by_two, arguments, tmp_path):
    """One process of two is killed once; the same command under --max-restarts ends as if it had not been."""
    code = f"""
import os, signal, sys
sys.argv[0] = {str(ROOT / 'scripts' / 'pretrain.py')!r}
sys.path.insert(0, {str(ROOT)!r})
from pretrain import train
original, calls, mark = train.train_step, [], {str(tmp_path / 'killed')!r}
def step(*more):
    calls.append(1)
    if len(calls) == 5 and os.environ["RANK"] == "1" and not os.path.exists(mark):
        open(mark, "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*more)
train.train_step = step
exec(compile(open(sys.argv[0]).read(), sys.argv[0], "exec"))
"""
    (tmp_path / "wounded.py").write_text(code)
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=1",
                           str(tmp_path / "wounded.py"), *arguments, "--resume", "--output", str(tmp_path / "run")],
                          env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and (tmp_path / "killed").exists(), done.stderr[-3000:]
    assert_same_run(finished_by_two, tmp_path / "run")
