"""What an experiment compares: the scores of weighted outcomes equal slow forms on the repeated
rows, and intervals equal those of a slow paired bootstrap."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pretrain import bootstrap
from pretrain.config import TASK_METRICS
from pretrain.finetune.tasks import TASKS

stats = pytest.importorskip("scipy.stats")  # comes with sklearn

METRICS = [(task, metric) for task, names in TASK_METRICS.items() for metric in names]
ONE_EACH = [(task, names[0]) for task, names in TASK_METRICS.items()]
LABELS = ["LOC", "ORG", "PER"]


def take(values, rows):
    return [values[row] for row in rows]


# Slow forms.


def f1_of(given, found):
    """F1 of two sets."""
    return 2 * len(given & found) / max(1, len(given) + len(found))


def slow_entities(truth, predicted, metric):
    """From sets of the entities of all texts, each with the number of its text."""

    def as_set(texts):
        return {(text, *entity) for text, entities in enumerate(texts) for entity in entities}

    given, found = as_set(truth), as_set(predicted)
    if metric == "f1":
        return f1_of(given, found)
    f1 = []
    for label in {label for *_, label in given | found}:
        both = ({entity for entity in of if entity[-1] == label} for of in (given, found))
        f1.append(f1_of(*both))
    return np.mean(f1 or [0.0])


def slow_classes(truth, predicted, metric):
    truth, predicted = np.array(truth), np.array(predicted)
    if metric == "accuracy":
        return np.mean(truth == predicted)
    if metric == "matthews":  # the covariance of indicators, summed over classes
        size = max(truth.max(), predicted.max()) + 1
        left, right = (np.eye(size)[of] - np.eye(size)[of].mean(0) for of in (truth, predicted))
        scale = np.sqrt((left**2).sum() * (right**2).sum())
        return (left * right).sum() / scale if scale > 1e-12 else 0.0
    f1 = []
    for label in np.union1d(truth, predicted):
        hits = np.sum((truth == label) & (predicted == label))
        f1.append(2 * hits / (np.sum(truth == label) + np.sum(predicted == label)))
    return np.mean(f1)


def slow_numbers(truth, predicted, metric):
    """0 if one of the two is constant."""
    if min(len(set(truth)), len(set(predicted))) < 2:
        return 0.0
    pearson = np.corrcoef(truth, predicted)[0, 1]
    spearman = np.corrcoef(stats.rankdata(truth), stats.rankdata(predicted))[0, 1]
    scores = {"pearson": pearson, "spearman": spearman, "correlation": (pearson + spearman) / 2}
    return scores[metric]


SLOW = {"classification": slow_classes, "ner": slow_entities, "regression": slow_numbers}


# Cases.


def draw_entities(rng, count):
    """Entities of `count` texts of 8 characters, without overlap."""
    found = []
    for _ in range(count):
        bounds = np.sort(rng.choice(9, 2 * rng.integers(0, 4), replace=False)).reshape(-1, 2)
        found.append([[*map(int, of), LABELS[rng.integers(3)]] for of in bounds])
    return found


def draw_case(task, rng, count):
    """(true, predicted) for `count` rows: a prediction is right with a probability of a half."""
    is_right = rng.random(count) < 0.5
    if task == "ner":
        truth, other = draw_entities(rng, count), draw_entities(rng, count)
    elif task == "classification":
        truth, other = rng.integers(0, 3, (2, count)).tolist()
    else:  # few values, so that some draws are constant, and some have equal numbers
        truth, other = (rng.integers(1, 5, (2, count)) * 0.1).tolist()
    return truth, [a if right else b for a, b, right in zip(truth, other, is_right)]


@pytest.mark.parametrize("task, metric", METRICS)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 9999), num_rows=st.integers(1, 9))
@example(seed=0, num_rows=1)
def test_weighted_scores_are_those_of_the_repeated_rows(task, metric, seed, num_rows):
    rng = np.random.default_rng(seed)
    truth, predicted = draw_case(task, rng, num_rows)
    weights = rng.integers(0, 4, (4, num_rows))
    weights[:, rng.integers(num_rows)] += weights.sum(1) == 0
    weights[0] = 1
    outcomes = TASKS[task].outcomes(truth, predicted, LABELS)
    found = TASKS[task].metrics[metric].score(weights.astype(np.float32), outcomes)
    for score, counts in zip(found, weights, strict=True):
        rows = np.repeat(np.arange(num_rows), counts)
        repeated = take(truth, rows), take(predicted, rows)
        assert score == pytest.approx(SLOW[task](*repeated, metric), abs=1e-6)


# Intervals.


def better_and_worse(task, rng, num_rows, seeds):
    """(truth, predictions of each seed of two encoders); the second repairs a third of the rows."""
    truth, _ = draw_case(task, rng, num_rows)
    worse, better = [], []
    for _ in range(seeds):
        _, other = draw_case(task, rng, num_rows)
        keep, repair = rng.random(num_rows) < 0.4, rng.random(num_rows) < 0.5
        worse.append([a if is_kept else b for a, b, is_kept in zip(truth, other, keep)])
        better.append([a if is_kept else b for a, b, is_kept in zip(truth, other, keep | repair)])
    return truth, worse, better


def interval(task, metric, truth, left, right, **more):
    of_task = TASKS[task]

    def outcomes(side):
        return np.stack([of_task.outcomes(truth, predicted, LABELS) for predicted in side])

    sides = outcomes(left), outcomes(right)
    return bootstrap.bootstrap(of_task.metrics[metric].score, *sides, **more)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(bootstrap, "DRAWS", 2000)


@pytest.mark.parametrize("task, metric", ONE_EACH)
def test_a_clear_difference_excludes_0_and_flips_sign(task, metric, quick):
    truth, worse, better = better_and_worse(task, np.random.default_rng(0), 200, 2)
    low, high = interval(task, metric, truth, worse, better)
    before, after = (
        np.mean([SLOW[task](truth, of, metric) for of in side]) for side in (worse, better)
    )
    assert 0.1 < low < after - before < high < 0.5
    turned = interval(task, metric, truth, better, worse)
    assert turned == pytest.approx((-high, -low), abs=2e-6)
    assert interval(task, metric, truth, worse, worse) == (0.0, 0.0)
    assert interval(task, metric, truth, worse, better) == (low, high)
    assert interval(task, metric, truth, worse, better, seed=1) != (low, high)


@pytest.mark.parametrize("task, metric", ONE_EACH)
def test_intervals_agree_with_a_slow_paired_bootstrap(task, metric, quick):
    rng, slow, num_rows = np.random.default_rng(3), SLOW[task], 60
    truth, left, right = better_and_worse(task, rng, num_rows, 2)

    def mean_score(side, rows, seeds):
        of_rows = take(truth, rows)
        return np.mean([slow(of_rows, take(side[seed], rows), metric) for seed in seeds])

    differences = []
    for _ in range(600):
        draw = rng.integers(0, num_rows, num_rows), rng.integers(0, 2, 2)
        differences.append(mean_score(right, *draw) - mean_score(left, *draw))
    expected = np.percentile(differences, [2.5, 97.5])
    tolerance = 0.1 * (expected[1] - expected[0])
    assert interval(task, metric, truth, left, right) == pytest.approx(expected, abs=tolerance)
    # Paired: if two encoders make the same errors, their difference is more certain.
    alike = [truth[:6] + side[6:] for side in left]
    low, high = interval(task, metric, truth, left, alike)
    draws = rng.integers(0, num_rows, (200, num_rows))
    of_one = [mean_score(left, rows, (0, 1)) for rows in draws]
    assert low >= 0 and high - low < 0.6 * 2 * 1.96 * 2**0.5 * np.std(of_one)
