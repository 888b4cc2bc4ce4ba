"""The commands of the README: each of "Your text, your masks" and "Does it help?" runs, on small files of the names that it uses; the
others parse."""
import gzip
import json
import re
import shlex
from importlib.util import module_from_spec, spec_from_file_location

import pytest
from conftest import ROOT
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoModelForMaskedLM, BertConfig, BertForPreTraining, RobertaConfig, RobertaForMaskedLM, RobertaTokenizer

from pretrain.command import parse
from pretrain.config import AdaptOptions, Config, validate
from pretrain.data import tokenizer as tokenizers

datasets = pytest.importorskip("datasets")

README = (ROOT / "README.md").read_text(encoding="utf-8")


def commands(title):
    section = README.split(f"## {title}")[1].split("\n## ")[0]
    return [line for line in section.splitlines() if line.startswith("python scripts/") and "sci_cite" not in line]  # hours, on other data


COMMANDS, HELP = commands("Your text, your masks"), commands("Does it help?")
SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
FAST = ["--max-steps", "2", "--batch-size", "4", "--micro-batch-size", "2", "--max-length", "32", "--eval-tokens", "500"]
MORE = {"pretrain.py": FAST, "show_masks.py": ["--max-length", "32"], "finetune.py": ["--max-steps", "2"], "adapt.py": [
    "--label-budgets", "4", "all", "--seeds", "1", "--pretrain", " ".join(FAST), "--finetune", "--max-steps 2 --max-length 32"]}


@pytest.fixture(scope="module")
def home(documents, tmp_path_factory):
    """A folder with the files and models that the commands name, all of them small."""
    folder = tmp_path_factory.mktemp("readme")
    text = "\n\n".join("\n".join(document) for document in documents)
    chinese = "\n\n".join(f"今天心情很好。\n我们去公园散步，天气不错。\n他在北京大学学习人工智能，第{number}年。" for number in range(40))
    (folder / "my_text").mkdir()
    (folder / "my_text" / "a.txt").write_text(text, encoding="utf-8")
    (folder / "zh.txt").write_text(chinese, encoding="utf-8")
    rows = [" ".join(map(str.capitalize, document)) for document in documents]
    (folder / "reviews.csv").write_text("label,review\n" + "".join(f'1,"{row}"\n' for row in rows))
    with gzip.open(folder / "notes.jsonl.gz", "wt") as notes:
        notes.writelines(json.dumps({"text": "\n".join(document)}) + "\n" for document in documents)
    texts = ["\n".join(document) for document in documents]
    spans = [[[found.start(), found.end(), "X"] for found in re.finditer("bank|river|money", row)] for row in texts]
    (folder / "spans.jsonl").write_text("".join(json.dumps({"text": row, "entities": marks}) + "\n" for row, marks in zip(texts, spans)))
    table = datasets.Dataset.from_dict({"text": texts})
    (folder / "tables").mkdir()
    table.to_parquet(folder / "tables" / "a.parquet")
    table.save_to_disk(folder / "saved_dataset")
    tags = ["B-X", "I-X", *["O"] * 7]
    (folder / "ner.conll").write_text("\n".join("".join(f"{character}\t{tags[place % 9]}\n" for place, character in enumerate(row))
                                                for row in chinese.split()), encoding="utf-8")
    (folder / "terms.txt").write_text("bank\nriver money\n")
    (folder / "similar.tsv").write_text("bank\triver\tmoney\n")
    (folder / "words.txt").write_text("river money\nbank-model\n")
    for name, source in (("bert-base-uncased", text), ("bert-base-chinese", chinese)):
        tokenizer = tokenizers.train(lambda source=source: source.splitlines(), 200)
        BertForPreTraining(BertConfig(vocab_size=len(tokenizer), **SMALL)).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.train_from_iterator(text.splitlines(), trainers.BpeTrainer(
        vocab_size=350, special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    model = json.loads(backend.to_str())["model"]
    tokenizer = RobertaTokenizer(vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]])
    RobertaForMaskedLM(RobertaConfig(vocab_size=len(tokenizer), **SMALL)).save_pretrained(folder / "roberta-base")
    tokenizer.save_pretrained(folder / "roberta-base")
    return folder


def run(line, home, monkeypatch):
    """Run a command of the README in `home`, as `python` would."""
    monkeypatch.chdir(home)
    arguments = shlex.split(line)[2:]
    arguments = [part for word in arguments for part in ([str(path) for path in sorted(home.glob(word))] if "*" in word else [word])]
    spec = spec_from_file_location("script", ROOT / shlex.split(line)[1])
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main(arguments + MORE.get(shlex.split(line)[1].removeprefix("scripts/"), []))


def test_the_section_has_a_line_for_each_case():
    assert len(COMMANDS) >= 14


@pytest.mark.parametrize("line", COMMANDS)
def test_each_command_of_the_section_runs(line, home, monkeypatch, capsys):
    if "fill_mask" in line and not (home / "runs" / "zh").exists():
        run(next(other for other in COMMANDS if "runs/zh" in other), home, monkeypatch)
    run(line, home, monkeypatch)
    printed = capsys.readouterr().out
    if "pretrain.py" in line:
        output = home / re.search(r"runs/\w+", line)[0]
        AutoModelForMaskedLM.from_pretrained(output / "final")
    elif "fill_mask" in line:
        assert re.search(r"^token +score +sentence\n(\S+) +0\.\d+  今天\1情很好$", printed, re.MULTILINE)
    else:
        assert "entities" in printed


@pytest.mark.parametrize("line", HELP)
def test_each_command_of_does_it_help_runs(line, home, monkeypatch, capsys):
    (home / "other_text").mkdir(exist_ok=True)
    (home / "other_text" / "b.txt").write_text("\n\n".join(f"The train was slow.\nThe river is quick, {number}." for number in range(40)))
    for name, start in (("train", 0), ("valid", 20), ("test", 30), ("new", 40)):
        rows = [f"bank model {number},money" if number % 2 else f"river water {number},water" for number in range(start, start + 10)]
        (home / f"{name}.csv").write_text("text,label\n" + "\n".join(rows) + "\n")
    needed = {"finetune": ("adapted", "python scripts/pretrain.py --train my_text/ --model bert-base-uncased --output runs/adapted"),
              "predict": ("classifier", HELP[1].replace("--model runs/adapted", "--model bert-base-uncased"))}
    for script, (folder, command) in needed.items():
        if f"/{script}.py" in line and not (home / "runs" / folder).exists():
            run(command, home, monkeypatch)
    if "/finetune.py" in line and (home / "runs" / "classifier").exists():
        line += " --overwrite"
    run(line, home, monkeypatch)
    printed = capsys.readouterr().out
    expected = {"adapt": "report.html", "finetune": "mean of the classes", "predict": "10 rows in predictions.csv", "domain": "pieces each"}
    assert next(text for script, text in expected.items() if f"/{script}.py" in line) in printed


def test_all_other_commands_parse():
    lines = [line.split("#")[0] for line in README.splitlines() if line.startswith("python scripts/") and line not in COMMANDS + HELP]
    kinds = {"scripts/pretrain.py": Config, "scripts/adapt.py": AdaptOptions}
    lines = [shlex.split(line)[1:] for line in lines]
    assert {line[0] for line in lines} >= kinds.keys()
    for name, *arguments in lines:
        if name in kinds:
            assert validate(parse(arguments, kinds[name], "")) == []
