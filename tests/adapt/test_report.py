"""The page that answers.

Its scores equal sklearn's on repeated rows, its intervals a slow bootstrap's, its verdict says yes
only where an interval lies above 0, its sections show what there is, and its plots are plots.
"""

import base64
import re
import warnings
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pretrain import plots
from pretrain.adapt import bootstrap, report

metrics = pytest.importorskip("sklearn.metrics")
imread = pytest.importorskip("matplotlib.image").imread
is_math_text = pytest.importorskip("matplotlib.cbook").is_math_text

METRICS = ("macro_f1", "accuracy")


def sklearn_score(truth, predicted, metric):
    """Without a list of classes sklearn leaves out those that occur nowhere."""
    if metric == "accuracy":
        return metrics.accuracy_score(truth, predicted)
    return metrics.f1_score(truth, predicted, average="macro", zero_division=0)


def slow_score(truth, predicted, metric):
    """In three lines."""
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
    """int [seeds, rows]: each right with this chance."""
    wrong = (truth + rng.integers(1, num_classes, (seeds, len(truth)))) % num_classes
    return np.where(rng.random((seeds, len(truth))) < share, truth, wrong)


@pytest.mark.parametrize("metric", METRICS)
def test_a_clear_difference_excludes_0_and_turns_with_the_sides(metric):
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 3, 200)
    worse, better = (predictions_right(rng, truth, share, 3) for share in (0.5, 0.8))
    low, high = bootstrap.bootstrap(truth, worse, better, metric)
    before, after = (
        np.mean([sklearn_score(truth, row, metric) for row in of]) for of in (worse, better)
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
    # Paired: if two encoders err alike, their difference is surer than that of separate draws.
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
CLEAR, WORSE, UNCLEAR = (0.1, 0.05, 0.15), (-0.1, -0.15, -0.05), (0.02, -0.01, 0.05)
TOUCHING, EQUAL = (0.1, 0.0, 0.2), (0.0, 0.0, 0.0)
ONLY = {  # the budgets of which something holds -> how the verdict names them
    (True, True): "",
    (True, False): " with 100 labels",
    (False, True): " with 2,000 labels",
}
OWN, ANY = "so it is this text that helps", "so more pretraining on any text may help as much"


def check_verdict(differences, control, metric="macro_f1"):
    """The verdict says of each budget what its interval says, whatever the wording."""
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
    better = tuple(gain and over[1] > 0 for gain, over in zip(gains, control or [EQUAL] * 2))
    assert (f"{OWN}{ONLY[better]}." in text) if any(better) else (OWN not in text)
    assert (ANY in text) == (bool(control) and any(gains) and not any(better))
    assert bool(rest) == bool(control) and report.METRICS[metric] in text


KINDS = {"clear": CLEAR, "worse": WORSE, "unclear": UNCLEAR, "touching": TOUCHING, "equal": EQUAL}


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("few", KINDS)
@pytest.mark.parametrize("all_rows", KINDS)
def test_the_verdict_says_what_the_intervals_say(few, all_rows, metric):
    for control in (None, (CLEAR, UNCLEAR), (WORSE, TOUCHING), (CLEAR, CLEAR)):
        check_verdict((KINDS[few], KINDS[all_rows]), control, metric)


BOUNDS = st.tuples(st.floats(-1, 1), st.floats(0, 0.5), st.floats(0, 0.5)).map(
    lambda of: (of[0], of[0] - of[1], of[0] + of[2])
)


@settings(max_examples=200, deadline=None)
@given(st.tuples(BOUNDS, BOUNDS), st.none() | st.tuples(BOUNDS, BOUNDS))
def test_yes_is_never_said_where_no_interval_lies_above_0(differences, control):
    check_verdict(differences, control)


# Tables.


def body_of(page):
    """The elements of a page, which is well-formed inside of its body."""
    return ElementTree.fromstring(re.search("<body>.*</body>", page, re.DOTALL)[0])


NAMES = ["a|b", "<b>bold</b>", "x & y", "&amp;", "<script>alert(1)</script>", "two\nlines", "正面"]
NAMES += ["|", "a||b|", "1 < 2 > 0", "*urgent*", "__init__", "`code`", "a\\|b", "a\\", "{0}"]
NAMES += ["[a](http://b.c)", "![a](http://b.c/d.png)"]


def test_cells_read_as_they_were_in_the_page(tmp_path):
    shown = report.table(["class", "number"], [[name, n] for n, name in enumerate(NAMES)], ".1f")
    body = body_of(report.to_html(shown, tmp_path))
    rows = [["".join(cell.itertext()) for cell in row] for row in body.iter("tr")]
    expected = [[name.replace("\n", " "), f"{n:.1f}"] for n, name in enumerate(NAMES)]
    assert rows == [["class", "number"], *expected]
    tags = {element.tag for element in body.iter()}
    assert not tags & {"script", "b", "em", "strong", "code", "a", "img"}


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=12))
def test_a_cell_never_opens_a_cell_a_line_or_a_tag(text):
    assert not re.search(r"[<>\n]", report.cell(text))
    header = report.table([text, "b"], []).split("\n")[0]
    assert len(re.findall(r"(?<!\\)\|", header)) == 3


# The report.


def result_of(truth, predicted, classes):
    labels = range(len(classes))
    _, _, f1, count = metrics.precision_recall_fscore_support(
        truth, predicted, labels=labels, zero_division=0
    )
    test = {metric: sklearn_score(truth, predicted, metric) for metric in METRICS}
    test["classes"] = {
        label: {"f1": f1[number], "rows": int(count[number])}
        for number, label in enumerate(classes)
    }
    test["confusion"] = metrics.confusion_matrix(truth, predicted, labels=labels).tolist()
    command = "python scripts/finetune.py --model 'a b' --max-steps=3"
    return {"test": test, "predicted": predicted, "wall_seconds": 60.0, "command": command}


def make_facts(
    classes=("pos|neg", "<b>"), control=False, budgets=BUDGETS, seeds=2, valid=True, **more
):
    """The facts of an experiment in which the adapted encoder is right more often."""
    rng, shares = np.random.default_rng(5), {"base": 0.5, "adapted": 0.9, "control": 0.6}
    encoders = list(shares)[: 2 + control]
    truth = rng.permutation(np.arange(120) % len(classes))
    scores = {name: {} for name in encoders}
    for name in encoders:
        for budget in budgets:
            predictions = predictions_right(rng, truth, shares[name], seeds, len(classes))
            scores[name][budget] = [result_of(truth, row, classes) for row in predictions]
    perplexity = {
        "before": 31234.5,
        "after": 21.5,
        "curve": [[0, 31234.5], [10, 90.0], [20, 30.25], [30, 21.5]],
        "training": [[1, 400.0], [10, 80.0], [30, 20.0]],
        "unigram": 100.0,
    }
    run = {"steps": 3000, "warmup_steps": 12, "wall_seconds": 150.0, "device": "cpu, fp32"}
    names = ["text", "task", "control"][: 2 + control]
    of_text = {"documents": 1234, "removed": 7, "task_texts": 0}
    words = {"words": 9876, "pieces_per_word": 1.25, "unknown_share": 0.015}
    overlap = {one: {other: float(one == other) for other in names} for one in names}
    perplexity |= {"control": 44.5} if control else {}
    return {
        "metric": "macro_f1",
        "budgets": budgets,
        "classes": list(classes),
        "scores": scores,
        "truth": truth,
        "seeds": seeds,
        "model": "my|<model>",
        "rows": {"train": 2000, "valid": 50, "test": 120},
        "perplexity": (perplexity if valid else {}) | {"wall_seconds": 6.0},
        "fresh_parts": [],
        "text": {name: of_text for name in names if name != "task"} | {"wall_seconds": 6.0},
        "pretraining": {
            name: run | {"command": f"python scripts/pretrain.py {name}"} for name in encoders[1:]
        },
        "overlap": {
            "words_compared": 4321,
            "overlap": overlap,
            "texts": dict.fromkeys(names, words),
            "wall_seconds": 6.0,
            "command": "python scripts/domain.py --input x",
        },
        "seen_in_training": 4,
        "command": "python scripts/adapt.py --model 'x'",
        **more,
    }


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes a report; (Markdown, page, verdict)."""

    def run(facts, drawn=False):
        monkeypatch.setattr(bootstrap, "DRAWS", 400)
        for name in () if drawn else ("overlap", "curves", "confusion"):
            monkeypatch.setattr(plots, name, lambda path, *_: path.write_bytes(path.name.encode()))
        answer = report.write_report(tmp_path, facts)
        text, page = ((tmp_path / f"report.{kind}").read_text("utf-8") for kind in ("md", "html"))
        return text, page, answer

    return run


@pytest.mark.parametrize(
    "control, valid, fresh, metric",
    [
        (False, True, [], "macro_f1"),
        (True, True, ["MLM head", "NSP head"], "accuracy"),
        (True, False, ["MLM head"], "macro_f1"),
        (False, True, ["NSP head"], "macro_f1"),
    ],
)
def test_every_section_shows_what_there_is(control, valid, fresh, metric, write, tmp_path):
    facts = make_facts(control=control, valid=valid, fresh_parts=fresh, metric=metric)
    text, page, answer = write(facts)
    assert answer.startswith("**Yes**") and text.split("\n")[2] == f"> {answer}"
    assert len(re.findall("^## ", text, re.MULTILINE)) == 7
    shown = {
        "| pretrained on the control text |": control,
        "your text minus control": control,
        "- The control text: 1,234 documents; 7 ": control,
        "- Control: ": control,
        "| pretraining, control | 2.5 |": control,
        "| 4 x fine-tuning, pretrained on the control text | 4.0 |": control,
        "python scripts/pretrain.py control": control,
        "| after the same pretraining on the control text | 44.5 |": control and valid,
        "perplexity.png": valid,
        "| after pretraining on your text | 21.5 |": valid,
        "| guessing each token by its frequency | 100.0 |": valid,
        "| before | 31,234.5 |": valid and "MLM head" not in fresh,
        "| at step 20, the first evaluation after warm-up | 30.2 |": valid and "MLM head" in fresh,
        f"no {' and no '.join(fresh)}. ": valid and "MLM head" in fresh,
        "(31,234)": valid and "MLM head" in fresh,
        "macro F1 is the mean": metric == "macro_f1",
        "Accuracy is the share": metric == "accuracy",
    }
    assert {name: name in text for name in shown} == shown
    always = [
        "- 4 of the test texts",
        "**my|&lt;model&gt;**",
        "3,000 optimizer steps",
        "10,000 bootstrap draws",
        "| the task | 9,876 | 1.25 | 1.50% |",
        "4,321 most frequent words",
        "| cleaning the text, overlap, perplexities | 0.3 |",
        "On cpu, fp32, ",
        *(run["command"] for run in (facts, facts["overlap"])),
    ]
    assert [name for name in always if name not in text] == []
    images = [image.get("src").partition("base64,") for image in body_of(page).iter("img")]
    files = re.findall(r"\((\w+\.png)\)", text)
    assert [(start, base64.b64decode(data)) for start, _, data in images] == [
        ("data:image/png;", (tmp_path / name).read_bytes()) for name in files
    ]
    assert len(files) == 3 + valid and "my|<model>" not in page
    assert not re.search(r'https?://|<link|<script|src="(?!data:image/png)|file:', page)


@pytest.mark.parametrize(
    "change, named",
    [
        (lambda facts: facts["perplexity"].update(unigram=21.4), "too short"),
        (lambda facts: facts.update(seeds=1), "one seed"),
        (lambda facts: facts["rows"].update(test=99), "99 test rows"),
        (lambda facts: facts.update(seen_in_training=300), "300 of the 500 test texts"),
        (lambda facts: facts["overlap"]["texts"].update(task={"unknown_share": 0.5}), "50%"),
    ],
)
def test_the_verdict_tells_what_qualifies_it(change, named):
    facts = make_facts(rows={"test": 500}, seen_in_training=0)
    assert report.caveats(facts) == ""
    change(facts)
    assert named in report.caveats(facts) and ", and that" not in report.caveats(facts)
    facts["perplexity"]["unigram"] = None
    assert "frequency" not in report.learned(facts)


# Plots.


def is_plot(path):
    pixels = imread(path)
    sides, colors = pixels.shape[:2], pixels[..., :3]
    return pixels.ndim == 3 and 400 <= min(sides) <= max(sides) <= 7000 and colors.std() > 0.03


@pytest.mark.parametrize(
    "more",
    [{"classes": ("正面", "负面")}, {"classes": ("$^$", "b"), "budgets": {"all": 20}, "seeds": 1}],
)
def test_plots_are_plots_whatever_the_classes(more, write, tmp_path, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text = write(make_facts(**more), drawn=True)[0]
    names = ("learning_curve", "confusion", "perplexity", "overlap")
    assert all(is_plot(tmp_path / f"{name}.png") for name in names)
    assert all(f"| {label} | " in text for label in more["classes"]) and "nan" not in text
    printed = capsys.readouterr()
    numbered = "正面" in text and not plots.chinese_fonts()
    assert printed.err == "" and ("Chinese" in printed.out) == numbered
    assert (" ± 0" in text) == (more.get("seeds") != 1)


MANY = [f"class {number}" for number in range(61)]


@pytest.mark.parametrize("classes", [["<$100", "$100-$500"], ["$^$", "b"], MANY[:60], MANY])
def test_classes_are_named_as_they_are_and_of_more_than_60_every_second(classes, tmp_path):
    path = tmp_path / "confusion.png"
    figure = plots.confusion(path, "title", {"": np.eye(len(classes), dtype=int)}, classes)
    axis = figure.axes[0]
    for labels in (axis.get_xticklabels(), axis.get_yticklabels()):
        shown = classes if len(classes) <= 60 else classes[::2]
        assert [label.get_text() for label in labels] == shown
        assert not any(of.get_parse_math() and is_math_text(of.get_text()) for of in labels)
    assert len(axis.texts) == (len(classes) ** 2 if len(classes) <= 30 else 0)
    assert is_plot(path)


def test_shades_are_shares_of_the_true_class(tmp_path):
    figure = plots.confusion(tmp_path / "c.png", "title", {"": [[3, 1], [0, 0]]}, ["a", "b"])
    axis = figure.axes[0]
    assert axis.images[0].get_array().tolist() == [[0.75, 0.25], [0, 0]]
    assert [text.get_text() for text in axis.texts] == ["75%\n3", "25%\n1", "0%\n0", "0%\n0"]
