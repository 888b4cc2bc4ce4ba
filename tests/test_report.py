"""The page that answers: its scores equal sklearn's on repeated rows, its intervals a slow bootstrap's, its verdict says yes only where an
interval lies above 0, its sections tell what was there to tell, and its pictures are pictures."""
import base64
import re
import warnings
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pretrain import pictures, report, significance

metrics = pytest.importorskip("sklearn.metrics")
imread = pytest.importorskip("matplotlib.image").imread
is_math_text = pytest.importorskip("matplotlib.cbook").is_math_text

METRICS = ("macro_f1", "accuracy")


def sklearn_score(truth, predicted, metric):
    """Classes that are neither there nor predicted are left out, as sklearn does where it is given no list of them."""
    if metric == "accuracy":
        return metrics.accuracy_score(truth, predicted)
    return metrics.f1_score(truth, predicted, average="macro", zero_division=0)


# Scores and intervals.

@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.integers(1, 3), st.data())
@example(3, 2, None)
def test_weighted_scores_equal_sklearns_on_repeated_rows(num_classes, seeds, data):
    if data is None:  # a class that is predicted only, and one that is nowhere
        truth, predictions, weights = np.array([0, 0, 1]), np.array([[0, 2, 1], [0, 0, 0]]), np.array([[1, 0, 1], [0, 3, 0]])
    else:
        rows = data.draw(st.integers(1, 12))
        draw = np.random.default_rng(data.draw(st.integers(0, 999)))
        truth, predictions = draw.integers(0, num_classes, rows), draw.integers(0, num_classes, (seeds, rows))
        weights = draw.integers(0, 4, (3, rows))
        weights[:, draw.integers(rows)] += weights.sum(1) == 0
    weights = np.vstack([weights, np.ones_like(weights[:1])])
    for metric in METRICS:
        found = significance.scores_of(weights.astype(np.float32), truth, predictions, num_classes, metric)
        expected = [[sklearn_score(np.repeat(truth, row), np.repeat(of, row), metric) for of in predictions] for row in weights]
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def predictions_right(draw, truth, share, seeds, num_classes=3):
    """int [seeds, rows]: each right with this chance."""
    wrong = (truth + draw.integers(1, num_classes, (seeds, len(truth)))) % num_classes
    return np.where(draw.random((seeds, len(truth))) < share, truth, wrong)


@pytest.mark.parametrize("metric", METRICS)
def test_a_clear_difference_excludes_0_and_turns_with_the_sides(metric):
    draw = np.random.default_rng(0)
    truth = draw.integers(0, 3, 200)
    worse, better = (predictions_right(draw, truth, share, 3) for share in (0.5, 0.8))
    low, high = significance.bootstrap(truth, worse, better, 3, metric)
    gain = np.mean([sklearn_score(truth, row, metric) for row in better]) - np.mean([sklearn_score(truth, row, metric) for row in worse])
    assert 0.1 < low < gain < high < 0.5 and significance.bootstrap(truth, worse, worse.copy(), 3, metric) == (0.0, 0.0)
    assert significance.bootstrap(truth, better, worse, 3, metric) == pytest.approx((-high, -low), abs=2e-6)
    other = significance.bootstrap(truth, worse, better, 3, metric, seed=1)
    assert significance.bootstrap(truth, worse, better, 3, metric) == (low, high) != other


@pytest.mark.parametrize("metric", METRICS)
def test_intervals_agree_with_a_slow_paired_bootstrap(metric):
    draw = np.random.default_rng(3)
    truth = draw.integers(0, 3, 60)
    left, right = predictions_right(draw, truth, 0.6, 2), predictions_right(draw, truth, 0.7, 2)
    differences = []
    for _ in range(1000):
        rows, seeds = draw.integers(0, 60, 60), draw.integers(0, 2, 2)
        scores = [np.mean([_score(truth[rows], of[seed][rows], metric) for seed in seeds]) for of in (left, right)]
        differences.append(scores[1] - scores[0])
    expected = np.percentile(differences, [2.5, 97.5])
    assert significance.bootstrap(truth, left, right, 3, metric) == pytest.approx(expected, abs=0.025)
    # Paired: of encoders that err alike the difference is surer than two that are drawn apart would make it.
    alike = left.copy()
    alike[:, :6] = truth[:6]
    low, high = significance.bootstrap(truth, left, alike, 3, metric)
    of_one = np.std([np.mean([_score(truth[rows], of[rows], metric) for of in left]) for rows in draw.integers(0, 60, (300, 60))])
    assert low >= 0 and high - low < 0.6 * 2 * 1.96 * 2**0.5 * of_one


def _score(truth, predicted, metric):
    """In three lines."""
    if metric == "accuracy":
        return np.mean(truth == predicted)
    return np.mean([2 * np.sum((truth == label) & (predicted == label)) / (np.sum(truth == label) + np.sum(predicted == label))
                    for label in np.union1d(truth, predicted)])


# The verdict.

YES = ": further pretraining on this text helped this task, with 100 labels"
HELPED = "+0.100 macro F1 (95 % interval +0.050 to +0.150)"
CLEAR, WORSE, UNCLEAR, TOUCHING = (0.1, 0.05, 0.15), (-0.1, -0.15, -0.05), (0.02, -0.01, 0.05), (0.1, 0.0, 0.2)
BUDGETS = {"100": 100, "all": 2000}
NOTHING = "nothing shows that it is this text that matters, rather than more pretraining on any"
NOT_SHOWN = "**No**: that further pretraining on this text helps this task could not be shown, with 100 labels"


@pytest.mark.parametrize("few, all_rows, start, more", [
    (CLEAR, CLEAR, f"**Yes**{YES} {HELPED}; with 2,000 labels {HELPED}.", ""),
    (CLEAR, UNCLEAR, f"**Yes with 100 labels**{YES} {HELPED}.",
     " No difference could be shown with 2,000 labels +0.020 macro F1 (95 % interval -0.010 to +0.050); 0 lies within."),
    (CLEAR, WORSE, f"**Yes with 100 labels**{YES} {HELPED}.",
     " It made it worse with 2,000 labels -0.100 macro F1 (95 % interval -0.150 to -0.050)."),
    (UNCLEAR, WORSE, "**No**: further pretraining on this text made this task worse, with 2,000 labels",
     " No difference could be shown with 100 labels"),
    (UNCLEAR, UNCLEAR, f"{NOT_SHOWN} +0.020", "; 0 lies within."), (TOUCHING, TOUCHING, f"{NOT_SHOWN} +0.100", "; 0 lies within."),
    ((0.0, 0.0, 0.0), (0.0, 0.0, 0.0), f"{NOT_SHOWN} +0.000", "; 0 lies within."),
], ids=["yes", "yes and unclear", "mixed", "worse", "unclear", "touching 0", "equal"])
def test_the_verdict_says_what_the_intervals_say(few, all_rows, start, more):
    text = report.verdict({"100": few, "all": all_rows}, None, BUDGETS, "macro_f1")
    assert text.startswith(start) and more in text and "control" not in text


@pytest.mark.parametrize("few, all_rows, end", [
    (CLEAR, CLEAR, "; so it is this text that helps."),
    (UNCLEAR, CLEAR, "; so it is this text that helps with 2,000 labels."),
    (UNCLEAR, TOUCHING, f"; so {NOTHING}."), (WORSE, WORSE, f"; so {NOTHING}."),
], ids=["text", "text in part", "unclear", "worse"])
def test_the_verdict_weighs_the_control(few, all_rows, end):
    text = report.verdict({"100": CLEAR, "all": CLEAR}, {"100": few, "all": all_rows}, BUDGETS, "accuracy")
    assert text.startswith("**Yes**") and text.endswith(end) and text.count("; so ") == 1
    assert f"Against the same pretraining on the control text: with 100 labels {few[0]:+.3f} accuracy (95 % interval {few[1]:+.3f}" in text


BOUNDS = st.tuples(st.floats(-1, 1), st.floats(0, 0.5), st.floats(0, 0.5)).map(lambda of: (of[0], of[0] - of[1], of[0] + of[2]))


@settings(max_examples=200, deadline=None)
@given(BOUNDS, BOUNDS, st.none() | st.tuples(BOUNDS, BOUNDS))
@example(UNCLEAR, UNCLEAR, (CLEAR, CLEAR))
@example(CLEAR, UNCLEAR, (UNCLEAR, CLEAR))
def test_yes_is_never_said_where_no_interval_lies_above_0(few, all_rows, control):
    text = report.verdict({"100": few, "all": all_rows}, control and dict(zip(BUDGETS, control)), BUDGETS, "macro_f1")
    gains = [of[1] > 0 for of in (few, all_rows)]
    labels = {(True, True): "", (True, False): " with 100 labels", (False, True): " with 2,000 labels", (False, False): None}
    assert text.startswith(f"**Yes{labels[tuple(gains)]}**" if any(gains) else "**No**")
    helped = text.split("helped this task, ")[1].split("). ")[0].split(").")[0] if "**Yes" in text else ""
    assert [f"with {count:,} labels" in helped for count in BUDGETS.values()] == gains
    assert ("worse" in text) == (min(few[2], all_rows[2]) < 0)
    better = tuple(gain and over[1] > 0 for gain, over in zip(gains, control or ((0, 0, 0),) * 2))  # where the text helped
    assert ("it is this text that helps" in text) == any(better) and (NOTHING in text) == (bool(control) and any(gains) and not any(better))
    assert ("control" in text) == (control is not None)
    assert control is None or text.endswith(f"that helps{labels[better]}." if any(better) else f"{NOTHING}." if any(gains) else ").")
    assert all(f"with {count:,} labels {of[0]:+.3f}" in text for count, of in zip(BUDGETS.values(), (few, all_rows)))


# Tables.

class Page(HTMLParser):
    """Cells of each row, attributes of pictures, names of all tags."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.pictures, self.tags, self.inside = [], [], set(), False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.inside = True
            self.rows[-1].append("")
        if tag == "img":
            self.pictures.append(dict(attributes))

    def handle_endtag(self, tag):
        self.inside &= tag not in ("td", "th")

    def handle_data(self, text):
        if self.inside:
            self.rows[-1][-1] += text


NAMES = ["a|b", "<b>bold</b>", "x & y", "&amp;", "<script>alert(1)</script>", "two\nlines", "正面", "|", "a||b|", "1 < 2 > 0", "*urgent*",
         "__init__", "`code`", "a\\|b", "a\\", "[a](http://b.c)", "![a](http://b.c/d.png)"]


def test_cells_read_as_they_were_in_the_page(tmp_path):
    shown = report.table(["class", "number"], [[name, number] for number, name in enumerate(NAMES)])
    page = Page(report.to_html(shown, tmp_path))
    assert page.rows == [["class", "number"], *([name.replace("\n", " "), str(number)] for number, name in enumerate(NAMES))]
    assert not page.tags & {"script", "b", "em", "strong", "code", "a", "img"}


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=12))
def test_a_cell_never_opens_a_cell_a_line_or_a_tag(text):
    assert not re.search(r"[<>\n]", report.cell(text)) and len(re.findall(r"(?<!\\)\|", report.table([text, "b"], []).split("\n")[0])) == 3


# The report.

def result_of(truth, predicted, classes):
    labels = range(len(classes))
    precision, recall, f1, count = metrics.precision_recall_fscore_support(truth, predicted, labels=labels, zero_division=0)
    return {"test": {"accuracy": metrics.accuracy_score(truth, predicted), "macro_f1": sklearn_score(truth, predicted, "macro_f1"),
                     "classes": {label: {"f1": f1[number], "rows": int(count[number])} for number, label in enumerate(classes)},
                     "confusion": metrics.confusion_matrix(truth, predicted, labels=labels).tolist()},
            "seconds": 2.0, "wall_seconds": 3.0, "command": "python scripts/finetune.py --model 'a b' --max-steps=3"}


def make_facts(classes=("pos|neg", "<b>"), encoders=("base", "adapted"), budgets=BUDGETS, seeds=2, held_out=True, fresh=(),
               metric="macro_f1"):
    """(facts, truth, predictions) of an experiment in which the adapted encoder is right more often."""
    draw, share = np.random.default_rng(5), {"base": 0.5, "adapted": 0.9, "control": 0.6}
    truth = draw.permutation(np.arange(120) % len(classes))
    predictions = {name: {budget: predictions_right(draw, truth, share[name], seeds, len(classes)) for budget in budgets}
                   for name in encoders}
    scores = {name: {budget: [result_of(truth, row, classes) for row in rows] for budget, rows in of.items()}
              for name, of in predictions.items()}
    perplexity = {"before": 31234.5, "after": 21.5, "curve": [[0, 31234.5], [10, 90.0], [20, 30.25], [30, 21.5]],
                  "training": [[1, 400.0], [10, 80.0], [30, 20.0]], "unigram": 100.0, "wall_seconds": 1.0}
    perplexity |= ({"control": 44.5} if "control" in encoders else {})
    names = ["pretraining text", "task", "control text"][:len(encoders)]
    of_text = {"documents": 1234, "removed": 0, "task_texts": 0}
    return {"metric": metric, "budgets": budgets, "classes": list(classes), "scores": scores, "seeds": seeds, "model": "my|<model>",
            "rows": {"train": 2000, "valid": 50, "test": 120}, "perplexity": perplexity if held_out else {"wall_seconds": 1.0},
            "fresh_parts": list(fresh),
            "text": {"text": of_text} | ({"control": of_text | {"removed": 7}} if "control" in encoders else {}), "text_seconds": 1.0,
            "pretraining": {name: {"steps": 30, "warmup_steps": 12, "seconds": 140.0, "wall_seconds": 150.0, "device": "cpu, fp32",
                                   "command": f"python scripts/pretrain.py {name}"} for name in encoders[1:]},
            "overlap": {"names": names, "shares": np.eye(len(names)).tolist(), "words": 4321, "wall_seconds": 1.0,
                        "command": "python scripts/domain.py --input x", "texts": {
                name: {"words": 9876, "pieces_per_word": 1.25, "unknown_share": 0.015} for name in names}},
            "seen_in_training": 4 if held_out else 0, "command": "python scripts/adapt.py --model 'x'"}, truth, predictions


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes a report; (Markdown, page, verdict)."""
    def write(drawn=False, **more):
        monkeypatch.setattr(significance, "DRAWS", 400)
        for name in () if drawn else ("overlap", "curves", "confusion"):
            monkeypatch.setattr(pictures, name, lambda path, *_, **__: path.write_bytes(path.name.encode()))
        facts, truth, predictions = make_facts(**more)
        answer = report.write_report(tmp_path, facts, truth, predictions)
        return (*((tmp_path / f"report.{kind}").read_text(encoding="utf-8") for kind in ("md", "html")), answer)
    return write


ALWAYS = ["What was done", "Does it help the task?", "Which classes?", "Has it learnt the text?", "How near are the texts?", "Time",
          "Commands"]


@pytest.mark.parametrize("encoders, held_out, fresh, metric", [
    (("base", "adapted"), True, (), "macro_f1"), (("base", "adapted", "control"), True, ("MLM head", "NSP head"), "accuracy"),
    (("base", "adapted", "control"), False, ("MLM head",), "macro_f1"), (("base", "adapted"), True, ("NSP head",), "macro_f1"),
], ids=["plain", "control, fresh head", "control, nothing held out", "fresh NSP head"])
def test_every_section_shows_what_there_is(encoders, held_out, fresh, metric, write, tmp_path):
    text, page, answer = write(encoders=encoders, held_out=held_out, fresh=fresh, metric=metric)
    assert answer.startswith("**Yes**") and text.split("\n")[2] == f"> {answer}" and re.findall("^## (.*)", text, re.MULTILINE) == ALWAYS
    with_control = "control" in encoders
    for told in ("| pretrained on the control text |", "your text less control (95 % interval)", "- Control: the same encoder",
                 "| pretraining, control | 2.5 min |", "7 exact copies of test texts were removed",
                 "| 4 times fine-tuning, pretrained on the control text | 12 s |", "python scripts/pretrain.py control",
                 "Against the same pretraining on the control text"):
        assert (told in text) is with_control, told
    assert ("after the same pretraining on the control text | 44.5 |" in text) is (with_control and held_out)
    assert ("No text was held out" in text) is not held_out and ("perplexity.png" in text) is held_out
    assert ("means nothing" in text) is (held_out and "MLM head" in fresh)
    if held_out and "MLM head" in fresh:
        assert "| at step 20, the first held-out value after warm-up | 30.2 |" in text
        assert f"came without {' and '.join(fresh)} (what" in text and "(31,234)" in text and "\n| before |" not in text
    elif held_out:
        assert "| before | 31,234.5 |" in text
    assert ("| after pretraining on your text | 21.5 |" in text) is ("| guessing each token by its frequency | 100.0 |" in text) is held_out
    assert "pretraining was too short" not in text and ("4 of the test texts are among the training rows" in text) is held_out
    assert "bootstrap draws of test rows and seeds" in text and "python scripts/domain.py --input x" in text
    assert "| cleaning the text, overlap, perplexities | 3 s |" in text and "On cpu, fp32 (" in text
    assert {"macro_f1": "macro F1 is the mean", "accuracy": "Accuracy is the share"}[metric] in text and "it held no exact copy" in text
    assert "**my|&lt;model&gt;**" in text and "1,234 documents" in text and "(30 optimizer steps)" in text
    assert "| task | 9,876 | 1.25 | 1.50% |" in text and "their 4,321 most frequent words" in text
    shown = Page(page)
    assert len(shown.pictures) == 3 + held_out and all(picture["src"].startswith("data:image/png;base64,") for picture in shown.pictures)
    files = {(tmp_path / name).read_bytes() for name in re.findall(r"\((\w+\.png)\)", text)}
    assert {base64.b64decode(picture["src"].split(",")[1]) for picture in shown.pictures} == files
    assert not re.search(r'https?://|<link|<script|src="(?!data:image/png)|file:', page) and "my|<model>" not in page


@pytest.mark.parametrize("change, told", [
    (lambda facts: facts["perplexity"].update(unigram=21.4), "pretraining was too short"),
    (lambda facts: facts.update(seeds=1), "one seed alone was tried"),
    (lambda facts: facts["rows"].update(test=99), "99 test rows are few"),
    (lambda facts: facts.update(seen_in_training=300), "300 of the 500 test texts are among the training rows"),
    (lambda facts: facts["overlap"]["texts"]["task"].update(unknown_share=0.5), "does not know 50% of the words"),
], ids=["short", "one seed", "few rows", "seen", "unknown words"])
def test_the_verdict_tells_what_to_mind(change, told):
    facts = make_facts()[0]
    facts["rows"]["test"], facts["seen_in_training"] = 500, 0
    assert report.caveats(facts) == []
    change(facts)
    (line,) = report.caveats(facts)
    assert line.startswith("Mind that ") and told in line
    facts["perplexity"]["unigram"] = None
    assert "guessing by frequency" not in report.perplexity_section(facts)


@pytest.mark.parametrize("more", [
    {"classes": ("正面", "负面", "中性")}, {"classes": ("$^$", "b"), "budgets": {"all": 20}, "seeds": 1}], ids=["Chinese", "one budget"])
def test_pictures_are_pictures_whatever_the_classes(more, write, tmp_path, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text = write(drawn=True, **more)[0]
    for name in ("learning_curve", "confusion", "perplexity", "overlap"):
        pixels = imread(tmp_path / f"{name}.png")
        assert pixels.ndim == 3 and all(400 <= side <= 7000 for side in pixels.shape[:2]) and pixels[..., :3].std() > 0.03
    assert all(f"| {label} | " in text for label in make_facts(**more)[0]["classes"])
    told = capsys.readouterr()
    assert told.err == "" and ("pictures number what has a Chinese name" in told.out) is ("正面" in text and not pictures._chinese_fonts())
    if more.get("seeds") == 1:
        assert " ± 0" not in text and "nan" not in text and "1 seed " in text


@pytest.mark.parametrize("classes", [["<$100", "$100-$500"], ["$^$", "b"], [f"class {number}" for number in range(60)],
                                     [f"class {number}" for number in range(61)]], ids=["prices", "no formula", "60", "61"])
def test_names_of_classes_are_shown_as_they_are_and_of_more_than_60_every_second(classes):
    figure, (axis,) = pictures._figure(4, 4)
    pictures._matrix(axis, np.eye(len(classes)), np.eye(len(classes)), classes)
    for labels in (axis.get_xticklabels(), axis.get_yticklabels()):
        assert [label.get_text() for label in labels] == (classes if len(classes) <= 60 else classes[::2])
        assert not any(label.get_parse_math() and is_math_text(label.get_text()) for label in labels)
    assert len(axis.texts) == (len(classes) ** 2 if len(classes) <= 30 else 0)


def test_a_matrix_of_many_classes_is_a_picture(tmp_path):
    pictures.confusion(tmp_path / "confusion.png", "title", {"": np.eye(61, dtype=int).tolist()}, [f"class {n}" for n in range(61)])
    assert all(400 <= side <= 7000 for side in imread(tmp_path / "confusion.png").shape[:2])


def test_shades_are_shares_of_the_true_class(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(pictures, "_matrix", lambda axis, values, shown, names: (seen.append((values, shown)), axis.imshow(values))[1])
    pictures.confusion(tmp_path / "confusion.png", "title", {"one": [[3, 1], [0, 0]]}, ["a", "b"])
    ((values, shown),) = seen
    assert values.tolist() == [[0.75, 0.25], [0, 0]] and shown.tolist() == [["75%\n3", "25%\n1"], ["0%\n0", "0%\n0"]]
