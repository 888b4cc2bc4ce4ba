"""The model card: README.md of a model folder, with metadata in the form that the hub reads.

Facts of a run flow in. What is known of the model that the run started from comes from that model's
card, in its folder or in the cache of the hub. Nothing is downloaded here.
"""

import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData, metadata_load, try_to_load_from_cache

from pretrain import __version__
from pretrain.config import MODEL_SIZES
from pretrain.errors import UserError, refusing
from pretrain.files import file_problem, markdown_table, model_folder

NAME = "README.md"
PICTURE = "perplexity.png"  # shown if it is in the folder
INHERITED = ("license", "license_name", "license_link", "language", "base_model")
PLAIN = re.compile(r"[\w.:/+-]{1,200}")  # a license, a language, a model: nothing else is copied
EXAMPLES = {  # what the hub's page lets visitors try, by task and language; {} is the mask token
    "fill-mask": {"en": "The capital of France is {}.", "zh": "今天{}情很好。"},
    "text-classification": {"en": "This is an example.", "zh": "这是一个例子。"},
    "token-classification": {"en": "Ada Lovelace lived in London.", "zh": "鲁迅生于绍兴。"},
}
CITATION = f"""## How to cite

This model was made with bert-pretrain. BERT is from Devlin et al. 2019.

```bibtex
@software{{bert_pretrain,
  title = {{bert-pretrain}},
  author = {{{{The bert-pretrain authors}}}},
  version = {{{__version__}}},
}}

@inproceedings{{devlin2019bert,
  title = {{{{BERT}}: Pre-training of Deep Bidirectional Transformers for Language Understanding}},
  author = {{Devlin, Jacob and Chang, Ming-Wei and Lee, Kenton and Toutanova, Kristina}},
  booktitle = {{Proceedings of NAACL-HLT}},
  pages = {{4171--4186}},
  year = {{2019}},
}}
```
"""


def write_card(
    folder: Path,
    task: str,  # of the pipeline in transformers
    *,
    title: str,
    opens_with: str,
    rows: list[list[object]],  # of the table: what, value
    tags: list[str],
    started_from: str,  # a folder, a hub name, or a size
    language: str | list[str] | None = None,  # ISO 639-1; None: that of the model it started from
    datasets: Sequence[str] = (),  # names on the hub
    mask_token: str = "[MASK]",
    scores: Sequence[EvalResult] = (),
) -> None:
    """Write README.md into a model folder. The hub's index names the model after the parent folder.

    License, base model and, unless given, language are those in the card of `started_from`."""
    base = inherited(started_from)
    language = language or base.pop("language", None)
    first = language[0] if isinstance(language, list) else language
    default = mask_token if task == "fill-mask" else ""
    example = EXAMPLES[task].get(first or "", default)
    settings: dict[str, Any] = {}
    if example:
        settings["widget"] = [{"text": example.format(mask_token)}]
    if scores:
        settings["eval_results"] = list(scores)
        settings["model_name"] = folder.resolve().parent.name or "model"
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag=task,
        tags=tags,
        datasets=list(datasets) or None,
        **base | settings | {"language": language},
    )
    table = markdown_table(["what", "value"], rows)
    if (folder / PICTURE).is_file():
        table += f"\n\n![Validation perplexity by optimizer step]({PICTURE})"
    text = f"# {title}\n\nOpens with {opens_with}\n\n{table}\n\n{CITATION}"
    (folder / NAME).write_text(f"---\n{data.to_yaml()}\n---\n\n{text}", encoding="utf-8")


def results(
    task: str, measured_on: str, scores: dict[str, float], metrics: dict[str, str]
) -> list[EvalResult]:
    """The scores that `metrics` names, for the hub's index: {name: metric on the hub}.

    Those that are not finite are left out: the hub would refuse them."""
    return [
        EvalResult(
            task_type=task,
            dataset_type=f"custom-{measured_on.replace(' ', '-')}",
            dataset_name=measured_on,
            metric_type=metric,
            metric_name=name.replace("_", " "),
            metric_value=round(scores[name], 4),
        )
        for name, metric in metrics.items()
        if math.isfinite(scores.get(name, math.nan))
    ]


def hub_datasets(paths: Iterable[str]) -> list[str]:
    """The names of data sets on the hub among the paths of a text: hub:NAME[:CONFIG[:SPLIT]]."""
    names = [path.split(":")[1] for path in paths if path.startswith("hub:")]
    return list(dict.fromkeys(names))


def inherited(name: str) -> dict[str, str | list[str]]:
    """INHERITED metadata in the card of a model: a folder, a run or a hub name. {} if unknown.

    The base model of a folder is the one that its own card names: the nearest one on the hub."""
    if name in MODEL_SIZES:
        return {}
    try:
        folder = Path(model_folder(name))
        path = folder / NAME if folder.is_dir() else _cached(name, NAME)
        found: dict = {}
        if path and file_problem(path) is None:
            with refusing(f"{path}: is not a model card", "expected one"):
                found = metadata_load(path) or {}
    except UserError:  # a card is not worth a failed run
        found = {}
    known = {key: _plain(found.get(key)) for key in INHERITED}
    if _cached(name, "config.json"):
        known["base_model"] = name
    return {key: value for key, value in known.items() if value}


def _cached(name: str, file: str) -> str | None:
    """The path of a file of a model on the hub, if it is in the cache."""
    try:
        path = try_to_load_from_cache(name, file)
    except ValueError:  # not a name on the hub, such as a path
        return None
    return path if isinstance(path, str) else None


def _plain(value: Any) -> str | list[str] | None:
    """`value` if it is a plain name or a list of them."""
    names = value if isinstance(value, list) else [value]
    is_plain = all(isinstance(name, str) and PLAIN.fullmatch(name) for name in names)
    return value if is_plain else None
