"""The commands in README.md, of which those in "Your text", "Your masks" and "Does it help?" run on
small files with the names in the commands (the others parse), and all those in README.zh.md."""

import gzip
import json
import re
import shlex

import pytest
from conftest import ROOT, save, script
from huggingface_hub import ModelCard
from transformers import (
    AutoModelForMaskedLM,
    BertConfig,
    BertForPreTraining,
    ModernBertConfig,
    ModernBertForMaskedLM,
    RobertaConfig,
    RobertaForMaskedLM,
)

from pretrain.cli import parse
from pretrain.config import AdaptOptions, Config
from pretrain.data import tokenizer as tokenizers
from pretrain.preflight import validate

datasets = pytest.importorskip("datasets")

READMES = [
    (ROOT / name).read_text("utf-8").replace("\\\n", " ") for name in ("README.md", "README.zh.md")
]


def commands(text):
    """Once each: the README in Chinese repeats some."""
    found = [line for line in text.splitlines() if line.startswith("python scripts/")]
    return list(dict.fromkeys(found))


def section(title):
    return commands(READMES[0].split(f"## {title}\n")[1].split("\n## ")[0])


ENGLISH = section("Your text") + section("Your masks") + section("Does it help?")
CHINESE = commands(READMES[1])
LINES = commands("\n".join(READMES))
SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}
FAST = "--max-steps 2 --batch-size 4 --micro-batch-size 2 --max-length 32 --eval-tokens 500"
MORE = {  # so that a command takes seconds
    "pretrain": FAST,
    "show_masks": "--max-length 32",
    "finetune": "--max-steps 2",
    "suite": "--seeds 1 --finetune '--max-steps 2'",
    "adapt": f"--label-budgets 4 --seeds 1 --pretrain '{FAST}' "
    "--finetune '--max-steps 2 --max-length 32'",
}


def write_models(folder, english, chinese, roberta_tokenizer, modernbert_tokenizer):
    """Small models under the names that the commands have."""
    for name, text in (("bert-base-uncased", english), ("bert-base-chinese", chinese)):
        tokenizer = tokenizers.train(lambda text=text: text.splitlines(), 200)
        model = BertForPreTraining(BertConfig(vocab_size=len(tokenizer), **SMALL))
        save(folder / name, model, tokenizer)
    model = RobertaForMaskedLM(RobertaConfig(vocab_size=len(roberta_tokenizer), **SMALL))
    save(folder / "roberta-base", model, roberta_tokenizer)
    model = ModernBertForMaskedLM(
        ModernBertConfig(vocab_size=len(modernbert_tokenizer), pad_token_id=0, **SMALL)
    )
    save(folder / "answerdotai" / "ModernBERT-base", model, modernbert_tokenizer)


@pytest.fixture(scope="module")
def home(documents, roberta_tokenizer, modernbert_tokenizer, tmp_path_factory):
    """A folder with the files and models that the commands name, all small."""
    folder = tmp_path_factory.mktemp("readme")
    rows = ["\n".join(document) for document in documents]
    text = "\n\n".join(rows)
    chinese = "\n\n".join(
        f"今天心情很好。\n我们去公园散步，天气不错。\n他在北京大学学习人工智能，第{number}年。"
        for number in range(40)
    )
    tags = ["B-X", "I-X", *["O"] * 7]
    tagged = [
        "".join(f"{character}\t{tags[place % 9]}\n" for place, character in enumerate(row))
        for row in chinese.split()
    ]
    marks = [re.finditer("bank|river|money", row) for row in rows]
    spans = [[[of.start(), of.end(), "X"] for of in found] for found in marks]
    marked = [{"text": row, "entities": of} for row, of in zip(rows, spans)]
    reviews = [" ".join(map(str.capitalize, document)) for document in documents]
    segmented = "\n\n".join(f"今天 心情 很 好 。\n我们 去 公园 散步 {n} 。" for n in range(40))
    other = [f"The train was slow.\nThe river is quick, {number}." for number in range(40)]
    files = {
        "my_text/a.txt": text,
        "other_text/b.txt": "\n\n".join(other),
        "zh.txt": chinese,
        "zh_reviews.csv": "review\n" + "".join(f'"{row}"\n' for row in chinese.split("\n\n")),
        "zh_segmented.txt": segmented,
        "zh_heldout.txt": "昨天天气很好。\n他去公园散步。\n",
        "zh_terms.txt": "心情\n人工智能\n",
        "zh_vectors.txt": "心情 1 0\n天气 1 1\n公园 0 1\n大学 0 2\n",
        "zh_similar.tsv": "心情\t天气\n公园\t大学\n",
        "zh_new.jsonl": '{"text": "他在北京大学学习。"}\n',
        "reviews.csv": "label,review\n" + "".join(f'1,"{row}"\n' for row in reviews),
        "spans.jsonl": "".join(json.dumps(row) + "\n" for row in marked),
        "ner.conll": "\n".join(tagged),
        "zh_ner_train.conll": "\n".join(tagged[:20]),
        "zh_ner_valid.conll": "\n".join(tagged[20:30]),
        "terms.txt": "bank\nriver money\n",
        "similar.tsv": "bank\triver\tmoney\n",
        "words.txt": "river money\nbank-model\n",
    }
    classes = {
        "": ("river water {},water", "bank model {},money"),
        "zh_": ("今天心情很好{},1", "天气不错{},0"),
    }
    for name, start in (("train", 0), ("valid", 20), ("test", 30), ("new", 40)):
        for language, kinds in classes.items():
            labeled = [kinds[number % 2].format(number) for number in range(start, start + 10)]
            files[f"{language}{name}.csv"] = "text,label\n" + "\n".join(labeled) + "\n"
        if name != "new":
            files[f"tasks/river/{name}.csv"] = files[f"{name}.csv"]
    words = "quick\tO\nbank\tB-X\nmodel\tI-X\n\nriver\tB-Y\nwater\tO\n\n"
    files |= {"train.conll": words * 4, "valid.conll": words}
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content, "utf-8")
    with gzip.open(folder / "notes.jsonl.gz", "wt") as notes:
        notes.writelines(json.dumps({"text": row}) + "\n" for row in rows)
    table = datasets.Dataset.from_dict({"text": rows})
    (folder / "tables").mkdir()
    table.to_parquet(folder / "tables" / "a.parquet")
    table.save_to_disk(folder / "saved_dataset")
    halves = {"train": chinese.split("\n\n")[:30], "validation": chinese.split("\n\n")[30:]}
    tables = {name: datasets.Dataset.from_dict({"text": half}) for name, half in halves.items()}
    datasets.DatasetDict(tables).save_to_disk(folder / "zh_dataset")
    write_models(folder, text, chinese, roberta_tokenizer, modernbert_tokenizer)
    return folder


@pytest.fixture
def run(home, monkeypatch):
    """Run a command of a README in `home`, as a shell would, after those that make its model."""
    monkeypatch.chdir(home)

    def run(line):
        model = re.search(r"--model (runs/\w+)", line)
        if model and not (home / model[1]).exists():
            run(next(other for other in LINES if f"--output {model[1]}" in f"{other} "))
        _, path, *words = shlex.split(line)
        name = path.removeprefix("scripts/").removesuffix(".py")
        found = [sorted(map(str, home.glob(word))) if "*" in word else [word] for word in words]
        argv = sum(found, []) + shlex.split(MORE.get(name, ""))
        output = re.search(r"--output (runs/\w+|\w+\.tsv)", line)
        if output and (home / output[1]).exists() and "--resume" not in line:
            argv += ["--overwrite"]  # another command needed it
        return script(name).main(argv)

    return run


PRINTED = {
    "adapt": "report.html",
    "domain": "pieces per word",
    "evaluate": "perplexity",
    "fill_mask": r"(?m)^token +score +sentence\n(\S+) +0\.\d+  今天\1情很好$",
    "finetune": "mean of the classes|all entities",
    "predict": r"\d+ rows? in \w+\.(csv|jsonl)",
    "show_masks": "entities|words",
    "similar_words": r"4 words in \w+\.tsv",
    "suite": "average",
}


def test_the_sections_have_a_line_for_each_case():
    assert len(ENGLISH) >= 18
    assert len(CHINESE) >= 15


@pytest.mark.parametrize("line", [*ENGLISH, *(line for line in CHINESE if line not in ENGLISH)])
def test_each_command_runs(line, home, run, capsys):
    if "--resume" in line and not (home / "runs/zh_mini").exists():
        run(next(other for other in CHINESE if "runs/zh_mini" in other))
    run(line)
    name = re.search(r"scripts/(\w+)\.py", line)[1]
    if name == "pretrain":
        folder = home / re.search(r"runs/\w+", line)[0] / "final"
        AutoModelForMaskedLM.from_pretrained(folder)
        scores = ModelCard.load(folder / "README.md").data.eval_results
        assert {"perplexity", "accuracy"} == {score.metric_type for score in scores}
    else:
        assert re.search(PRINTED[name], capsys.readouterr().out)


def test_all_other_commands_parse():
    kinds = {"scripts/pretrain.py": Config, "scripts/adapt.py": AdaptOptions}
    others = [line for line in LINES if line not in ENGLISH + CHINESE]
    lines = [shlex.split(line, comments=True)[1:] for line in others]
    assert "scripts/pretrain.py" in {line[0] for line in lines}
    for name, *argv in lines:
        assert name not in kinds or validate(parse(argv, kinds[name], "")) == []
