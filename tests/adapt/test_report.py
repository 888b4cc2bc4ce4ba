"""The report of an experiment.

The verdict is "yes" only if an interval lies above 0, and all plots are drawn. test_outcomes.py
compares the intervals with a slow bootstrap, test_pipeline.py the tables with the parts of an
experiment.
"""

import re
import warnings
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain import plots
from pretrain.adapt import report

imread = pytest.importorskip("matplotlib.image").imread


# The verdict.

BUDGETS = {"100": 100, "all": 2000}
# Intervals above 0, below, around, and touching it.
KINDS = [(0.1, 0.05, 0.15), (-0.1, -0.15, -0.05), (0.02, -0.01, 0.05), (0.1, 0, 0.2), (0, 0, 0)]
ONLY = {  # the budgets of which something holds -> how the verdict names them
    (True, True): "",
    (True, False): " with 100 labeled rows",
    (False, True): " with 2,000 labeled rows",
}
OWN, ANY = "so it is this text that helps", "so more pretraining on any text may help as much"
BOUNDS = st.tuples(st.floats(-1, 1), st.floats(0, 0.5), st.floats(0, 0.5)).map(
    lambda of: (of[0], of[0] - of[1], of[0] + of[2])
)
PAIRS = st.tuples(*2 * [st.sampled_from(KINDS) | BOUNDS])


@settings(max_examples=200, deadline=None)
@given(PAIRS, st.none() | PAIRS)
def test_the_verdict_says_what_the_intervals_say(differences, control):
    """It is "yes" only if an interval lies above 0."""
    found = {"base": dict(zip(BUDGETS, differences))}
    if control:
        found["control"] = dict(zip(BUDGETS, control))
    text = report.verdict(found, BUDGETS, "macro F1")
    gains = tuple(low > 0 for _, low, _ in differences)
    losses = tuple(high < 0 for _, _, high in differences)
    unclear = tuple(not gain and not loss for gain, loss in zip(gains, losses))
    assert text.startswith(f"**Yes{ONLY[gains]}**: " if any(gains) else "**No**: ")
    effects = {" helped ": gains, " hurt ": losses, " made no clear difference ": unclear}
    answer, _, rest = text.partition(" Compared with ")
    for effect, holds in effects.items():
        assert (effect in answer) == any(holds)
        clause = answer.partition(effect)[2].partition(". It ")[0]
        assert [f"with {n:,} labeled rows" in clause for n in BUDGETS.values()] == list(holds)
    for shown, of in ((answer, differences), (rest, control or ())):
        for value, low, high in of:
            assert f"{value:+.3f} ({low:+.3f} to {high:+.3f}) with " in shown
    better = (False, False)
    if control:
        better = tuple(gain and low > 0 for gain, (_, low, _) in zip(gains, control))
    assert (f"{OWN}{ONLY[better]}." in text) if any(better) else (OWN not in text)
    assert (ANY in text) == (bool(control) and any(gains) and not any(better))
    assert bool(rest) == bool(control) and "macro F1" in text


# Tables.


NAMES = ["a|b", "<b>bold</b>", "x & y", "&amp;", "<script>alert(1)</script>", "two\nlines", "正面"]
NAMES += ["|", "a||b|", "1 < 2 > 0", "*urgent*", "__init__", "`code`", "a\\|b", "a\\", "{0}"]
NAMES += ["[a](http://b.c)", "![a](http://b.c/d.png)"]


def test_the_page_shows_cells_verbatim(tmp_path):
    shown = report.table(["class", "number"], [[name, n] for n, name in enumerate(NAMES)], ".1f")
    page = report.to_html(shown, tmp_path)
    body = ElementTree.fromstring(re.search("<body>.*</body>", page, re.DOTALL)[0])
    rows = [["".join(cell.itertext()) for cell in row] for row in body.iter("tr")]
    expected = [[name.replace("\n", " "), f"{n:.1f}"] for n, name in enumerate(NAMES)]
    assert rows == [["class", "number"], *expected]
    assert "not finite" in report.table(["number"], [[None]], ",.1f")
    tags = {element.tag for element in body.iter()}
    assert not tags & {"script", "b", "em", "strong", "code", "a", "img"}


@pytest.mark.parametrize(
    "change, named",
    [
        ({}, ""),
        ({"perplexity": {"after": 21.5, "unigram": 21.4}}, "too short"),
        ({"seeds": 1}, "one seed"),
        ({"rows": {"test": 99}}, "99 test rows"),
        ({"seen_in_training": 300}, "300 of the 500 test texts"),
        ({"unknown_share": 0.5}, "50%"),
        ({"task": 0.96}, "96%"),
        ({"best_steps": [9, 9]}, "2 of the 2 fine-tuning runs"),
        ({"predicted": [1, 1, 1]}, "2 of the 2 fine-tuned models"),
        ({"predicted": [[], [], []]}, "2 of the 2 fine-tuned models"),
        ({"r2": -0.1}, "2 of the 2 fine-tuned models are worse"),
    ],
)
def test_the_verdict_includes_warnings(change, named):
    facts = {"seeds": 2, "rows": {"test": 500}, "seen_in_training": 0, "unknown_share": 0.015}
    facts |= {"perplexity": {"after": 21.5, "unigram": 100.0}, "task": 0.5} | change
    texts = {"text": {"unknown_share": 0.0}, "task": {"unknown_share": facts["unknown_share"]}}
    facts = {"best_steps": [9, 6], "macro_f1": 0.5, "predicted": [0, 1, 1]} | facts
    run = {"steps": 9, "valid": facts, "test": facts, "predicted": facts["predicted"]}
    runs = [run | {"best_step": step} for step in facts["best_steps"]]
    facts |= {"metric": "macro_f1", "scores": {"base": {"all": runs}}}
    facts["overlap"] = {"texts": texts, "overlap": {"text": {"task": facts["task"]}}}
    found = report.caveats(facts)
    assert named in found and ", and that" not in found and bool(found) == bool(named)


# Plots.


def is_plot(path):
    pixels = imread(path)
    sides, colors = pixels.shape[:2], pixels[..., :3]
    return pixels.ndim == 3 and 400 <= min(sides) <= max(sides) <= 7000 and colors.std() > 0.03


def test_plots_work_with_any_names(tmp_path, capsys):
    names = ["正面", "$^$"]
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
    assert printed.err == "" and ("Chinese" in printed.out) == (not plots.chinese_fonts())


def test_shades_are_shares_of_the_true_class(tmp_path):
    figure = plots.confusion(tmp_path / "c.png", "title", {"": [[3, 1], [0, 0]]}, ["a", "b"])
    axis = figure.axes[0]
    assert axis.images[0].get_array().tolist() == [[0.75, 0.25], [0, 0]]
    assert [text.get_text() for text in axis.texts] == ["75%\n3", "25%\n1", "0%\n0", "0%\n0"]
