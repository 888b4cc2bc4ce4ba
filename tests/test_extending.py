"""The edits of "Change it" in the README, each applied to a copy of the project.

An edited project trains, survives a non-finite step, and a run that is killed and resumed ends like
an uninterrupted one, bit for bit."""

import json
import math
import os
import re
import shutil
import signal
import sys
from importlib import import_module

import pytest
import torch
from conftest import (
    ROOT,
    SIZES,
    arguments_of,
    assert_same_run,
    in_processes,
    rows,
    save,
    summary_of,
)
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM, AutoTokenizer, ElectraConfig, ElectraForMaskedLM

from pretrain.batch import IGNORED
from pretrain.runtime.checkpoint import read_states

SKIPPED, KILLED, LAST = 3, 4, 6  # steps
SECTION = (ROOT / "README.md").read_text(encoding="utf-8").split("## Change it\n")[1]
EDITS = dict(
    re.findall(r"### ([^\n]+)\n[^#]*?```diff\n(.*?)```", SECTION.split("\n## ")[0], re.DOTALL)
)
RUN = f"""--max-length 32 --precision fp32 --batch-size 16 --micro-batch-size 8 --max-steps {LAST}
--save-every 2 --eval-every 4 --eval-tokens 600 --log-every 1 --keep 9"""
OPTIONS = {
    "Another optimizer": "--optimizer adamw",
    "Layer-wise learning rates": "--optimizer adamw",
    "An average of the weights": "--save-every 1",
    "A mask strategy": "--masking pair",
    "A curriculum of masks": "--masking growing --piece-weight 0.2",
    "Another encoder": "--objective mlm",
}
# Values that show in few steps.
EDITS["An average of the weights"] = EDITS["An average of the weights"].replace("0.999", "0.5")
EDITS["Frozen weights"] = EDITS["Frozen weights"].replace("step >= 100", f"step >= {SKIPPED}")


def apply(diff, folder):
    """Make an edit under `folder`: in each hunk, the lines without + become those without -."""
    for part in re.split(r"^--- ", diff, flags=re.MULTILINE)[1:]:
        name, body = part.split("\n", 1)
        path = folder / name
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        for hunk in re.split(r"^@@\n", body, flags=re.MULTILINE)[1:]:
            lines = [line or " " for line in hunk.splitlines()]
            before = "".join(f"{line[1:]}\n" for line in lines if line[0] != "+")
            after = "".join(f"{line[1:]}\n" for line in lines if line[0] != "-")
            assert text.count(before) == 1 or not before, f"{name} needs one:\n{before}"
            text = text.replace(before, after, 1) if before else after
        path.write_text(text, encoding="utf-8")


def run_edited(folder, *runs, command="pretrain"):
    """(exit code, stderr) of a command of the project under `folder` for each of `runs`: after how
    many steps it is killed (0: never), and its arguments. Gradients of step SKIPPED are not finite.
    The processes are forked from one that has imported the project."""
    (folder / "ends").mkdir(exist_ok=True)

    def main(argv):
        for name in [name for name in sys.modules if name.split(".")[0] == "pretrain"]:
            del sys.modules[name]
        sys.path.insert(0, str(folder))
        from pretrain import build, train
        from pretrain.data.loader import TrainData
        from pretrain.runtime import optim

        assert build.__file__.startswith(str(folder))
        next_step, train_step = TrainData.__next__, train.train_step
        steps, ends = [], []

        def next_or_end(data):
            batches = next_step(data)
            steps.append(data.step)
            if kill_at and data.step > kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return batches

        def poisoned(model, batches, *more):
            def lose(batch):
                losses = model(batch)
                bad = losses["mlm"].sum * math.nan
                return losses | {"mlm": type(losses["mlm"])(bad, losses["mlm"].num_correct)}

            return train_step(lose if steps[-1] == SKIPPED else model, batches, *more)

        TrainData.__next__, train.train_step = next_or_end, poisoned
        optim.best_seconds = lambda work, device: 1.0  # see conftest.py
        edited = import_module(f"pretrain.commands.{command}").main
        for run in runs:
            kill_at, arguments = run
            ends += in_processes(folder / "ends", edited, arguments)
        (folder / "ends.json").write_text(json.dumps(ends))

    ((code, text),) = in_processes(folder, main, [], seconds=60 * len(runs))
    assert code == 0, text
    return json.loads((folder / "ends.json").read_text())


def electra(folder, tokenizer):
    """The folder of a small ELECTRA to continue from."""
    sizes = {"hidden_size": 32, "embedding_size": 16, "intermediate_size": 64}
    layers = {"num_attention_heads": 2, "num_hidden_layers": 2}
    config = ElectraConfig(vocab_size=len(tokenizer), **sizes, **layers)
    return save(folder, ElectraForMaskedLM(config), tokenizer)


@pytest.mark.parametrize("title", EDITS)
def test_an_edit_of_the_readme_trains_and_resumes(title, corpus, tmp_path, tiny_tokenizer):
    for name in ("pretrain", "scripts"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("benchmark"))
    apply(EDITS[title], tmp_path)
    argv = arguments_of(["--train", corpus.folder], RUN, OPTIONS.get(title, ""), "--model")
    if title == "Another encoder":
        argv += [electra(tmp_path / "electra", tiny_tokenizer)]
    else:
        argv += ["tiny", *SIZES]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    argv.append("--output")
    runs = (0, [*argv, whole]), (KILLED, [*argv, killed]), (0, [*argv, killed, "--resume"])
    ends = run_edited(tmp_path, *runs)
    assert [code for code, _ in ends] == [0, -signal.SIGKILL, 0], ends
    assert summary_of(whole)["skipped_steps"] == 1
    assert_same_run(whole, killed, LAST)
    training = [row for row in rows(whole) if "train/loss" in row]
    assert len(training) >= LAST - 1  # a skipped step has no losses
    for row in training:
        assert row["train/perplexity"] == pytest.approx(math.exp(row["train/mlm_loss"]))
    CHECKS[title](whole, training)


# What shows that an edit is in force: (run folder, rows of training) -> an assertion.


def has_term(name, weight):
    """The term is logged, also in evaluation, and its mean is part of the loss."""

    def check(run, training):
        assert sum(f"eval/{name}_loss" in row for row in rows(run)) == 3
        for row in training:
            total = (
                row["train/mlm_loss"] + row["train/nsp_loss"] + weight * row[f"train/{name}_loss"]
            )
            assert row["train/loss"] == pytest.approx(total)

    return check


def has_other_state(run, training):
    state = read_states(run / f"checkpoint-{LAST}")["optimizer"]["weights"]
    assert all("mu_product" in of_weight for of_weight in state.values())


def has_scaled_rates(run, training):
    (groups,) = read_states(run / f"checkpoint-{LAST}")["optimizer"]["groups"]
    scales = {round(group["lr"] / training[-1]["optim/learning_rate"], 6) for group in groups}
    assert scales == {1.0, 0.8, 0.64}


def was_frozen_at_first(run, training):
    for step, is_frozen in ((2, True), (LAST, False)):
        state = read_states(run / f"checkpoint-{step}")["optimizer"]["weights"]
        layers = [of_weight for name, of_weight in state.items() if ".layer." in name]
        assert layers and all((of_weight == {}) == is_frozen for of_weight in layers)


def averages_the_weights(run, training):
    expected = None
    for step in range(1, LAST + 1):
        weights = load_file(run / f"checkpoint-{step}" / "model.safetensors")
        expected = expected or dict(weights)
        for name, weight in weights.items():
            expected[name] = expected[name].lerp(weight, 0.5)
    for folder in (run, run.parent / "killed"):
        torch.testing.assert_close(load_file(folder / "average" / "model.safetensors"), expected)


def logs_a_norm(run, training):
    assert all(row["optim/weight_norm"] > 1 for row in training)


def masks_pairs(run, training):
    assert json.loads((run / "config.json").read_text())["masking"] == "pair"


def masks_fewer_pieces_later(run, training):
    """The weight follows the steps, also after a resume, and changes what is masked."""
    for row in training:
        weight = 1 - 0.8 * (row["step"] - 1) / (LAST - 1)
        assert row["optim/piece_weight"] == pytest.approx(weight)
    tokenizer, shares = AutoTokenizer.from_pretrained(run / "final"), []
    for progress in (0, 1):
        argv = ["--config", run / "config.json", "--position", 0, 0, 0, progress]
        argv += ["--examples", 0, "--save", run / "shown.pt"]
        ((code, text),) = run_edited(run.parent, (0, argv), command="show_masks")
        assert code == 0, text
        labels = torch.cat([batch["labels"]["mlm"] for batch in torch.load(run / "shown.pt")])
        tokens = tokenizer.convert_ids_to_tokens(labels[labels != IGNORED].tolist())
        shares.append(sum(token.startswith("##") for token in tokens) / len(tokens))
    assert shares[0] > 1.3 * shares[1] > 0, shares


def opens_as_electra(run, training):
    model, info = AutoModelForMaskedLM.from_pretrained(run / "final", output_loading_info=True)
    assert type(model) is ElectraForMaskedLM and not info["missing_keys"]


CHECKS = {
    "A loss term": has_term("z", 1e-4),
    "A loss on hidden states": has_term("size", 1e-3),
    "A third objective": has_term("start", 0.5),
    "Another optimizer": has_other_state,
    "Layer-wise learning rates": has_scaled_rates,
    "Frozen weights": was_frozen_at_first,
    "An average of the weights": averages_the_weights,
    "A logged number": logs_a_norm,
    "A mask strategy": masks_pairs,
    "A curriculum of masks": masks_fewer_pieces_later,
    "Another encoder": opens_as_electra,
}


def test_every_seam_has_an_edit():
    assert EDITS.keys() == CHECKS.keys()
