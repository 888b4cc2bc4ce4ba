"""The commands in the README: those in "Your text", "Your masks" and "Does it help?" run on small
files with the names in the commands; the others parse."""

import gzip
import json
import re
import shlex

import pytest
from conftest import ROOT, script
from transformers import (
    AutoModelForMaskedLM,
    BertConfig,
    BertForPreTraining,
    RobertaConfig,
    RobertaForMaskedLM,
)

from pretrain.cli import parse
from pretrain.config import AdaptOptions, Config
from pretrain.data import tokenizer as tokenizers
from pretrain.preflight import validate

datasets = pytest.importorskip("datasets")

README = (ROOT / "README.md").read_text("utf-8").replace("\\\n", " ")
LINES = [line for line in README.splitlines() if line.startswith("python scripts/")]


def commands(title):
    section = README.split(f"## {title}")[1].split("\n## ")[0].splitlines()
    return [line for line in section if line in LINES]


COMMANDS = commands("Your text\n") + commands("Your masks\n")
HELP = commands("Does it help?\n")
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
    "adapt": f"--label-budgets 4 all --seeds 1 --pretrain '{FAST}' "
    "--finetune '--max-steps 2 --max-length 32'",
}


def save(folder, model, tokenizer):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_models(folder, english, chinese, roberta_tokenizer):
    """Small models named bert-base-uncased, bert-base-chinese and roberta-base."""
    for name, text in (("bert-base-uncased", english), ("bert-base-chinese", chinese)):
        tokenizer = tokenizers.train(lambda text=text: text.splitlines(), 200)
        model = BertForPreTraining(BertConfig(vocab_size=len(tokenizer), **SMALL))
        save(folder / name, model, tokenizer)
    model = RobertaForMaskedLM(RobertaConfig(vocab_size=len(roberta_tokenizer), **SMALL))
    save(folder / "roberta-base", model, roberta_tokenizer)


@pytest.fixture(scope="module")
def home(documents, roberta_tokenizer, tmp_path_factory):
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
    other = [f"The train was slow.\nThe river is quick, {number}." for number in range(40)]
    files = {
        "my_text/a.txt": text,
        "other_text/b.txt": "\n\n".join(other),
        "zh.txt": chinese,
        "reviews.csv": "label,review\n" + "".join(f'1,"{row}"\n' for row in reviews),
        "spans.jsonl": "".join(json.dumps(row) + "\n" for row in marked),
        "ner.conll": "\n".join(tagged),
        "terms.txt": "bank\nriver money\n",
        "similar.tsv": "bank\triver\tmoney\n",
        "words.txt": "river money\nbank-model\n",
    }
    for name, start in (("train", 0), ("valid", 20), ("test", 30), ("new", 40)):
        kinds = ("river water {},water", "bank model {},money")
        labeled = [kinds[number % 2].format(number) for number in range(start, start + 10)]
        files[f"{name}.csv"] = "text,label\n" + "\n".join(labeled) + "\n"
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content, "utf-8")
    with gzip.open(folder / "notes.jsonl.gz", "wt") as notes:
        notes.writelines(json.dumps({"text": row}) + "\n" for row in rows)
    table = datasets.Dataset.from_dict({"text": rows})
    (folder / "tables").mkdir()
    table.to_parquet(folder / "tables" / "a.parquet")
    table.save_to_disk(folder / "saved_dataset")
    write_models(folder, text, chinese, roberta_tokenizer)
    return folder


@pytest.fixture
def run(home, monkeypatch):
    """Run a command of the README in `home`, as a shell would."""
    monkeypatch.chdir(home)

    def run(line):
        _, path, *words = shlex.split(line)
        name = path.removeprefix("scripts/").removesuffix(".py")
        found = [sorted(map(str, home.glob(word))) if "*" in word else [word] for word in words]
        argv = sum(found, []) + shlex.split(MORE.get(name, ""))
        return script(name).main(argv)

    return run


def test_the_section_has_a_line_for_each_case():
    assert len(COMMANDS) >= 14


@pytest.mark.parametrize("line", COMMANDS)
def test_each_command_of_the_section_runs(line, home, run, capsys):
    if "fill_mask" in line and not (home / "runs" / "zh").exists():
        run(next(other for other in COMMANDS if "runs/zh" in other))
    run(line)
    printed = capsys.readouterr().out
    if "pretrain.py" in line:
        AutoModelForMaskedLM.from_pretrained(home / re.search(r"runs/\w+", line)[0] / "final")
    elif "fill_mask" in line:
        table = r"^token +score +sentence\n(\S+) +0\.\d+  今天\1情很好$"
        assert re.search(table, printed, re.MULTILINE)
    else:
        assert "entities" in printed


@pytest.mark.parametrize("line", HELP)
def test_each_command_of_does_it_help_runs(line, home, run, capsys):
    name = re.search(r"scripts/(\w+)\.py", line)[1]
    pretrain = "python scripts/pretrain.py --train my_text/ --model bert-base-uncased"
    classify = next(line for line in HELP if "/finetune.py" in line)
    classify = classify.replace("--model runs/adapted", "--model bert-base-uncased")
    if name == "finetune" and not (home / "runs" / "adapted").exists():
        run(f"{pretrain} --output runs/adapted")
    if name == "predict" and not (home / "runs" / "classifier").exists():
        run(classify)
    if name == "finetune" and (home / "runs" / "classifier").exists():
        line += " --overwrite"
    run(line)
    expected = {
        "adapt": "report.html",
        "finetune": "mean of the classes",
        "predict": "10 rows in predictions.csv",
        "domain": "pieces per word",
    }
    assert expected[name] in capsys.readouterr().out


def test_all_other_commands_parse():
    kinds = {"scripts/pretrain.py": Config, "scripts/adapt.py": AdaptOptions}
    others = [line for line in LINES if line not in COMMANDS + HELP]
    lines = [shlex.split(line, comments=True)[1:] for line in others]
    assert "scripts/pretrain.py" in {line[0] for line in lines}
    for name, *argv in lines:
        assert name not in kinds or validate(parse(argv, kinds[name], "")) == []
