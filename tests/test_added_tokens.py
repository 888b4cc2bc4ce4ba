"""Tokens added to the vocabulary of a checkpoint: each stays whole, its vectors are the mean of the
pieces it replaces, the weights grow together and stay tied, special ones are never masked,
and the run resumes without the file that named them."""

import itertools
import re
import shlex

import pytest
import torch
from conftest import (
    SIZES,
    arguments_of,
    assert_same_run,
    interrupted_copy,
    refusal,
    save,
    script,
    write_documents,
)
from packed_reference import small_stock
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM, AutoTokenizer, BertForPreTraining, RobertaForMaskedLM

from pretrain.data.corpus import Corpus
from pretrain.data.tokenizer import describe
from pretrain.files import read_json

PRETRAIN, PREPARE = script("pretrain"), script("prepare")
# One word, one with a mark, two words, one that does not occur.
WORDS = ["teachbank", "River-2", "money water", "neverseen"]
SPECIALS = ["[name]", "[EOT]"]
ROLES = ["--add-special-tokens", "[name]", "eos_token=[EOT]"]
# Rows of the table beyond the entries of the tokenizer.
KINDS = {"bert": 0, "rounded up": 16, "roberta": 0}
SHOWN = ["a teachbank", "the river-2 and River-2", "money water", "[name] taught teachbank"]
SHOWN += ["[EOT]", "teachbanks xteachbank"]


@pytest.fixture(scope="module")
def text(documents, tmp_path_factory):
    """The text with the new words in every third sentence, so that some documents hold many."""
    endings = itertools.cycle(end for shown in SHOWN for end in ("", "", f" {shown} ."))
    marked = [[sentence + next(endings) for sentence in document] for document in documents]
    return write_documents(tmp_path_factory.mktemp("added") / "text.txt", marked)


@pytest.fixture
def words(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def base(request, tiny_tokenizer, roberta_tokenizer, tmp_path_factory):
    """The folder of a checkpoint with noise on every weight, named after its kind."""
    kind, tokenizer = ("bert", "ForPreTraining"), tiny_tokenizer
    if request.param == "roberta":
        kind, tokenizer = ("roberta", "ForMaskedLM"), roberta_tokenizer
    settings = {"hidden_dropout_prob": 0.1, "pad_token_id": tokenizer.pad_token_id}
    model = small_stock(*kind, len(tokenizer) + KINDS[request.param], **settings)
    return save(tmp_path_factory.mktemp("base") / request.param, model, tokenizer)


@pytest.fixture
def arguments(text, cache):
    """Options of a short run; at the default rate, its first step barely changes the weights."""

    def make(output, *more, steps=1, rate="1e-30", train=text, roles=ROLES) -> list[str]:
        files = ["--train", train, "--cache", cache, "--output", output]
        size = "--max-length 64 --batch-size 16 --micro-batch-size 8 --eval-tokens 600 --keep 9"
        task = f"--objective mlm --precision fp32 --max-steps {steps} --learning-rate {rate}"
        return arguments_of(files, size, task, "--save-every 2", roles, more)

    return make


@pytest.fixture
def run(arguments, words, tmp_path):
    """Train with the new tokens; returns the run folder."""

    def train(model, *more, output=tmp_path / "run", **settings):
        given = ["--model", model, "--add-tokens", words, *more]
        PRETRAIN.main(arguments(output, *given, **settings))
        return output

    return train


only = pytest.mark.parametrize("base", ["bert"], indirect=True)
both = pytest.mark.parametrize("base", ["bert", "roberta"], indirect=True)


def final_tokenizer(output):
    return AutoTokenizer.from_pretrained(output / "final")


def final_weights(output):
    return load_file(output / "final" / "model.safetensors")


def counts_of(output) -> dict[str, int]:
    """Token -> how often it occurs in the training text, in the order of the file."""
    lines = (output / "added_tokens.tsv").read_text().splitlines()
    return {token: int(count) for token, count in (line.split("\t") for line in lines)}


@pytest.mark.parametrize(
    ("base", "new_vectors"),
    [("bert", "mean"), ("bert", "random"), ("rounded up", "mean"), ("roberta", "mean")],
    indirect=["base"],
)
def test_new_vectors_and_biases_are_the_mean_of_the_pieces_and_old_ones_stay(
    base, run, new_vectors
):
    """The model also opens with the stock class at its new size."""
    is_roberta = base.name == "roberta"
    output = run(base, "--new-vectors", new_vectors)
    before, after = AutoTokenizer.from_pretrained(base), final_tokenizer(output)
    numbers = after.convert_tokens_to_ids([*WORDS, *SPECIALS])
    assert sorted(numbers) == list(range(len(before), len(before) + 6))
    assert after.eos_token == "[EOT]"
    old, new = load_file(base / "model.safetensors"), final_weights(output)
    endings = ("word_embeddings.weight", "predictions.bias", "lm_head.bias")
    tables = [name for name in new if name.endswith(endings)]
    assert old.keys() == new.keys() and len(tables) == 2
    for name in new.keys() - set(tables):
        assert torch.equal(new[name], old[name]), name
    for name in tables:
        size = max(len(after), len(before) + KINDS[base.name])
        assert len(new[name]) == size
        kept = new[name][: len(before)]
        torch.testing.assert_close(kept, old[name][: len(before)], atol=1e-20, rtol=0.0)
        for number, token in zip(numbers, [*WORDS, *SPECIALS]):
            space = " " if is_roberta and token in WORDS else ""
            pieces = before(space + token, add_special_tokens=False).input_ids
            is_mean = torch.allclose(new[name][number], old[name][pieces].mean(0), atol=1e-6)
            assert is_mean == (new_vectors == "mean"), (name, token)
    stock = RobertaForMaskedLM if is_roberta else BertForPreTraining
    model, info = stock.from_pretrained(output / "final", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    decoder = model.get_output_embeddings()
    assert model.config.vocab_size == size == len(decoder.bias)
    assert decoder.weight.shape == (size, 32)
    assert decoder.weight is model.get_input_embeddings().weight
    assert decoder.bias is (model.lm_head if is_roberta else model.cls.predictions).bias
    inputs = after("a teachbank", return_tensors="pt")
    with torch.no_grad():  # as a pipeline does: the new tokens go in and are scored
        logits = AutoModelForMaskedLM.from_pretrained(output / "final")(**inputs).logits
    assert logits.shape[-1] == size and torch.isfinite(logits).all()


@both
def test_the_corpus_holds_the_tokens_whole_and_their_number_is_printed(base, run, text, capsys):
    output, lower = run(base, "--valid-fraction", "0"), base.name == "bert"
    river = r"\b[Rr]iver-2\b" if lower else r"\bRiver-2\b"
    patterns = {"teachbank": r"\bteachbank\b", "River-2": river, "money water": r"\bmoney water\b"}
    patterns |= {"neverseen": "neverseen", "[name]": r"\[name\]", "[EOT]": r"\[EOT\]"}
    slow = {token: len(re.findall(each, text.read_text())) for token, each in patterns.items()}
    assert slow["neverseen"] == 0 < slow["River-2"]
    shown = {token.lower() if lower and token in WORDS else token: slow[token] for token in slow}
    assert counts_of(output) == shown
    assert list(counts_of(output).values()) == sorted(slow.values(), reverse=True)
    total = sum(slow.values())
    assert f" {total:,} occurrences" in capsys.readouterr().out
    state = read_json(output / "checkpoint-1" / "training_state.json")
    tokenizer = final_tokenizer(output)
    ids = Corpus(state["corpus_folders"]["train"]).shard(0).ids.tolist()
    assert {token: ids.count(tokenizer.convert_tokens_to_ids(token)) for token in slow} == slow
    # After saving and loading, too.
    ids = tokenizer("a money water, River-2 and [name]", add_special_tokens=False).input_ids
    assert set(tokenizer.convert_tokens_to_ids(["money water", "River-2", "[name]"])) <= set(ids)


@both
def test_special_tokens_are_read_and_never_masked(base, run, steps_seen):
    output = run(base, "--masking", "word", "--mask-rate", "0.5", steps=6)
    tokenizer = final_tokenizer(output)
    special = tokenizer.convert_tokens_to_ids(SPECIALS)
    ordinary = tokenizer.convert_tokens_to_ids(["teachbank", "money water"])
    is_special = describe(tokenizer).is_special
    assert is_special[special].all() and not is_special[ordinary].any()
    read, masked = set(), set()
    for batch in (batch for batches in steps_seen for batch in batches):
        read |= set(batch.input_ids.tolist())
        masked |= set(batch.labels["mlm"].tolist())
        masked |= set(batch.input_ids[batch.masked_positions].tolist())
    assert set(special) <= read and set(ordinary) <= masked and not set(special) & masked


@only
def test_a_run_resumes_without_the_file_of_tokens(base, run, words, tmp_path):
    whole = run(base, output=tmp_path / "whole", steps=4, rate="1e-3")
    words.unlink()
    resumed = interrupted_copy(whole, tmp_path / "run", 2)
    PRETRAIN.main(["--resume", "--output", str(resumed)])
    assert_same_run(whole, resumed, step=4)
    assert counts_of(whole) == counts_of(resumed)
    before, after = final_tokenizer(whole), final_tokenizer(resumed)
    assert before.get_vocab() == after.get_vocab()
    assert before.all_special_ids == after.all_special_ids


@only
def test_a_grown_model_grows_again(base, run, words, tmp_path):
    first = run(base, output=tmp_path / "one")
    words.write_text("learnmoney\n", encoding="utf-8")
    more = {"roles": ["--add-special-tokens", "[date]"], "output": tmp_path / "two"}
    second = run(first / "final", **more)
    one, two = final_tokenizer(first), final_tokenizer(second)
    assert set(two.get_vocab()) - set(one.get_vocab()) == {"learnmoney", "[date]"}
    new_specials = set(two.all_special_ids) - set(one.all_special_ids)
    assert new_specials == {two.convert_tokens_to_ids("[date]")} and two.eos_token == "[EOT]"
    assert list(counts_of(second)) == ["learnmoney", "[date]"]
    assert len(final_weights(second)["cls.predictions.bias"]) == len(two)


def test_a_model_from_scratch_has_room_for_added_tokens(run, words):
    words.write_text("River-2\nmoney water\n", encoding="utf-8")  # in no trained vocabulary
    output = run("tiny", *SIZES, "--vocab-size", "120", rate="1e-3")
    model, tokenizer = BertForPreTraining.from_pretrained(output / "final"), final_tokenizer(output)
    assert model.config.vocab_size == len(tokenizer) == len(model.cls.predictions.bias)
    assert {"river-2", "money water"} <= {entry.lower() for entry in tokenizer.get_vocab()}
    counts = counts_of(output)
    assert counts.keys() == {"river-2", "money water", *SPECIALS} and counts["money water"] > 10


def test_a_vocabulary_with_a_gap_is_refused(arguments, words, tmp_path, capsys):
    """A new token would take the id of another one."""
    entries = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "river", "river", "bank"]
    (tmp_path / "vocab.txt").write_text("\n".join(entries), "utf-8")
    given = ["--model", "tiny", "--tokenizer", tmp_path, "--add-tokens", words]
    argv = arguments(tmp_path / "run", *given, roles=[])
    refusal(PRETRAIN.main, argv, capsys, f"--add-tokens {words}: ")


@only
def test_a_prepared_corpus_trains_like_its_text_if_it_has_the_tokens(
    base, run, arguments, text, cache, words, tmp_path, capsys
):
    printed = {}
    for name, more in (("with", ["--add-tokens", words, *ROLES]), ("without", [])):
        given = ["--input", text, "--tokenizer", base, "--cache", cache, *more]
        PREPARE.main([str(part) for part in [*given, "--output", tmp_path / name]])
        printed[name] = shlex.split(capsys.readouterr().out.rpartition("pretrain.py")[2])
    whole = run(base, steps=2, rate="1e-3", output=tmp_path / "whole")
    short = arguments(tmp_path / "printed", steps=2, rate="1e-3", roles=[])
    PRETRAIN.main([*short, *printed["with"]])
    assert_same_run(whole, tmp_path / "printed", step=2)
    output = run(base, steps=2, rate="1e-3", train=tmp_path / "with")
    assert_same_run(whole, output, step=2)
    given = ["--model", base, "--add-tokens", words]
    argv = arguments(tmp_path / "other", *given, train=tmp_path / "without")
    assert refusal(PRETRAIN.main, argv, capsys).startswith(f"--train {tmp_path / 'without'}: ")


@only
@pytest.mark.parametrize(
    "raw, more, named",
    [
        (None, [], "--add-tokens {words}: "),
        (b"\n\n", [], "--add-tokens {words}: "),
        (b"teachbank\n", ["--new-vectors", "zero"], "--new-vectors"),
    ],
)
def test_bad_tokens_are_refused_in_one_message(
    base, arguments, words, tmp_path, capsys, raw, more, named
):
    words.unlink() if raw is None else words.write_bytes(raw)
    given = ["--model", base, "--add-tokens", words, *more]
    output, begins = tmp_path / "run", named.format(words=words)
    refusal(PRETRAIN.main, arguments(output, *given), capsys, begins, output)


@only
def test_every_bad_token_is_named_at_once(base, arguments, words, tmp_path, capsys):
    """A name with a typo, and tokens between commas, are not taken for new tokens."""
    good = ["[a]", "bos_token=[SEP]", "eos_token=[A]", "[b=c]", "a,b"]
    bad = ["bank", "[a]", "teachbank", " ", "mask_token=[E]", "eos_token=[B]"]
    bad += ["eos_tokn=[EOT]", "[name],[gender]"]
    roles = ["--add-special-tokens", *good, *bad]
    given = ["--model", base, "--add-tokens", words]
    told = refusal(PRETRAIN.main, arguments(tmp_path / "run", *given, roles=roles), capsys)
    places = [f"--add-special-tokens {entry}" for entry in bad]
    assert [line.partition(": ")[0] for line in told.splitlines()] == places


@only
def test_words_that_are_not_new_are_skipped_and_counted(base, run, words, capsys):
    new = ["teachbank", "\u2603"]
    words.write_text("\n".join([*new, "bank", "", "[MASK]", "", "TEACHBANK"]), encoding="utf-8")
    output = run(base, roles=[])
    before = AutoTokenizer.from_pretrained(base).get_vocab()
    assert final_tokenizer(output).get_vocab().keys() - before.keys() == set(new)
    (line,) = re.findall(f"^--add-tokens {words}: .*", capsys.readouterr().out, re.MULTILINE)
    counts = [int(number) for number in re.findall(r"(?<= )\d+(?= )", line)]
    assert counts == [len(new), 2, 2, 1]
