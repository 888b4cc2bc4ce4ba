"""The report of an experiment.

Scores equal sklearn's on repeated rows, intervals equal a slow bootstrap, the verdict is "yes" only
if an interval lies above 0, and all plots are drawn. test_pipeline.py compares the tables with the
parts of an experiment.
"""

import re
import warnings
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pretrain import bootstrap, plots
from pretrain.adapt import report

metrics = pytest.importorskip("sklearn.metrics")
imread = pytest.importorskip("matplotlib.image").imread
is_math_text = pytest.importorskip("matplotlib.cbook").is_math_text

METRICS = ("macro_f1", "accuracy")


def sklearn_score(truth, predicted, metric):
    """Without a list of classes, sklearn leaves out classes that never occur."""
    if metric == "accuracy":
        return metrics.accuracy_score(truth, predicted)
    return metrics.f1_score(truth, predicted, average="macro", zero_division=0)


def slow_score(truth, predicted, metric):
    """The metric in three lines."""
    if metric == "accuracy":
        return np.mean(truth == predicted)
    f1 = []
    for label in np.union1d(truth, predicted):
        hits = np.sum((truth == label) & (predicted == label))
        f1.append(2 * hits / (np.sum(truth == label) + np.sum(predicted == label)))
    return np.mean(f1)


# Scores and intervals.


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.integers(1, 3), st.data())
@example(3, 2, None)
def test_weighted_scores_equal_sklearns_on_repeated_rows(num_classes, seeds, data):
    if data is None:  # a class that is only predicted, and one that occurs nowhere
        truth, predictions = np.array([0, 0, 1]), np.array([[0, 2, 1], [0, 0, 0]])
        weights = np.array([[1, 0, 1], [0, 3, 0]])
    else:
        rows = data.draw(st.integers(1, 12))
        rng = np.random.default_rng(data.draw(st.integers(0, 999)))
        truth, *predictions = rng.integers(0, num_classes, (seeds + 1, rows))
        predictions, weights = np.array(predictions), rng.integers(0, 4, (3, rows))
        weights[:, rng.integers(rows)] += weights.sum(1) == 0
    weights = np.vstack([weights, np.ones_like(weights[:1])])
    for metric in METRICS:
        found = bootstrap.scores_of(weights.astype(np.float32), truth, predictions, metric)
        expected = [
            [sklearn_score(np.repeat(truth, row), np.repeat(of, row), metric) for of in predictions]
            for row in weights
        ]
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def predictions_right(rng, truth, share, seeds, num_classes=3):
    """int [seeds, rows]: predictions that are each right with this probability."""
    wrong = (truth + rng.integers(1, num_classes, (seeds, len(truth)))) % num_classes
    return np.where(rng.random((seeds, len(truth))) < share, truth, wrong)


@pytest.mark.parametrize("metric", METRICS)
def test_a_clear_difference_excludes_0_and_flips_sign(metric):
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 3, 200)
    worse, better = (predictions_right(rng, truth, share, 3) for share in (0.5, 0.8))
    low, high = bootstrap.bootstrap(truth, worse, better, metric)
    before, after = (
        np.mean([slow_score(truth, row, metric) for row in of]) for of in (worse, better)
    )
    assert 0.1 < low < after - before < high < 0.5
    turned = bootstrap.bootstrap(truth, better, worse, metric)
    assert turned == pytest.approx((-high, -low), abs=2e-6)
    assert bootstrap.bootstrap(truth, worse, worse.copy(), metric) == (0.0, 0.0)
    assert bootstrap.bootstrap(truth, worse, better, metric) == (low, high)
    assert bootstrap.bootstrap(truth, worse, better, metric, seed=1) != (low, high)


@pytest.mark.parametrize("metric", METRICS)
def test_intervals_agree_with_a_slow_paired_bootstrap(metric):
    rng = np.random.default_rng(3)
    truth = rng.integers(0, 3, 60)
    left, right = (predictions_right(rng, truth, share, 2) for share in (0.6, 0.7))
    differences = []
    for _ in range(1000):
        rows, seeds = rng.integers(0, 60, 60), rng.integers(0, 2, 2)
        before, after = (
            np.mean([slow_score(truth[rows], of[seed][rows], metric) for seed in seeds])
            for of in (left, right)
        )
        differences.append(after - before)
    expected = np.percentile(differences, [2.5, 97.5])
    found = bootstrap.bootstrap(truth, left, right, metric)
    assert found == pytest.approx(expected, abs=0.025)
    # Paired: if two encoders make the same errors, their difference is more certain.
    alike = left.copy()
    alike[:, :6] = truth[:6]
    low, high = bootstrap.bootstrap(truth, left, alike, metric)
    of_one = [
        np.mean([slow_score(truth[rows], of[rows], metric) for of in left])
        for rows in rng.integers(0, 60, (300, 60))
    ]
    assert low >= 0 and high - low < 0.6 * 2 * 1.96 * 2**0.5 * np.std(of_one)


# The verdict.

BUDGETS = {"100": 100, "all": 2000}
# Intervals above 0, below, around, and touching it.
KINDS = [(0.1, 0.05, 0.15), (-0.1, -0.15, -0.05), (0.02, -0.01, 0.05), (0.1, 0, 0.2), (0, 0, 0)]
ONLY = {  # the budgets of which something holds -> how the verdict names them
    (True, True): "",
    (True, False): " with 100 labels",
    (False, True): " with 2,000 labels",
}
OWN, ANY = "so it is this text that helps", "so more pretraining on any text may help as much"
BOUNDS = st.tuples(st.floats(-1, 1), st.floats(0, 0.5), st.floats(0, 0.5)).map(
    lambda of: (of[0], of[0] - of[1], of[0] + of[2])
)
PAIRS = st.tuples(*2 * [st.sampled_from(KINDS) | BOUNDS])


@settings(max_examples=400, deadline=None)
@given(PAIRS, st.none() | PAIRS, st.sampled_from(METRICS))
def test_the_verdict_says_what_the_intervals_say(differences, control, metric):
    """It is "yes" only if an interval lies above 0."""
    found = {"base": dict(zip(BUDGETS, differences))}
    if control:
        found["control"] = dict(zip(BUDGETS, control))
    text = report.verdict(found, BUDGETS, metric)
    gains = tuple(low > 0 for _, low, _ in differences)
    losses = tuple(high < 0 for _, _, high in differences)
    unclear = tuple(not gain and not loss for gain, loss in zip(gains, losses))
    assert text.startswith(f"**Yes{ONLY[gains]}**: " if any(gains) else "**No**: ")
    effects = {" helped ": gains, " hurt ": losses, " made no clear difference ": unclear}
    answer, _, rest = text.partition(" Compared with ")
    for effect, holds in effects.items():
        assert (effect in answer) == any(holds)
        clause = answer.partition(effect)[2].partition(". It ")[0]
        assert [f"with {n:,} labels" in clause for n in BUDGETS.values()] == list(holds)
    for shown, of in ((answer, differences), (rest, control or ())):
        for value, low, high in of:
            assert f"{value:+.3f} ({low:+.3f} to {high:+.3f}) with " in shown
    better = (False, False)
    if control:
        better = tuple(gain and low > 0 for gain, (_, low, _) in zip(gains, control))
    assert (f"{OWN}{ONLY[better]}." in text) if any(better) else (OWN not in text)
    assert (ANY in text) == (bool(control) and any(gains) and not any(better))
    assert bool(rest) == bool(control) and report.METRICS[metric] in text


# Tables.


def body_of(page):
    """The elements of a page, whose body must be well-formed."""
    return ElementTree.fromstring(re.search("<body>.*</body>", page, re.DOTALL)[0])


NAMES = ["a|b", "<b>bold</b>", "x & y", "&amp;", "<script>alert(1)</script>", "two\nlines", "正面"]
NAMES += ["|", "a||b|", "1 < 2 > 0", "*urgent*", "__init__", "`code`", "a\\|b", "a\\", "{0}"]
NAMES += ["[a](http://b.c)", "![a](http://b.c/d.png)"]


def test_the_page_shows_cells_verbatim(tmp_path):
    shown = report.table(["class", "number"], [[name, n] for n, name in enumerate(NAMES)], ".1f")
    body = body_of(report.to_html(shown, tmp_path))
    rows = [["".join(cell.itertext()) for cell in row] for row in body.iter("tr")]
    expected = [[name.replace("\n", " "), f"{n:.1f}"] for n, name in enumerate(NAMES)]
    assert rows == [["class", "number"], *expected]
    assert "not finite" in report.table(["number"], [[None]], ",.1f")
    tags = {element.tag for element in body.iter()}
    assert not tags & {"script", "b", "em", "strong", "code", "a", "img"}


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=12))
def test_a_cell_never_starts_a_cell_a_line_or_a_tag(text):
    assert not re.search(r"[<>\n]", report.cell(text))
    header = report.table([text, "b"], []).split("\n")[0]
    assert len(re.findall(r"(?<!\\)\|", header)) == 3


@pytest.mark.parametrize(
    "change, named",
    [
        ({}, ""),
        ({"perplexity": {"after": 21.5, "unigram": 21.4}}, "too short"),
        ({"perplexity": {}}, ""),
        ({"seeds": 1}, "one seed"),
        ({"rows": {"test": 99}}, "99 test rows"),
        ({"seen_in_training": 300}, "300 of the 500 test texts"),
        ({"unknown_share": 0.5}, "50%"),
        ({"task": 0.96}, "96%"),
        ({"best_steps": [9, 9]}, "2 of the 2 fine-tuning runs"),
        ({"best_steps": [9, 9], "macro_f1": 1.0}, ""),
        ({"predicted": [1, 1, 1]}, "2 of the 2 fine-tuned models"),
    ],
)
def test_the_verdict_includes_warnings(change, named):
    facts = {"seeds": 2, "rows": {"test": 500}, "seen_in_training": 0, "unknown_share": 0.015}
    facts |= {"perplexity": {"after": 21.5, "unigram": 100.0}, "task": 0.5} | change
    texts = {"text": {"unknown_share": 0.0}, "task": {"unknown_share": facts["unknown_share"]}}
    facts = {"best_steps": [9, 6], "macro_f1": 0.5, "predicted": [0, 1, 1]} | facts
    runs = [
        {"steps": 9, "best_step": step, "valid": facts, "predicted": facts["predicted"]}
        for step in facts["best_steps"]
    ]
    facts |= {"metric": "macro_f1", "scores": {"base": {"all": runs}}}
    facts["overlap"] = {"texts": texts, "overlap": {"text": {"task": facts["task"]}}}
    found = report.caveats(facts)
    assert named in found and ", and that" not in found and bool(found) == bool(named)


# Plots.


def is_plot(path):
    pixels = imread(path)
    sides, colors = pixels.shape[:2], pixels[..., :3]
    return pixels.ndim == 3 and 400 <= min(sides) <= max(sides) <= 7000 and colors.std() > 0.03


@pytest.mark.parametrize("names", [["正面", "负面"], ["$^$", "b"]])
def test_plots_work_with_any_names(names, tmp_path, capsys):
    paths = [tmp_path / f"{number}.png" for number in range(4)]
    points = [[1, 10, 30], [400.0, 80.0, 20.0], None]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plots.confusion(paths[0], "title", {"a": [[3, 1], [0, 0]], "b": np.eye(2)}, names)
        plots.overlap(paths[1], names, np.eye(2), 50)
        plots.curves(paths[2], "title", ("x", "y"), {"a": ([20], [0.5], [0.0])}, {"b": 0.3})
        plots.curves(paths[3], "title", ("x", "y"), {"a": points}, {"b": 100.0}, "y")
    assert all(map(is_plot, paths))
    printed = capsys.readouterr()
    numbered = "正面" in names and not plots.chinese_fonts()
    assert printed.err == "" and ("Chinese" in printed.out) == numbered


@pytest.mark.parametrize("classes", [["<$100", "$100-$500"], ["$^$", "b"], list("abcdefg")])
def test_class_labels_are_verbatim_and_thinned_if_many(classes, tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "MAX_NUMBERED", 3)
    monkeypatch.setattr(plots, "MAX_NAMED", 6)
    path = tmp_path / "confusion.png"
    figure = plots.confusion(path, "title", {"": np.eye(len(classes), dtype=int)}, classes)
    axis = figure.axes[0]
    for labels in (axis.get_xticklabels(), axis.get_yticklabels()):
        shown = classes if len(classes) <= 6 else classes[::2]
        assert [label.get_text() for label in labels] == shown
        assert not any(of.get_parse_math() and is_math_text(of.get_text()) for of in labels)
    assert len(axis.texts) == (len(classes) ** 2 if len(classes) <= 3 else 0)
    assert is_plot(path)


@pytest.mark.parametrize("log_axis", ["", "x", "y"])
def test_one_point_has_one_tick_at_a_whole_number(log_axis, tmp_path):
    series = {name: ([100], [0.5], [0.0]) for name in "abc"}
    figure = plots.curves(tmp_path / "c.png", "title", ("x", "y"), series, {"d": 0.3}, log_axis)
    (axis,) = figure.axes
    low, high = axis.get_xlim()
    assert [tick.get_text() for tick in axis.get_xticklabels()] == ["100"]
    assert low < 95 and 105 < high < 200 and axis.get_xticks(minor=True).tolist() == []


def test_ticks_of_steps_are_whole_numbers(tmp_path):
    series = {"a": ([0, 2], [0.5, 0.6], None)}
    figure = plots.curves(tmp_path / "c.png", "title", ("x", "y"), series, {})
    ticks = figure.axes[0].get_xticks()
    assert len(ticks) > 2 and (ticks == ticks.round()).all()


def test_shades_are_shares_of_the_true_class(tmp_path):
    figure = plots.confusion(tmp_path / "c.png", "title", {"": [[3, 1], [0, 0]]}, ["a", "b"])
    axis = figure.axes[0]
    assert axis.images[0].get_array().tolist() == [[0.75, 0.25], [0, 0]]
    assert [text.get_text() for text in axis.texts] == ["75%\n3", "25%\n1", "0%\n0", "0%\n0"]
