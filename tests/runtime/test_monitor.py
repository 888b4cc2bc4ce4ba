"""What a run shows: the curves of TensorBoard equal the rows of metrics.jsonl, a resumed run has one unbroken curve and no row twice,
settings and charts are in one run, and a process that is not the first writes nothing."""
import json
import math
import os
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import plugin_data_pb2
from tensorboard.summary.writer import event_file_writer

from pretrain.evaluate import summarize
from pretrain.runtime import monitor as monitors
from pretrain.runtime.monitor import Monitor

OPTIONS = {"learning_rate": 1e-3, "model": "tiny", "train": ["a", "b"], "resume": False, "patience": 0, "workers": None}


@pytest.fixture(autouse=True)
def seconds(monkeypatch):
    """A clock that ticks at every look: event files are read in the order of the second in their names, and a resumed run of a
    test begins in the same one."""
    ticks = iter(range(1_700_000_000, 1_800_000_000))

    class Clock:
        time = staticmethod(lambda: float(next(ticks)))

    monkeypatch.setattr(event_file_writer, "time", Clock)


def numbers(step):
    """What a logged step holds; every second one has been evaluated."""
    held_out = {"eval/perplexity": 300.0 / (step + 1), "eval/mlm_loss": 5.0 - 0.1 * step} if step % 2 == 0 else {}
    return {"train/loss": 6.0 / (step + 1), "train/perplexity": math.exp(6.0 / (step + 1)), "optim/learning_rate": 1e-3 * step, **held_out}


def write(output, steps, total=10, close=True):
    """A run, or a part of one: the monitor of a process that logs `steps` and ends, with or without closing its files."""
    monitor = Monitor(output, steps[0], total, OPTIONS)
    for step in steps:
        monitor.log(step, numbers(step))
        monitor.advance()
    if close:
        monitor.close({"eval/perplexity": 30.0})
    else:  # killed: what was flushed is on disk
        monitor.flush()
    return monitor


def rows(output):
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def read_events(output):
    accumulator = EventAccumulator(str(output), size_guidance={"scalars": 0, "tensors": 0})
    accumulator.Reload()
    return accumulator


def assert_curves_equal_rows(output):
    """Every number of metrics.jsonl is one point of its curve, in order, and there is no other point."""
    events, expected = read_events(output), {}
    for row in rows(output):
        for name in row.keys() - {"step"}:
            expected.setdefault(name, []).append((row["step"], row[name]))
    curves = {name: [(event.step, event.value) for event in events.Scalars(name)] for name in expected}
    logged = {name for name in events.Tags()["scalars"] if "/" in name}
    assert logged == set(expected)
    for name, points in expected.items():
        assert [step for step, _ in curves[name]] == [step for step, _ in points], name
        assert [value for _, value in curves[name]] == pytest.approx([value for _, value in points], rel=1e-6), name  # float32


def test_curves_equal_the_rows(tmp_path):
    write(tmp_path, list(range(8)))
    assert [row["step"] for row in rows(tmp_path)] == list(range(8))
    assert rows(tmp_path)[3] == {"step": 3, **numbers(3)}
    assert "eval/perplexity" in rows(tmp_path)[4]
    assert_curves_equal_rows(tmp_path)


@pytest.mark.parametrize("close", [True, False], ids=["stopped", "killed"])
def test_a_resumed_run_has_one_unbroken_curve(close, tmp_path):
    write(tmp_path, list(range(8)), close=close)  # ended in step 7; the newest checkpoint is of step 4
    write(tmp_path, [5, 6, 7, 8, 9])
    assert [row["step"] for row in rows(tmp_path)] == list(range(10))
    assert_curves_equal_rows(tmp_path)
    write(tmp_path, [9, 10])  # and once more
    assert [row["step"] for row in rows(tmp_path)] == list(range(11))
    assert_curves_equal_rows(tmp_path)


def test_a_run_that_ended_before_its_first_checkpoint_begins_anew(tmp_path):
    """Without a checkpoint a run starts at step 0; nothing of the earlier attempt stays."""
    write(tmp_path, list(range(6)), close=False)
    write(tmp_path, [0, 1, 2])
    assert [row["step"] for row in rows(tmp_path)] == [0, 1, 2]
    assert_curves_equal_rows(tmp_path)


@pytest.mark.parametrize("tail", [
    '{"step": 3, "train/lo', '{"step": 3, "train/loss": 2.0}', "\0\0\0\0\n", "[1]\n", "{}\n", '{"step": null}\n',
], ids=["half a row", "no newline", "zeros", "a list", "no step", "null"])
def test_a_row_that_a_crash_has_cut_short_is_dropped(tail, tmp_path):
    path = tmp_path / "metrics.jsonl"
    whole = '{"step": 1, "train/loss": 3.0}\n{"step": 2, "train/loss": 2.5}\n'
    path.write_text(whole + tail, encoding="utf-8")
    Monitor(tmp_path, 4, 10, OPTIONS).close({})
    assert path.read_text(encoding="utf-8") == whole
    assert not list(tmp_path.glob("*.tmp"))


def test_charts_and_settings_are_in_one_run(tmp_path):
    write(tmp_path, [0, 1, 2])
    assert sorted(path.name.split(".")[0] for path in tmp_path.iterdir()) == ["events", "metrics"], "one event file, no folder"
    events = read_events(tmp_path)
    (tensor,) = events.Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(tensor.tensor_proto.string_val[0])
    charts = {(category.title, chart.title): list(chart.multiline.tag) for category in layout.category for chart in category.chart}
    assert charts == {(category, title): tags for category, entries in monitors.PRETRAINING_CHARTS.items()
                      for title, (_, tags) in entries.items()}
    known = summarize({f"{name}_{kind}": 1.0 for name in ("mlm", "nsp") for kind in ("loss", "correct", "count")}, {"mlm": 1.0, "nsp": 1.0})
    names = {f"{side}/{name}" for side in ("train", "eval") for name in known} | {"eval/unigram_perplexity"}
    assert {tag for tags in charts.values() for tag in tags} <= names, "a chart of a name that is never logged stays empty"

    plugin = events.PluginTagToContent("hparams")
    start = plugin_data_pb2.HParamsPluginData.FromString(plugin["_hparams_/session_start_info"]).session_start_info
    shown = {name: value.string_value if value.HasField("string_value") else value.number_value if value.HasField("number_value")
             else value.bool_value for name, value in start.hparams.items()}
    assert shown == {**OPTIONS, "train": "['a', 'b']", "workers": "None"}
    assert {"_hparams_/experiment", "_hparams_/session_end_info"} <= set(plugin)
    experiment = plugin_data_pb2.HParamsPluginData.FromString(plugin["_hparams_/experiment"]).experiment
    assert [info.name.tag for info in experiment.metric_infos] == ["eval/perplexity"]


def test_text_panels(tmp_path):
    monitor = write(tmp_path, [0, 1], close=False)
    monitor.text(1, "held-out predictions", "| place |\n|---|")
    monitor.close({})
    (panel,) = read_events(tmp_path).Tensors("held-out predictions/text_summary")
    assert panel.step == 1 and panel.tensor_proto.string_val[0].decode() == "| place |\n|---|"


def test_an_inactive_monitor_writes_nothing(tmp_path, capfd):
    monitor = Monitor(tmp_path, 0, 10, OPTIONS, active=False)
    monitor.log(1, numbers(1))
    monitor.advance()
    monitor.text(1, "name", "text")
    monitor.say("a line")
    monitor.flush()
    monitor.close({"eval/perplexity": 1.0})
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


def test_an_inactive_monitor_cuts_nothing(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 9}\n')
    Monitor(tmp_path, 4, 10, OPTIONS, active=False).close({})
    assert rows(tmp_path) == [{"step": 9}]


def test_a_row_is_on_disk_as_soon_as_it_is_logged(tmp_path):
    monitor = write(tmp_path, [0, 1], close=False)
    monitor.log(2, numbers(2))
    assert rows(tmp_path)[-1]["step"] == 2
    monitor.close({})


def test_lines_replace_the_bar_where_stderr_is_no_terminal(tmp_path, capsys, monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr(monitors.time, "monotonic", lambda: clock[0])
    monitor = Monitor(tmp_path, 0, 100, OPTIONS)
    for step, now in ((1, 1010.0), (2, 1012.0), (20, 1020.0)):
        clock[0] = now
        monitor.log(step, {"train/loss": 6.0, "train/perplexity": 200.0, "speed/tokens_per_second": 12345.6})
    monitor.log(30, {"train/loss": 5.0, "eval/loss": 5.5, "eval/perplexity": 180.25, "eval/mlm_accuracy": 0.125})
    monitor.say("a line for the user")
    monitor.close({})
    # Step 2 comes within LINE_SECONDS; at step 20, 20 s for 20 of 100 steps leave 80 s.
    assert capsys.readouterr().err.splitlines() == [
        "step 1/100: loss 6, ppl 200, tokens/s 12,346, 16.5 min left", "step 20/100: loss 6, ppl 200, tokens/s 12,346, 1.3 min left",
        "step 30: held-out perplexity 180.2, mlm accuracy 0.125", "a line for the user"]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the kernel's own count is read from /proc")
def test_peak_memory_is_that_of_the_process():
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    assert monitors.peak_memory_bytes(torch.device("cpu")) == pytest.approx(int(line.split()[1]) * 1024, rel=0.1)
    assert os.sysconf("SC_PAGE_SIZE") < monitors.peak_memory_bytes(torch.device("cpu"))
