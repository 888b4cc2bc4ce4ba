"""Bounds of options, alone and together, with one case for each kind of bad value; and phases."""

import dataclasses

import pytest

from pretrain.cli import parse
from pretrain.commands.domain import DomainOptions
from pretrain.commands.evaluate import EvaluateOptions
from pretrain.config import (
    AdaptOptions,
    Config,
    FinetuneOptions,
    length_option,
    longest,
    may_change,
    min_micro_batch_size,
    phase_ends,
    phase_lengths,
)
from pretrain.preflight import start_problems, validate

BAD = """
--mask-rate 0.1 nan
--mix 3.0 -1.0
--mask-split 0.5 0.1 0.1
--entity-probability 0.0
--entity-budget -1.0
--valid-fraction 0.6
--adam-betas 0.9 1.0
--nsp-weight -0.5
--weight-decay -0.5
--warmup -1.0
--max-grad-norm inf
--max-minutes nan
--learning-rate 0.0
--adam-epsilon -1.0
--epochs 10000000.0
--batch-size 100000000000000000000
--micro-batch-size 0
--keep 0
--log-every -1
--eval-tokens 0
--workers 257
--max-steps -1
--patience -2
--eval-batch-size -1
--seed 9223372036854775808
--max-documents -1
--max-length 7
--vocab-size 1000000000000
--config-override hidden_size=3 2=1
--eval-every often
--save-every 1.5
--split-sentences cn
--masking phrase
--optimizer sgd
--encoding base64
--phases 128:x
--phases 64:0.9 128:0.2
--phases 64:nan 128:1
""".strip().splitlines()
BAD_TOGETHER = """
--phases 64:1 --max-length 128
--micro-batch-size 4 --phases 64:.9 384:.1
--batch-size 20 --micro-batch-size 8
--batch-size 1000000007 --micro-batch-size 8
--overwrite --resume --output x
--resume
--patience 2 --valid-fraction 0.0
--precision fp16 --device cpu
--replace similar --similar x
--similar x
--lexicon x
--entity-field x
--mix 3.0 1.0 1.0 --train a b
""".strip().splitlines()
GOOD = """
--phases 64:0.3333333 128:0.3333333 256:0.3333334
--phases 64:.9 384:.1 --micro-batch-size 8
--mask-rate 0.3 0.15 --mask-split 0 0.5 0.5
--eval-every 7 --save-every epoch
--split-sentences zh
--replace similar --similar x --masking span
--masking entity --lexicon x --entity-field y
--config-override hidden_size=32 name=a=b
--mix 3 1 0.5 --train a b c --valid d
""".strip().splitlines()


@pytest.mark.parametrize("line", BAD + BAD_TOGETHER)
def test_a_bad_value_is_one_problem_with_the_option_and_the_value(line):
    (problem,) = validate(parse(line.split(), Config, ""))
    shown = problem.split(": ")[0]
    assert shown == line if line in BAD else line.startswith(shown)
    assert shown.startswith("--") and "expected" in problem


def test_a_blank_name_is_none():
    problems = validate(parse(["--lexicon", " "], Config, ""))
    assert any(problem.startswith("--lexicon  :") for problem in problems)


@pytest.mark.parametrize("line", GOOD)
def test_a_good_value_is_no_problem(line):
    assert validate(parse(line.split(), Config, "")) == []


@pytest.mark.parametrize("kind", [Config, FinetuneOptions, AdaptOptions])
def test_defaults_have_no_problem_and_cannot_be_changed(kind):
    assert validate(kind()) == [] and kind.__dataclass_params__.frozen


def test_what_decides_the_data_the_weights_or_the_update_may_not_change():
    fixed = {entry.name for entry in dataclasses.fields(Config)} - may_change(Config)
    assert {"train", "mask_rate", "batch_size", "micro_batch_size", "learning_rate"} <= fixed
    assert {"optimizer", "seed", "max_length", "phases", "eval_tokens", "model"} <= fixed


@pytest.mark.parametrize("kind", [DomainOptions, EvaluateOptions])
@pytest.mark.parametrize("name", ["lexicon", "entity_field"])
def test_what_marks_entities_is_refused_where_none_is_masked(kind, name):
    (problem,) = start_problems(kind(**{name: __file__}))
    assert problem.startswith(f"--{name.replace('_', '-')} {__file__}: ")


# Phases.


@pytest.mark.parametrize(
    ("more", "lengths", "ends"),
    [
        ("", [(128, 1.0)], [1000]),
        ("--phases 512:0.5 8:0.5", [(512, 0.5), (8, 0.5)], [500, 1000]),
        ("--phases 8:0.3333333 9:0.6666667", [(8, 0.3333333), (9, 0.6666667)], [333, 1000]),
    ],
)
def test_phases_follow_one_another(more, lengths, ends):
    config = parse(more.split(), Config, "")
    assert phase_lengths(config) == lengths and phase_ends(config, 1000) == ends
    assert length_option(config) == ("--phases" if len(lengths) > 1 else "--max-length")
    assert longest(config) == max(length for length, _ in lengths)
    room = min_micro_batch_size(config) * lengths[0][0]
    assert room - lengths[0][0] < longest(config) <= room
