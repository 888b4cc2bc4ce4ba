"""show_masks.py shows the batches that a run trains on, and its numbers equal a slow count; fill_mask.py shows what transformers' own
model predicts; both tell bad input in one message."""
import re
import shutil
from itertools import chain

import pytest
import torch
from conftest import SIZES, refusal, script
from packed_reference import small_config
from transformers import AutoModelForMaskedLM, AutoTokenizer, BertModel

from pretrain.batch import IGNORED
from pretrain.data.collate import Collator, pack
from pretrain.data.corpus import ENTITY_INSIDE, ENTITY_START, WORD_START
from pretrain.data.tokenizer import load

SHOW_MASKS, FILL_MASK, PRETRAIN = script("show_masks"), script("fill_mask"), script("pretrain")
ANSI = re.compile(r"\x1b\[[0-9;]*m")


TABLE = {"bank": ["money", "model"], "river": ["money"], "money": ["river"]}  # of similar words


@pytest.fixture(scope="module")
def files(tmp_path_factory, tiny_tokenizer):
    """A tokenizer, a lexicon, a table of similar words."""
    folder = tmp_path_factory.mktemp("files")
    tiny_tokenizer.save_pretrained(folder / "tokenizer")
    (folder / "terms.txt").write_text("river\nquickly banking\nmodelization tokens\n", encoding="utf-8")
    (folder / "similar.tsv").write_text("".join("\t".join([word, *others]) + "\n" for word, others in TABLE.items()), encoding="utf-8")
    return {"tokenizer": str(folder / "tokenizer"), "lexicon": str(folder / "terms.txt"), "similar": str(folder / "similar.tsv")}


@pytest.fixture
def arguments(text_file, cache, files):
    return ["--train", str(text_file), "--tokenizer", files["tokenizer"], "--max-length", "64", "--cache", str(cache)]


@pytest.fixture
def collated(monkeypatch):
    """(examples packed, batch) of every micro-batch that is collated."""
    seen, original = [], Collator.__call__

    def observed(collator, examples):
        seen.append((pack(examples, collator.vocabulary), original(collator, examples)))
        return seen[-1][1]

    monkeypatch.setattr(Collator, "__call__", observed)
    return seen


# Masks.

def units_of(flags, begins, goes_on):
    """Lists of the places of each unit, one token after the other."""
    units = []
    for place, flag in enumerate(flags):
        if begins(flag):
            units.append([place])
        elif goes_on(flag):
            units[-1].append(place)
    return units


def masked_places(batch):
    """Without those that only fill the batch."""
    return set(batch.masked_positions[batch.masked_lm_labels != IGNORED].tolist())


def slow_counts(collated, tokenizer, by_similar):
    """The numbers that are shown, one token at a time."""
    special, mask_id = set(tokenizer.all_special_ids), tokenizer.mask_token_id
    ids = {word: tokenizer.encode(word, add_special_tokens=False) for word in {*TABLE, *chain.from_iterable(TABLE.values())}}
    in_table = [ids[word] for word, others in TABLE.items() if any(len(ids[other]) == len(ids[word]) for other in others)]
    counts = dict.fromkeys(("tokens", "ordinary", "masked", "shortfall", "mask", "same", "similar", "random", "runs", "words",
                            "touched words", "whole words", "entities", "touched entities", "whole entities"), 0)
    for packed, batch in collated:
        old, new, flags = packed.ids.tolist(), batch.input_ids.tolist(), packed.flags.tolist()
        masked = masked_places(batch)
        counts["tokens"] += len(old)
        counts["shortfall"] += batch.shortfall
        for place, (before, after) in enumerate(zip(old, new)):
            counts["ordinary"] += before not in special
            if place in masked:
                counts["masked"] += 1
                counts["mask" if after == mask_id else "same" if after == before else "random"] += 1
                counts["runs"] += place - 1 not in masked
            else:
                assert after == before
        units = {"words": units_of(flags, lambda flag: flag & WORD_START, lambda flag: True),
                 "entities": units_of(flags, lambda flag: flag & ENTITY_START, lambda flag: flag & ENTITY_INSIDE)}
        for name, found in units.items():
            for unit in found:
                if by_similar and name == "words" and [old[place] for place in unit] in in_table:
                    moved = sum(old[place] != new[place] for place in unit)
                    counts["similar"], counts["random"] = counts["similar"] + moved, counts["random"] - moved
                ordinary = [place for place in unit if old[place] not in special]
                hit = [place for place in ordinary if place in masked]
                counts[name] += bool(ordinary)
                counts[f"touched {name}"] += bool(hit)
                counts[f"whole {name}"] += bool(hit) and hit == ordinary
    return counts


STRATEGIES = {
    "token": [], "word": ["--masking", "word", "--mask-rate", "0.3", "0.1"], "span": ["--masking", "span", "--objective", "mlm"],
    "entity": ["--masking", "entity", "--lexicon", "{lexicon}", "--mask-split", "0.5", "0.3", "0.2"],
    "similar": ["--masking", "word", "--replace", "similar", "--similar", "{similar}", "--mask-split", "0.9", "0", "0.1"],
}


@pytest.mark.parametrize("name", STRATEGIES)
def test_numbers_equal_a_slow_count_of_the_batches(name, arguments, files, collated, capsys):
    more = [part.format(**files) for part in STRATEGIES[name]]
    SHOW_MASKS.main([*arguments, *more, "--examples", "0", "--sampled", "7"])
    told = capsys.readouterr().out
    tokenizer = load(files["tokenizer"])
    assert len(collated) == 7 and "[CLS]" not in told
    counts = slow_counts(collated, tokenizer, name == "similar")

    def share(part, whole):
        return f"{100 * counts[part] / counts[whole]:.1f}%"

    lines = {line.split("  ")[0]: line for line in told.splitlines()}
    assert f"{counts['tokens']:,} tokens" in told and (": 0.3 to 0.1" if name == "word" else " 0.15 ").strip(": ") in told
    assert re.findall(r"[\d.]+%", lines["masked"]) == [share("masked", "ordinary"), share("shortfall", "masked")]
    assert re.findall(r"[\d.]+%", lines["replaced by"]) == [
        share(kind, "masked") for kind in ("mask", "random", "similar", "same") if counts[kind]]
    assert (counts["mask"] == 0) is (name == "similar")
    assert f" {counts['masked'] / counts['runs']:.2f} tokens" in lines["in a row"]
    assert f" {counts['ordinary'] / counts['words']:.2f} tokens each" in lines["words"]
    assert re.findall(r"[\d.]+%", lines["words"]) == [share("touched words", "words"), share("whole words", "touched words")]
    assert (counts["entities"] > 0) is ("entities" in lines) is (name == "entity")
    if name == "entity":
        assert re.findall(r"[\d.,]+(?:%|;)", lines["entities"]) == [
            f"{counts['entities']:,};", share("whole entities", "entities"), share("touched entities", "entities")]
    if name in ("word", "similar"):
        assert counts["whole words"] == counts["touched words"]


def test_the_batches_are_those_that_a_run_trains_on(arguments, collated, tmp_path):
    options = [*arguments, "--masking", "word", "--seed", "3", "--model", "tiny", *SIZES, "--mask-rate", "0.2", "0.4"]
    SHOW_MASKS.main([*options, "--examples", "0", "--sampled", "2"])
    shown = [batch for _, batch in collated]
    collated.clear()
    PRETRAIN.main([*options, "--batch-size", "64", "--max-steps", "1", "--eval-tokens", "600", "--precision", "fp32", "--output",
                   str(tmp_path / "run")])
    trained = [batch for _, batch in collated[-2:]]  # after the held-out ones
    for name in ("input_ids", "masked_positions", "masked_lm_labels", "next_sentence_label"):
        assert all(torch.equal(getattr(one, name), getattr(other, name)) for one, other in zip(shown, trained, strict=True)), name


@pytest.mark.parametrize("number", [0, 1, 5, 40])
def test_as_many_examples_are_shown_as_asked_for(number, arguments, collated, capsys):
    SHOW_MASKS.main([*arguments, "--examples", str(number), "--sampled", "3"])
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("[CLS]")]
    assert len(shown) == min(number, sum(batch.num_sequences for _, batch in collated))


def test_an_example_shows_what_stood_there_and_what_is_read(arguments, files, collated, capsys):
    """Without colour: a mask after its token, another token in brackets, [=] where it stays, an entity between < and >."""
    SHOW_MASKS.main([*arguments, "--masking", "entity", "--lexicon", files["lexicon"], "--examples", "9", "--mask-split", "0.4", "0.3",
                     "0.3", "--sampled", "1"])
    shown = [line.split(" ") for line in capsys.readouterr().out.splitlines() if line.startswith("[CLS]")]
    tokenizer, ((packed, batch),), kinds = load(files["tokenizer"]), collated, set()
    masked, expected, start = masked_places(batch), [], 0
    for length in batch.lengths[:min(9, batch.num_sequences)]:
        expected.append([])
        for place in range(start, start + length):
            old, new = tokenizer.convert_ids_to_tokens([int(packed.ids[place]), int(batch.input_ids[place])])
            word = old
            if place in masked:
                word += new if new == "[MASK]" else "[=]" if new == old else f"[{new}]"
                kinds.add(new if new == "[MASK]" else new == old)
            expected[-1].append(f"<{word}>" if packed.flags[place] & (ENTITY_START | ENTITY_INSIDE) else word)
        start += length
    assert shown == expected and kinds == {"[MASK]", True, False} and any(word[0] == "<" for line in shown for word in line)


@pytest.mark.parametrize("colour, expected", [("on", True), ("off", False), ("auto", False)])  # the output is no terminal here
def test_colour_codes_stand_where_they_are_asked_for(colour, expected, arguments, files, capsys):
    more = ["--masking", "entity", "--lexicon", files["lexicon"], "--examples", "9", "--sampled", "1"]
    SHOW_MASKS.main([*arguments, *more, "--colour", colour])
    told = capsys.readouterr().out
    assert bool(ANSI.search(told)) is expected
    SHOW_MASKS.main([*arguments, *more, "--colour", "off"])
    plain = capsys.readouterr().out
    examples, numbers = ([line for line in text.splitlines() if line.startswith("[CLS]") is shown] for text, shown in (
        (ANSI.sub("", told), True), (told.replace("(prepared in", "(found in"), False)))
    assert len(examples) == 9 and numbers == [line for line in plain.splitlines() if not line.startswith("[CLS]")]
    if expected:
        assert {"1;31", "1;35", "1;33", "4"} <= set(re.findall(r"\x1b\[([1-9;]+)m", told))
        assert told.count("\x1b[0m") == len(ANSI.findall(told)) / 2


def test_without_text_the_embedded_one_is_shown(cache, capsys):
    SHOW_MASKS.main(["--cache", str(cache), "--vocab-size", "500", "--examples", "2", "--sampled", "2"])
    assert capsys.readouterr().out.count("[CLS]") >= 2


@pytest.mark.parametrize("more, message", [
    (["--examples", "-1"], "--examples -1: needed is a whole number of at least 0"),
    (["--sampled", "0"], "--sampled 0: needed is a whole number of at least 1"),
    (["--colour", "blue"], "--colour: invalid choice: 'blue'"),
    (["--mask-rate", "0.1", "0.9"], "--mask-rate 0.1 0.9: needed is one or two shares"),
    (["--replace", "similar"], "--replace similar: needed is a table"),
    (["--masking", "entity"], "--masking entity: --train brings no entities"),
    (["--train", "absent.txt"], "--train absent.txt: no such file"),
    (["--tokenizer", "absent"], "--tokenizer absent: no such folder or vocab.txt"),
    (["--batch-size", "8"], "unrecognized arguments: --batch-size 8"),
], ids=" ".join)
def test_bad_options_of_show_masks_are_told_in_one_message(more, message, arguments, capsys):
    told = refusal(SHOW_MASKS.main, [*arguments, *more], capsys)
    assert told.startswith(message) and "\n" not in told


# Filling.

@pytest.fixture(scope="module")
def model(text_file, cache, tmp_path_factory):
    """The folder final of a short run."""
    output = tmp_path_factory.mktemp("fill") / "run"
    PRETRAIN.main(["--train", str(text_file), "--model", "tiny", *SIZES, "--vocab-size", "120", "--max-length", "32", "--batch-size", "16",
                   "--micro-batch-size", "8", "--max-steps", "20", "--cache", str(cache), "--eval-tokens", "600", "--learning-rate", "1e-2",
                   "--objective", "mlm", "--precision", "fp32", "--output", str(output)])
    return output / "final"


def tables(told):
    """[[(token, score, sentence)]] as printed."""
    found = []
    for block in told.strip().split("\n\n"):
        head, *lines = block.split("\n")
        assert head.split() == ["token", "score", "sentence"]
        found.append([(line[:16].strip(), float(line[16:24]), line[26:]) for line in lines])
    return found


@pytest.mark.parametrize("texts", [["bank [MASK] river ."], ["[MASK] bank [MASK] river [MASK] .", "money [MASK]"]], ids=["one", "several"])
def test_scores_equal_the_stock_models_softmax(texts, model, capsys):
    FILL_MASK.main(["--model", str(model), "--top", "4", *texts])
    found = tables(capsys.readouterr().out)
    tokenizer, stock, expected = AutoTokenizer.from_pretrained(model), AutoModelForMaskedLM.from_pretrained(model).eval(), []
    for text in texts:
        inputs = tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            best = stock(**inputs).logits[inputs.input_ids == tokenizer.mask_token_id].softmax(-1).topk(4)
        for number, (scores, ids) in enumerate(zip(best.values.tolist(), best.indices.tolist())):
            parts, rows = text.split("[MASK]"), []
            for score, token in zip(scores, tokenizer.convert_ids_to_tokens(ids)):
                rows.append((token, score, "[MASK]".join(parts[:number + 1]) + token + "[MASK]".join(parts[number + 1:])))
            expected.append(rows)
    assert list(map(len, found)) == list(map(len, expected)) == [4] * sum(text.count("[MASK]") for text in texts)
    for (token, score, sentence), (right_token, right_score, right_sentence) in zip(sum(found, []), sum(expected, [])):
        assert (token, sentence) == (right_token, right_sentence) and score == pytest.approx(right_score, abs=1e-4)


def test_bad_input_of_fill_mask_is_told_in_one_message(model, vocabulary, tmp_path, capsys):
    headless = tmp_path / "headless"
    BertModel(small_config(vocabulary.size)).save_pretrained(headless)
    for path in model.glob("tokenizer*"):
        shutil.copy(path, headless)
    bare = tmp_path / "bare"  # without a tokenizer
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(model / name, bare)
    for argv, message in (
            (["--model", model, "bank river ."], "'bank river .': has 0 masks and 5 tokens; needed is a [MASK] or more"),
            (["--model", model, "[MASK] " + "bank " * 600], "'[MASK] bank bank"),
            (["--model", headless, "[MASK]"], f"--model {headless}: has no MLM head, so it cannot fill masks; needed is a"),
            (["--model", bare, "[MASK]"], f"--model {bare}: the folder holds no tokenizer, none of tokenizer.json"),
            (["--model", tmp_path / "absent", "[MASK]"], f"--model {tmp_path / 'absent'}: is no size (tiny, mini, small, medium, base"),
            (["[MASK]"], "--model: needed is a model that fills masks"),
            (["--model", model], "TEXT: needed is a sentence with [MASK], in quotes"),
            (["--model", model, "--top", "0", "[MASK]"], "--top 0: needed is a whole number of at least 1"),
            (["--model", model, "--top", "many", "[MASK]"], "--top: invalid int value: 'many'")):
        told = refusal(FILL_MASK.main, argv, capsys)
        assert told.startswith(message) and "\n" not in told


def test_no_more_tokens_are_shown_than_there_are(model, vocabulary, capsys):
    FILL_MASK.main(["--model", str(model), "--top", "100000", "[MASK]"])
    assert len(capsys.readouterr().out.splitlines()) == 1 + vocabulary.size + 1
