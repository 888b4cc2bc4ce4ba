"""Minutes to quality: the old recipe and pretrain.py, one after the other, from scratch on the same
text, with the same model size and tokenizer, scored on the same held-out masks.

The old recipe is transformers.Trainer at its defaults, on pairs that are tokenized up front, as
`TextDatasetForNextSentencePrediction` did. Minutes count from the start of training: imports, text
preparation and the making of pairs count on neither side. Ours include evaluations and checkpoints;
those of the old recipe do not.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import TrainerCallback

from pretrain.build import build
from pretrain.config import Config
from pretrain.evaluate import evaluate
from pretrain.model.loading import from_checkpoint
from pretrain.model_setup import set_up_model
from pretrain.runtime.checkpoint import STATE_JSON, checkpoints, step_of
from scripts.benchmark.clock import answer_calls, begin_clock
from scripts.benchmark.peer import Peer, describe
from scripts.benchmark.processes import Command, Process, ProcessError
from scripts.benchmark.rows import same_examples

# As in most published copies of the recipe, such as models/custom_bert_training_new.py of
# github.com/chrisAS12/specseminars-2021-mi; Trainer's default is 8.
OLD_BATCH = 16
OLD_MASK_RATE = 0.15
SNAPSHOTS = 10  # of the old recipe
TRIAL_SHARE = 0.05  # of the minutes: a start that only shows how many steps fit
MAX_STEPS = 10**6  # of the old recipe
CHOSEN_BY_PRETRAIN = ("batch_size", "micro_batch_size")  # not passed on


class Referee:
    """Makes the pairs of the old recipe and scores its models, as a run of pretrain.py would."""

    def __init__(self, options: dict):
        self.run = build(Config(**options))

    def old_recipe(self) -> Peer:
        """The stock model and Trainer's defaults (also without gradient checkpointing, whatever the
        options), on the pairs of one epoch."""
        arguments = {
            "per_device_train_batch_size": OLD_BATCH,
            "use_cpu": self.run.device.type == "cpu",
            "report_to": "none",
            "disable_tqdm": True,
        }
        peer = describe(self.run, same_examples(self.run))
        return replace(peer, arguments=arguments, masks={"mlm_probability": OLD_MASK_RATE})

    def score(self, folder: Path) -> dict[str, float]:
        """Validation numbers of the model in `folder`."""
        run, (model, _) = self.run, from_checkpoint(str(folder))
        set_up_model(model.to(run.device), run.asked, run.config, run.device, run.precision)
        return evaluate(model, run.phases[0].validation, run.autocast())


def serve(turns: Connection, options: dict) -> None:
    """Answer calls of methods of a `Referee`."""
    answer_calls(turns, Referee(options))


class TimeLimit(TrainerCallback):
    """Stops a Trainer after `seconds` of training. Calls `save(model)` after each tenth of its
    steps and after the last one; that time does not count."""

    def __init__(self, seconds: float, save: Callable | None = None):
        self.limit, self.save, self.seconds, self.step = seconds, save, 0.0, 0

    def on_train_begin(self, arguments, state, control, **_) -> None:
        self.begin = begin_clock(arguments.device)

    def on_step_end(self, arguments, state, control, model, **_) -> None:
        self.seconds = begin_clock(arguments.device) - self.begin
        self.step, num_steps = state.global_step, state.max_steps
        control.should_training_stop = self.seconds >= self.limit or self.step == num_steps
        is_tenth = self.step % max(1, num_steps // SNAPSHOTS) == 0
        if self.save and (control.should_training_stop or is_tenth):
            self.save(model)
            self.begin = begin_clock(arguments.device) - self.seconds


def train_old(turns: Connection, peer: Peer, folder: Path, rate: float, seconds: float) -> None:
    """Train the old recipe in a separate process; its turns end with a snapshot in `folder`, and
    None follows the last one.

    Trainer's rate decays by steps, so a trial finds the number of steps that fit in `seconds`."""
    turns.recv()
    trial = TimeLimit(seconds * TRIAL_SHARE)
    peer.train(str(folder), MAX_STEPS, trial, learning_rate=rate)
    num_steps = min(MAX_STEPS, max(1, int(seconds * trial.step / trial.seconds)))

    def save(model) -> None:
        model.save_pretrained(folder)
        turns.send({"minutes": limit.seconds / 60, "step": limit.step, "num_steps": num_steps})
        turns.recv()

    limit = TimeLimit(seconds, save)
    peer.train(str(folder), num_steps, limit, learning_rate=rate)
    turns.send(None)


def measure_quality(bench) -> Iterator[dict]:
    """Perplexities by minutes of both sides, and when ours is as good as the old recipe's last."""
    held_out = {"valid_fraction": Config.valid_fraction}
    referee = Process(bench.folder, "referee", serve, bench.run_options(**held_out))
    peer, failed = referee.ask("old_recipe"), {}
    options, output = bench.options, bench.folder / "run"
    ours = Command(bench.folder, "pretrain", our_options(options, output), name="ours")
    ours.process.join()
    if ours.process.exitcode:  # in the report, with its log
        return
    points = our_points(output, lambda checkpoint: referee.ask("score", checkpoint))
    old_runs = []
    yield compare(points, old_runs)
    for rate in options.old_rates:
        side = f"old recipe at {rate:g}"
        folder = bench.folder / f"old-{rate:g}"
        run = []
        values = (peer, folder, rate, 60 * options.minutes)
        process = Process(bench.folder, folder.name, train_old, *values)
        old_runs.append(run)
        try:
            for point in iter(process.ask, None):
                scores = referee.ask("score", folder)
                run.append({"side": side, **point, "perplexity": scores["perplexity"]})
                unigram = {"unigram_perplexity": scores["unigram_perplexity"]}
                yield unigram | compare(points, old_runs)
        except ProcessError as error:
            failed[folder.name] = str(error)
    yield {"failed": failed}


def our_options(options, output: Path) -> dict:
    """What pretrain.py gets: the options that were given to the benchmark, and the time limit."""
    names = Config.__dataclass_fields__.keys() - set(CHOSEN_BY_PRETRAIN)
    values = {name: getattr(options, name) for name in names if hasattr(options, name)}
    defaults = type(options)
    given = {name: value for name, value in values.items() if value != getattr(defaults, name)}
    run = {"max_minutes": options.minutes, "output": str(output), "keep": MAX_STEPS}
    return {"model": options.model, **given, **run}


def our_points(output: Path, score: Callable[[Path], dict]) -> list[dict]:
    """The scores of a run's checkpoints, at the time when each was written.

    The run's own evaluations do not count: in a phase of short sequences they are easier."""
    begin, points = EventAccumulator(str(output)).Reload().FirstEventTimestamp(), []
    for folder in reversed(checkpoints(output)):  # oldest first
        seconds = (folder / STATE_JSON).stat().st_mtime - begin
        point = {"side": "ours", "minutes": seconds / 60, "step": step_of(folder)}
        points.append(point | {"perplexity": score(folder)["perplexity"]})
    return points


def compare(ours: list[dict], old_runs: list[list[dict]]) -> dict:
    """The report on the points of both sides; the old recipe's best run counts.

    Ours is as good from its first checkpoint that is no worse: nothing is interpolated."""
    found = {"rows": [point for points in (ours, *old_runs) for point in points]}
    last_points = [points[-1] for points in old_runs if points]
    if not ours or not last_points:
        return found
    old = min(last_points, key=lambda point: point["perplexity"])
    found["last_perplexity"] = {"ours": ours[-1]["perplexity"], "peer": old["perplexity"]}
    goal = f"the old recipe's last perplexity ({old['perplexity']:,.1f})"
    reached = [point for point in ours if point["perplexity"] <= old["perplexity"]]
    if not reached:
        return found | {"result": f"ours does not reach {goal}"}
    minutes = {"ours": reached[0]["minutes"], "peer": old["minutes"]}
    times = f"{minutes['peer'] / minutes['ours']:.3g} times as fast"
    result = f"ours reaches {goal} after {minutes['ours']:.3g} minutes: {times}"
    return found | {"minutes_to_its_last": minutes, "result": result}
