"""Logs of a run: TensorBoard's curves equal the rows of metrics.jsonl, a resumed run has one
unbroken curve and no row twice, and a process other than the main one writes nothing."""

import math
import os

import pytest
from conftest import read_rows
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.summary.writer import event_file_writer

from pretrain.runtime import monitor as module
from pretrain.runtime.monitor import Monitor

OPTIONS = {"learning_rate": 1e-3, "model": "tiny", "train": ["a"], "resume": False, "workers": None}


@pytest.fixture(autouse=True)
def seconds(monkeypatch):
    """A clock that ticks at every look: event files are read in the order of the second in their
    names, and a resumed run of a test starts in the same one."""
    ticks = iter(range(1_700_000_000, 1_800_000_000))

    class Clock:
        time = staticmethod(lambda: float(next(ticks)))

    monkeypatch.setattr(event_file_writer, "time", Clock)


def training(step):
    loss = 6.0 / (step + 1)
    return {"train/loss": loss, "train/mlm_loss": loss, "optim/learning_rate": 1e-3 * step}


def evaluation(step):
    scores = {"eval/perplexity": 300.0 / (step + 1), "eval/mlm_loss": 5.0 - 0.1 * step}
    return scores | {"eval_f1/pos": 0.1 * step}  # of fine-tuning: one for each class


def write(output, first, last, evaluated=True, close=True):
    """Resume at `first`, log each step up to `last`, evaluate every second one, and end with or
    without closing the files."""
    monitor = Monitor(output, first, 10, OPTIONS, evaluated=evaluated)
    for step in range(first, last + 1):
        if step > first:
            monitor.log(step, training(step))
            monitor.advance()
        if step % 2 == 0 and (step > first or not evaluated):
            monitor.log(step, evaluation(step))
    if close:
        monitor.close({"eval/perplexity": 30.0})
    else:  # killed: what was flushed is on disk
        monitor.flush()
    return monitor


def rows(output):
    return read_rows(output / "metrics.jsonl")


def expected_rows(last):
    """The rows of a run that was never interrupted."""
    found = []
    for step in range(last + 1):
        found += [{"step": step, **training(step)}] * (step > 0)
        found += [{"step": step, **evaluation(step)}] * (step % 2 == 0)
    return found


def read_events(output):
    accumulator = EventAccumulator(str(output), size_guidance={"scalars": 0, "tensors": 0})
    return accumulator.Reload()


def assert_one_curve(output, last):
    """Each row occurs once, and each number is one point of its curve, in order."""
    assert rows(output) == expected_rows(last)
    events, points = read_events(output), {}
    for row in expected_rows(last):
        for name in row.keys() - {"step"}:
            points.setdefault(name, []).append((row["step"], pytest.approx(row[name], rel=1e-6)))
    assert {name for name in events.Tags()["scalars"] if "/" in name} == points.keys()
    for name, expected in points.items():
        assert [(event.step, event.value) for event in events.Scalars(name)] == expected, name


@pytest.mark.parametrize("close", [True, False], ids=["stopped", "killed"])
def test_a_resumed_run_has_one_unbroken_curve(close, tmp_path):
    write(tmp_path, 0, 7, evaluated=False, close=close)
    assert_one_curve(tmp_path, 7)
    write(tmp_path, 5, 9)  # the newest checkpoint is of step 5
    assert_one_curve(tmp_path, 9)
    write(tmp_path, 8, 10, close=close)  # once more, after an evaluation
    assert_one_curve(tmp_path, 10)
    write(tmp_path, 0, 2, evaluated=False)  # without a checkpoint, it starts over
    assert_one_curve(tmp_path, 2)


def test_a_pipe_in_place_of_the_log_is_replaced(tmp_path):
    os.mkfifo(tmp_path / "metrics.jsonl")
    write(tmp_path, 0, 2, evaluated=False)
    assert_one_curve(tmp_path, 2)


def test_a_step_without_evaluation_keeps_only_its_training_row(tmp_path):
    write(tmp_path, 0, 6, evaluated=False, close=False)
    monitor = Monitor(tmp_path, 4, 10, OPTIONS, evaluated=False)
    assert rows(tmp_path)[-1] == {"step": 4, **training(4)}
    monitor.close({})
    write(tmp_path, 4, 9, evaluated=False)
    assert_one_curve(tmp_path, 9)


@pytest.mark.parametrize("tail", ['{"step": 3, "a": 2.0}', "\0\0\n", "[1]\n", '{"step": null}\n'])
def test_a_row_that_a_crash_cut_short_is_dropped(tail, tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    good = '{"step": 1, "train/loss": 3.0}\n{"step": 2, "train/loss": 2.5}\n'
    path.write_text(good + tail, encoding="utf-8")
    Monitor(tmp_path, 4, 10, OPTIONS).close({})
    assert path.read_text(encoding="utf-8") == good
    assert not list(tmp_path.glob(".*"))
    assert (str(path) in capsys.readouterr().out) == tail.endswith("\n")  # damage is reported


def test_every_loss_gets_a_chart(tmp_path):
    """Even one that a researcher adds; a chart of a name that is never logged would be empty."""
    monitor = Monitor(tmp_path, 0, 10, OPTIONS)
    losses = {"eval/loss": 1.0, "eval/mlm_loss": 1.0, "eval/nsp_loss": 1.0, "eval/z_loss": 1.0}
    monitor.log(0, losses)
    monitor.log(1, {"train/mlm_loss": 2.0})
    monitor.close({})
    Monitor(tmp_path, 1, 10, OPTIONS).close({})
    perplexities = ["train/perplexity", "eval/perplexity", "eval/unigram_perplexity"]
    expected = {("perplexity", "training and held-out"): perplexities}
    for loss in ("mlm", "nsp", "z"):
        names = [f"train/{loss}_loss", f"eval/{loss}_loss"]
        expected["loss", f"{loss.upper()}, training and held-out"] = names
    (tensor,) = read_events(tmp_path).Tensors("custom_scalars__config__")
    found = layout_pb2.Layout.FromString(tensor.tensor_proto.string_val[0])
    charts = {(of.title, chart.title): chart for of in found.category for chart in of.chart}
    assert {names: list(chart.multiline.tag) for names, chart in charts.items()} == expected


def test_texts_become_panels_and_non_finite_numbers_are_null(tmp_path, capsys):
    monitor = Monitor(tmp_path, 0, 10, OPTIONS)
    numbers = {"train/loss": math.nan, "train/x": 1.0, "eval/perplexity": math.inf}
    monitor.log(1, {**numbers, "held-out predictions": "| a |"})
    monitor.log(2, {"only text": "text"})
    row = {"step": 1, "train/loss": None, "train/x": 1.0, "eval/perplexity": None}
    assert rows(tmp_path) == [row], "on disk as soon as it is logged"
    monitor.close({})
    Monitor(tmp_path, 1, 10, OPTIONS, evaluated=False).close({})  # the row can be read again
    assert rows(tmp_path) == [{"step": 1, "train/loss": None, "train/x": 1.0}]
    assert "perplexity not finite" in capsys.readouterr().err
    assert not {"train/loss", "eval/perplexity"} & set(read_events(tmp_path).Tags()["scalars"])
    panel = read_events(tmp_path).Tensors("held-out predictions/text_summary")[0]
    assert panel.step == 1 and panel.tensor_proto.string_val[0].decode() == "| a |"


def test_an_inactive_monitor_writes_and_cuts_nothing(tmp_path, capfd):
    (tmp_path / "metrics.jsonl").write_text('{"step": 9}\n')
    monitor = Monitor(tmp_path, 4, 10, OPTIONS, active=False)
    monitor.log(5, {**training(5), "name": "text"})
    monitor.advance()
    monitor.say("a line")
    monitor.flush()
    monitor.close({"eval/perplexity": 1.0})
    assert rows(tmp_path) == [{"step": 9}] and len(list(tmp_path.iterdir())) == 1
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("quiet", [False, True])
def test_lines_replace_the_bar_where_stderr_is_not_a_terminal(quiet, tmp_path, capsys, monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    monitor = Monitor(tmp_path, 0, 100, OPTIONS, quiet=quiet)
    shown = {"train/loss": 6.0, "train/perplexity": 200.0, "speed/tokens_per_second": 12345.6}
    for step, now in ((1, 1010.0), (2, 1012.0), (20, 1020.0), (30, 1022.0)):
        clock[0] = now
        monitor.log(step, shown)
    monitor.log(30, {"eval/loss": 5.5, "eval/perplexity": 180.25, "eval/mlm_accuracy": 0.125})
    monitor.say("a line for the user")
    monitor.close({})
    # Step 2 comes within LINE_SECONDS, and so does step 30, but that has scores, too. The time of
    # step 1 does not count: at step 20, 10 s for 19 steps leave 42 s.
    lines = [
        "step 1/100: loss 6, ppl 200, tokens/s 12,346",
        "step 20/100: loss 6, ppl 200, tokens/s 12,346, 0.7 min left",
        "step 30/100: loss 6, ppl 200, tokens/s 12,346, 0.5 min left",
        "step 30: validation perplexity 180.2, mlm accuracy 0.125",
        "a line for the user",
    ]
    assert capsys.readouterr().err.splitlines() == (lines[-1:] if quiet else lines)
