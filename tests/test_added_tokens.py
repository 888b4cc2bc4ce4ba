"""Tokens added to a checkpoint's vocabulary: each is whole in the text, its vectors are the mean of what it replaces, the weights grow
together and stay tied, and special ones are never masked; the run goes on without the file that named them."""
import json
import math
import re

import pytest
import torch
from conftest import SIZES, assert_same_run, interrupted_copy, refusal, script
from packed_reference import roughen, small_config, small_model
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM, AutoTokenizer, BertForPreTraining, RobertaConfig, RobertaForMaskedLM

from pretrain.data.corpus import Corpus
from pretrain.data.tokenizer import describe
from pretrain.model import bert

PRETRAIN, PREPARE = script("pretrain"), script("prepare")
WORDS = ["teachbank", "River-2", "money water", "neverseen"]  # one word, one with a mark, two words, one that does not occur
SPECIAL = "[name]"
KINDS = {"bert": 0, "rounded up": 16, "rounded up by few": 2, "roberta": 0}  # rows of the table beyond the tokenizer's entries
ROLES = ["[name]", "eos_token=[EOT]"]


@pytest.fixture(scope="module")
def text(documents, tmp_path_factory):
    """The text with the new words in every third sentence, so that some documents hold many."""
    shown = ["a teachbank", "the river-2 and River-2", "money water", "[name] taught teachbank", "[EOT]", "teachbanks xteachbank"]
    path, number = tmp_path_factory.mktemp("added") / "text.txt", 0
    with path.open("w", encoding="utf-8") as out:
        for document in documents:
            for sentence in document:
                number += 1
                out.write(sentence + (f" {shown[number // 3 % len(shown)]} ." if number % 3 == 0 else "") + "\n")
            out.write("\n")
    return path


@pytest.fixture
def words(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module", params=KINDS)
def base(request, tiny_tokenizer, roberta_tokenizer, tmp_path_factory):
    """(kind, folder of a checkpoint with noise on every weight)."""
    folder, settings = tmp_path_factory.mktemp("base"), {"hidden_dropout_prob": 0.1}
    torch.manual_seed(6)
    if request.param == "roberta":
        tokenizer = roberta_tokenizer
        settings |= {"vocab_size": len(tokenizer), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
                     "intermediate_size": 64, "max_position_embeddings": 66, "type_vocab_size": 1, "pad_token_id": tokenizer.pad_token_id}
        model = RobertaForMaskedLM(RobertaConfig(**settings))
    else:
        tokenizer = tiny_tokenizer
        model = BertForPreTraining(small_config(len(tokenizer) + KINDS[request.param], **settings))
    roughen(model).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return request.param, folder


def options(text, cache, words=None, *, steps=1, rate="1e-30"):
    """A run that leaves the weights as they are to start with: what comes after the first step is tested elsewhere."""
    return ["--train", str(text), "--objective", "mlm", "--max-length", "64", "--batch-size", "16", "--micro-batch-size", "8",
            "--max-steps", str(steps), "--save-every", "2", "--eval-tokens", "600", "--keep", "9", "--cache", str(cache), "--precision",
            "fp32", "--learning-rate", rate, "--add-special-tokens", *ROLES, *(["--add-tokens", str(words)] if words else [])]


def pieces_of(tokenizer, token):
    """The ids that stood for a token in running text."""
    space = " " * (tokenizer.mask_token == "<mask>" and not token.startswith("["))
    return tokenizer(space + token, add_special_tokens=False).input_ids


def tables(weights):
    """Word embeddings and the decoder's bias, by their names in a file."""
    return {name: weight for name, weight in weights.items()
            if name.endswith(("word_embeddings.weight", "predictions.bias", "lm_head.bias"))}


# A checkpoint that grows.

@pytest.mark.parametrize("new_vectors", ["mean", "random"])
def test_new_vectors_and_biases_are_the_mean_of_the_pieces_and_old_ones_stay(base, new_vectors, text, cache, words, tmp_path):
    kind, folder = base
    PRETRAIN.main([*options(text, cache, words), "--model", str(folder), "--new-vectors", new_vectors, "--output", str(tmp_path / "run")])
    before, after = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(tmp_path / "run" / "final")
    added = [*WORDS, SPECIAL, "[EOT]"]
    numbers = after.convert_tokens_to_ids(added)
    assert sorted(numbers) == list(range(len(before), len(before) + len(added))) and after.eos_token == "[EOT]"
    old, new = (tables(load_file(path / "model.safetensors")) for path in (folder, tmp_path / "run" / "final"))
    assert old.keys() == new.keys() and len(old) == 2
    size = max(len(after), len(before) + KINDS[kind])
    for name in old:
        assert len(new[name]) == size
        torch.testing.assert_close(new[name][:len(before)], old[name][:len(before)], atol=1e-20, rtol=0.0)
        for number, token in zip(numbers, added):
            mean = old[name][pieces_of(before, token)].mean(0)
            assert torch.allclose(new[name][number], mean, atol=1e-6) is (new_vectors == "mean"), (name, token)
    unchanged = load_file(folder / "model.safetensors")
    for name, weight in load_file(tmp_path / "run" / "final" / "model.safetensors").items():
        assert name in old or torch.equal(weight, unchanged[name]), name


def test_the_model_opens_with_the_stock_class_at_its_new_size(base, text, cache, words, tmp_path):
    kind, folder = base
    PRETRAIN.main([*options(text, cache, words, rate="1e-3"), "--model", str(folder), "--output", str(tmp_path / "run")])
    stock = RobertaForMaskedLM if kind == "roberta" else BertForPreTraining
    model, info = stock.from_pretrained(tmp_path / "run" / "final", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    size = max(len(AutoTokenizer.from_pretrained(folder)) + 6, stock.config_class.from_pretrained(folder).vocab_size)
    decoder = model.get_output_embeddings()
    assert model.config.vocab_size == size == len(decoder.bias) and decoder.weight.shape == (size, 32)
    assert decoder.weight is model.get_input_embeddings().weight
    assert decoder.bias is (model.lm_head if kind == "roberta" else model.cls.predictions).bias
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "final")
    with torch.no_grad():  # a pipeline's way: the new tokens go in and are scored
        logits = AutoModelForMaskedLM.from_pretrained(tmp_path / "run" / "final")(**tokenizer("a teachbank", return_tensors="pt")).logits
    assert logits.shape[-1] == size and torch.isfinite(logits).all()


def test_a_family_keeps_one_bias_and_one_matrix_as_it_grows(base):
    _, folder = base
    model, _ = bert.from_checkpoint(str(folder), [])
    size = model.config.vocab_size
    head = model.get_submodule(model.masked_lm_head)
    model.add_vectors(size + 3, {size: [5, 6], size + 1: [], size + 2: [7]}, from_pieces=True)
    assert head.decoder.weight is model.get_input_embeddings().weight and head.decoder.bias is head.bias
    assert model.config.vocab_size == size + 3 == len(head.bias) == len(head.decoder.weight) == head.decoder.out_features
    for weights in (head.decoder.weight, head.bias):
        assert torch.equal(weights[size], weights[5:7].mean(0)) and torch.equal(weights[size + 2], weights[7])
    assert sum(weight.shape[:1] == (size + 3,) for weight in model.parameters()) == 2


# The text.

@pytest.mark.parametrize("base", ["bert", "roberta"], indirect=True)
def test_the_corpus_holds_the_tokens_whole_and_their_number_is_told(base, text, cache, words, tmp_path, capsys):
    kind, folder = base
    PRETRAIN.main([*options(text, cache, words), "--model", str(folder), "--valid-fraction", "0", "--output", str(tmp_path / "run")])
    lines = text.read_text().split("\n")
    patterns = {"teachbank": r"\bteachbank\b", "River-2": r"\b[Rr]iver-2\b" if kind == "bert" else r"\bRiver-2\b",
                "money water": r"\bmoney water\b", "neverseen": "neverseen", SPECIAL: r"\[name\]", "[EOT]": r"\[EOT\]"}
    slow = {token: sum(len(re.findall(pattern, line)) for line in lines) for token, pattern in patterns.items()}
    told = (tmp_path / "run" / "added_tokens.tsv").read_text().splitlines()
    assert {token: int(count) for token, count in (line.split("\t") for line in told)} == {
        token.lower() if kind == "bert" and token in WORDS else token: count for token, count in slow.items()}
    assert [int(line.split("\t")[1]) for line in told] == sorted(slow.values(), reverse=True)
    assert f"6 added tokens occur {sum(slow.values()):,} times" in capsys.readouterr().out and slow["neverseen"] == 0 < slow["River-2"]
    state = json.loads((tmp_path / "run" / "checkpoint-1" / "training_state.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "final")
    ids = Corpus(state["corpus_folders"]["train"]).shard(0).ids.tolist()
    assert {token: ids.count(tokenizer.convert_tokens_to_ids(token)) for token in slow} == slow
    ids = tokenizer("a money water, River-2 and [name]", add_special_tokens=False).input_ids  # after saving and loading
    assert set(tokenizer.convert_tokens_to_ids(["money water", "River-2", SPECIAL])) <= set(ids)


@pytest.mark.parametrize("base", ["bert", "roberta"], indirect=True)
@pytest.mark.parametrize("masking", ["token", "word"])
def test_special_tokens_are_read_and_never_masked(base, masking, text, cache, words, tmp_path, steps_seen):
    PRETRAIN.main([*options(text, cache, words, steps=6), "--model", str(base[1]), "--masking", masking, "--mask-rate", "0.5",
                   "--output", str(tmp_path / "run")])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "final")
    special, ordinary = (set(tokenizer.convert_tokens_to_ids(tokens)) for tokens in ([SPECIAL, "[EOT]"], ["teachbank", "money water"]))
    assert describe(tokenizer).is_special[list(special)].all() and not describe(tokenizer).is_special[list(ordinary)].any()
    batches = [batch for batches in steps_seen for batch in batches]
    read = {number for batch in batches for number in batch.input_ids.tolist()}
    masked = {number for batch in batches for number in batch.masked_lm_labels.tolist()}
    put = {number for batch in batches for number in batch.input_ids[batch.masked_positions].tolist()}
    assert special <= read and ordinary <= masked and not special & (masked | put)


@pytest.mark.parametrize("base", ["bert", "roberta"], indirect=True)
def test_a_run_resumes_without_the_file_of_tokens(base, text, cache, words, tmp_path):
    PRETRAIN.main([*options(text, cache, words, steps=4, rate="1e-3"), "--model", str(base[1]), "--output", str(tmp_path / "whole")])
    words.unlink()
    told = (tmp_path / "whole" / "added_tokens.tsv").read_text()
    interrupted_copy(tmp_path / "whole", tmp_path / "run", 2)
    PRETRAIN.main(["--resume", "--output", str(tmp_path / "run")])
    assert_same_run(tmp_path / "whole", tmp_path / "run", step=4)
    assert (tmp_path / "run" / "added_tokens.tsv").read_text() == told
    before, after = (AutoTokenizer.from_pretrained(tmp_path / name / "final") for name in ("whole", "run"))
    assert before.get_vocab() == after.get_vocab() and before.all_special_ids == after.all_special_ids


@pytest.mark.parametrize("base", ["bert"], indirect=True)
def test_the_held_out_documents_are_not_counted(base, text, cache, words, tmp_path):
    counts = {}
    for fraction in ("0", "0.4"):
        output = tmp_path / fraction
        PRETRAIN.main([*options(text, cache, words), "--model", str(base[1]), "--valid-fraction", fraction, "--output", str(output)])
        counts[fraction] = sum(int(line.split("\t")[1]) for line in (output / "added_tokens.tsv").read_text().splitlines())
    assert 0.4 * counts["0"] < counts["0.4"] < 0.8 * counts["0"]


def test_a_grown_model_grows_again(tiny_tokenizer, text, cache, words, tmp_path):
    small_model(len(tiny_tokenizer)).save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    PRETRAIN.main([*options(text, cache, words), "--model", str(tmp_path / "base"), "--output", str(tmp_path / "one")])
    words.write_text("learnmoney\n", encoding="utf-8")
    more = options(text, cache, words)
    more[more.index("--add-special-tokens"):more.index("--add-tokens")] = ["--add-special-tokens", "[date]"]
    PRETRAIN.main([*more, "--model", str(tmp_path / "one" / "final"), "--output", str(tmp_path / "two")])
    one, two = (AutoTokenizer.from_pretrained(tmp_path / name / "final") for name in ("one", "two"))
    assert set(two.get_vocab()) - set(one.get_vocab()) == {"learnmoney", "[date]"}
    assert set(two.all_special_ids) - set(one.all_special_ids) == {two.convert_tokens_to_ids("[date]")} and two.eos_token == "[EOT]"
    assert [line.split("\t")[0] for line in (tmp_path / "two" / "added_tokens.tsv").read_text().splitlines()] == ["learnmoney", "[date]"]
    assert load_file(tmp_path / "two" / "final" / "model.safetensors")["cls.predictions.bias"].shape == (len(two),)


# A size from scratch, and a prepared corpus.

def test_a_model_from_scratch_has_room_for_added_tokens(text, cache, words, tmp_path):
    words.write_text("River-2\nmoney water\n", encoding="utf-8")  # words that no vocabulary trained on the text holds
    PRETRAIN.main([*options(text, cache, words, rate="1e-3"), "--model", "tiny", *SIZES, "--vocab-size", "120", "--output",
                   str(tmp_path / "run")])
    model = BertForPreTraining.from_pretrained(tmp_path / "run" / "final")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "final")
    assert model.config.vocab_size == len(tokenizer) == len(model.cls.predictions.bias)
    assert {"river-2", "money water"} <= {entry.lower() for entry in tokenizer.get_vocab()}
    told = dict(line.split("\t") for line in (tmp_path / "run" / "added_tokens.tsv").read_text().splitlines())
    assert told.keys() == {"river-2", "money water", SPECIAL, "[EOT]"} and int(told["money water"]) > 10


def test_a_corpus_prepared_with_the_tokens_trains_like_its_text(tiny_tokenizer, text, cache, words, tmp_path):
    small_model(len(tiny_tokenizer)).save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    PREPARE.main(["--input", str(text), "--tokenizer", str(tmp_path / "base"), "--add-tokens", str(words), "--add-special-tokens", *ROLES,
                  "--cache", str(cache), "--output", str(tmp_path / "corpus")])
    for name, source in (("whole", text), ("run", tmp_path / "corpus")):
        PRETRAIN.main([*options(source, cache, words, steps=2, rate="1e-3"), "--model", str(tmp_path / "base"), "--output",
                       str(tmp_path / name)])
    assert_same_run(tmp_path / "whole", tmp_path / "run", step=2)
    assert math.isfinite(json.loads((tmp_path / "run" / "summary.json").read_text())["train_loss"])


# What is refused.

BAD = [
    ("teachbank\n\nbank river\n", [], "--add-tokens {words}, line 2: is blank; needed is a token"),
    ("", [], "--add-tokens {words}, line 1: is blank; needed is a token"),
    ("teachbank\nTeachBank\n", [], "--add-tokens {words}, line 2: 'TeachBank' is the same to the tokenizer as line 1; needed is"),
    ("teachbank\n", ["--add-special-tokens", "bank"], "--add-special-tokens bank: bank is a token already; needed is one that is new"),
    ("teachbank\n", ["--add-special-tokens", "[a]", "[a]"], "--add-special-tokens [a]: [a] is a token already; needed is one that is new"),
    ("teachbank\n", ["--add-special-tokens", "mask_token=[EOT]"],
     "--add-special-tokens mask_token=[EOT]: the model was trained with [MASK] as its mask_token"),
    ("bank\n", [], "--add-tokens {words}, line 1: 'bank' is a token already; needed are tokens that the vocabulary lacks"),
    (None, [], "--add-tokens {words}: cannot be read as UTF-8 text (No such file or directory)"),
    (b"\xff\xfe", [], "--add-tokens {words}: cannot be read as UTF-8 text ("),
    ("teachbank\n", ["--add-special-tokens", "king_token=[K]"], "--add-special-tokens king_token=[K]: king_token is none of "),
    ("teachbank\n", ["--add-special-tokens", " "], "--add-special-tokens ' ': is blank; needed is TOKEN or NAME=TOKEN"),
    ("teachbank\n", ["--new-vectors", "zero"], "--new-vectors: invalid choice: 'zero'"),
    ("teachbank\n", ["--add-tokens", ""], "--add-tokens : needed is a name, or the option left away"),
]


@pytest.mark.parametrize("base", ["bert"], indirect=True)
@pytest.mark.parametrize("content, more, message", BAD, ids=[message[:60] for _, _, message in BAD])
def test_bad_tokens_are_refused_in_one_message(base, content, more, message, text, cache, words, tmp_path, capsys):
    words.unlink()
    if content is not None:
        words.write_bytes(content if isinstance(content, bytes) else content.encode())
    argv = [*options(text, cache, words), "--model", base[1], "--output", tmp_path / "run", *more]
    told = refusal(PRETRAIN.main, argv, capsys)
    assert told.startswith(message.format(words=words)) and "\n" not in told
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("base", ["bert"], indirect=True)
def test_every_bad_token_is_named_at_once(base, text, cache, words, tmp_path, capsys):
    words.write_text("bank\n\nteachbank\nTEACHBANK\n", encoding="utf-8")
    told = refusal(PRETRAIN.main, [*options(text, cache, words), "--model", base[1], "--output", tmp_path / "run"], capsys)
    assert [line.partition(":")[0] for line in told.splitlines()] == [f"--add-tokens {words}, line {number}" for number in (1, 2, 4)]


@pytest.mark.parametrize("base", ["bert"], indirect=True)
def test_a_corpus_without_the_tokens_is_refused(base, text, cache, words, tmp_path, capsys):
    PREPARE.main(["--input", str(text), "--tokenizer", str(base[1]), "--cache", str(cache), "--output", str(tmp_path / "corpus")])
    argv = [*options(tmp_path / "corpus", cache, words), "--model", base[1], "--output", tmp_path / "run"]
    assert refusal(PRETRAIN.main, argv, capsys).startswith(f"--train {tmp_path / 'corpus'}: was prepared with the tokenizer ")
