"""Model cards as the hub's own library reads them: metadata, the index of scores, and what a model
inherits from the one that it started from."""

import math
import sys

import pytest
from conftest import SHORT_RUN, SIZES, pretrain_into
from huggingface_hub import ModelCard, metadata_load

from pretrain.card import hub_datasets, inherited, results, write_card
from pretrain.runtime.checkpoint import problem_of

SCORES = {"perplexity": 12.34567, "mlm_accuracy": 0.5, "nsp_accuracy": math.nan}
METRICS = {"perplexity": "perplexity", "mlm_accuracy": "accuracy", "nsp_accuracy": "accuracy"}
CARD = dict(
    task="fill-mask",
    title="bert, pretrained with mlm",
    opens_with="`AutoModel` of transformers.",
    rows=[["a | b", "c: [d]\n"]],
    tags=["bert", "pretraining"],
    started_from="tiny",
    scores=results("fill-mask", "held-out text", SCORES, METRICS),
)


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "mine" / "final"
    folder.mkdir(parents=True)
    return folder


def written(folder, **changes):
    """Write a card with some fields changed; returns it as the hub's library reads it."""
    write_card(folder, **CARD | changes)
    return ModelCard.load(folder / "README.md")


@pytest.mark.parametrize("has_matplotlib", [True, False])
def test_a_long_run_ends_with_its_curve(has_matplotlib, corpus, tmp_path, monkeypatch):
    """One with ten evaluations, if matplotlib is installed."""
    if has_matplotlib:
        pytest.importorskip("matplotlib")
    else:
        monkeypatch.setitem(sys.modules, "matplotlib", None)
    files = ["--train", corpus.folder, "--model", "tiny", *SIZES]
    final = pretrain_into(tmp_path / "run", files, SHORT_RUN, "--eval-every 1") / "final"
    assert (final / "perplexity.png").is_file() == has_matplotlib
    assert ("](perplexity.png)" in (final / "README.md").read_text("utf-8")) == has_matplotlib
    assert not problem_of(final, needed=()), "the picture is among the checked files"


def with_card(folder, text):
    """The name of a local model that has this card."""
    (folder / "README.md").write_text(text, encoding="utf-8")
    return str(folder)


def test_the_index_of_scores_is_read_back_as_it_was_written(folder):
    data = written(folder).data
    assert data.model_name == "mine" and data.eval_results == list(CARD["scores"])
    assert data.eval_results[0].metric_value == 12.3457


def test_metadata_of_a_model_from_scratch(folder):
    card = written(folder, language="zh", datasets=("a/b",), mask_token="<mask>")
    found = metadata_load(folder / "README.md")
    assert found["library_name"] == "transformers" and found["pipeline_tag"] == "fill-mask"
    assert found["datasets"] == ["a/b"] and found["language"] == "zh"
    assert "license" not in found and "base_model" not in found
    assert found["widget"] == [{"text": "今天<mask>情很好。"}] and "| a \\| b |" in card.text


def test_a_local_model_passes_on_its_license_language_and_base(folder, tmp_path):
    base = with_card(
        tmp_path,
        "---\nlicense: other\nlicense_name: own\nlicense_link: LICENSE.md\nlanguage: [en, de]\n"
        "base_model: google/bert\ntags: [x]\nmodel-index: nonsense\n---\ntext",
    )
    data = written(folder, started_from=base).data
    assert (data.license, data.license_name, data.license_link) == ("other", "own", "LICENSE.md")
    assert data.language == ["en", "de"] and data.base_model == "google/bert"
    assert written(folder, started_from=base, language="zh").data.language == "zh"


def test_a_model_on_the_hub_is_the_base_model(folder, on_hub):
    for name in ("google/bert", "google/bare"):
        (on_hub(name) / "config.json").write_text("{}")
    with_card(on_hub("google/bert"), "---\nlicense: mit\n---\n")
    assert inherited("google/bert") == {"license": "mit", "base_model": "google/bert"}
    assert inherited("google/bare") == {"base_model": "google/bare"}
    assert written(folder, started_from="google/bert").data.license == "mit"


@pytest.mark.parametrize(
    "text",
    [
        "---\na: [\n---\n",
        "---\nlicense: {a: 1}\nlanguage: ['x y', 2]\n---\n",
    ],
)
def test_a_garbled_card_passes_on_nothing(text, tmp_path):
    assert inherited(with_card(tmp_path, text)) == {}


def test_names_of_data_sets_on_the_hub():
    paths = ["text.txt", "hub:a/b:en:train", "hub:c", "hub:a/b:de", "folder/hub:x"]
    assert hub_datasets(paths) == ["a/b", "c"]
