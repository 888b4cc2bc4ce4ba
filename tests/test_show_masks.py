"""show_masks.py shows the batches that a run trains on, and its numbers equal a slow count."""

import re
from collections import Counter

import pytest
import torch
from conftest import SIZES, refusal, script

from pretrain.batch import IGNORED
from pretrain.config import Config
from pretrain.data.collate import Collator, pack
from pretrain.data.corpus import ENTITY_INSIDE, ENTITY_START, WORD_START
from pretrain.data.tokenizer import load
from pretrain.mask_setup import make_masking

SHOW_MASKS, PRETRAIN = script("show_masks"), script("pretrain")


@pytest.fixture(scope="module")
def files(tmp_path_factory, tiny_tokenizer) -> dict[str, str]:
    """A tokenizer and a lexicon."""
    folder = tmp_path_factory.mktemp("files")
    tiny_tokenizer.save_pretrained(folder / "tokenizer")
    (folder / "lexicon").write_text("river\nquickly banking\nmodelization tokens\n")
    return {name: str(folder / name) for name in ("tokenizer", "lexicon")}


@pytest.fixture
def show(text_file, cache, files, capsys):
    """The output of the command with more options, some of which name `files`."""

    def printed(more: str) -> list[str]:
        SHOW_MASKS.main([*base, *more.format(**files).split()])
        return capsys.readouterr().out.splitlines()

    base = ["--train", str(text_file), "--tokenizer", files["tokenizer"], "--cache", str(cache)]
    base += ["--max-length", "64"]
    printed.base = base
    return printed


@pytest.fixture
def collated(monkeypatch) -> list:
    """(examples packed, batch) of every micro-batch that is collated."""
    seen, original = [], Collator.__call__

    def observed(collator, examples):
        seen.append((pack(examples, collator.vocabulary), original(collator, examples)))
        return seen[-1][1]

    monkeypatch.setattr(Collator, "__call__", observed)
    return seen


def masked_places(batch) -> set[int]:
    """Masked places, without the ones that only fill the batch."""
    return set(batch.masked_positions[batch.labels["mlm"] != IGNORED].tolist())


# Numbers.


def units_of(flags, begins, continues) -> list[list[int]]:
    """The places of each unit, one token after the other."""
    units = []
    for place, flag in enumerate(flags):
        if begins(flag):
            units.append([place])
        elif continues(flag):
            units[-1].append(place)
    return units


def slow_counts(collated, tokenizer) -> Counter:
    """The counts, one token at a time."""
    special, mask_id = set(tokenizer.all_special_ids), tokenizer.mask_token_id
    counts = Counter()
    for packed, batch in collated:
        old, new, flags = packed.ids.tolist(), batch.input_ids.tolist(), packed.flags.tolist()
        masked = masked_places(batch)
        counts["tokens"] += len(old)
        counts["shortfall"] += batch.shortfall
        words = units_of(flags, lambda flag: flag & WORD_START, lambda flag: True)
        entities = units_of(
            flags, lambda flag: flag & ENTITY_START, lambda flag: flag & ENTITY_INSIDE
        )
        for name, units in (("words", words), ("entities", entities)):
            for unit in units:
                ordinary = [place for place in unit if old[place] not in special]
                hit = [place for place in ordinary if place in masked]
                counts[name] += bool(ordinary)
                counts[f"touched {name}"] += bool(hit)
                counts[f"whole {name}"] += bool(hit) and hit == ordinary
        for place, (before, after) in enumerate(zip(old, new)):
            counts["ordinary"] += before not in special
            if place not in masked:
                assert after == before
                continue
            counts["masked"] += 1
            counts["runs"] += place - 1 not in masked
            kind = "mask" if after == mask_id else "same" if after == before else "random"
            counts[kind] += 1
    return counts


STRATEGIES = {
    "token": "--recipe classic",
    "word": "--masking word --mask-rate 0.3 0.1",
    "entity": "--masking entity --lexicon {lexicon} --mask-split 0.5 0.3 0.2",
}


@pytest.mark.parametrize("name", STRATEGIES)
def test_numbers_equal_a_slow_count_of_the_batches(name, show, files, collated):
    told = show(f"{STRATEGIES[name]} --examples 0 --sampled 7")
    assert len(collated) == 7 and "[CLS]" not in " ".join(told)
    counts = slow_counts(collated, load(files["tokenizer"]))
    lines = {line.split("  ")[0]: line for line in told}

    def shares(label: str) -> list[str]:
        return re.findall(r"[\d.]+%", lines[label])

    def expected(*parts: tuple[str, str]) -> list[str]:
        return [f"{100 * counts[part] / counts[whole]:.1f}%" for part, whole in parts]

    (head,) = (line for line in told if line.startswith("masking "))
    assert f" {counts['tokens']:,} tokens" in head
    rates = {"token": "0.15;", "word": "0.3 (of 0.3 to 0.1,"}
    assert f"mask rate {rates.get(name, '0.3 (of 0.3 to 0.15,')}" in head  # that of a run
    assert shares("masked") == expected(("masked", "ordinary"), ("shortfall", "masked"))
    kinds = ("mask", "random", "same")
    assert shares("replaced by") == expected(*((kind, "masked") for kind in kinds))
    assert f" {counts['masked'] / counts['runs']:.2f} tokens" in lines["in a row"]
    assert f" {counts['ordinary'] / counts['words']:.2f} tokens" in lines["words"]
    words = (("touched words", "words"), ("whole words", "touched words"))
    assert shares("words") == expected(*words)
    assert (counts["entities"] > 0) is ("entities" in lines) is (name == "entity")
    if name == "entity":
        entities = (("whole entities", "entities"), ("touched entities", "entities"))
        assert f" {counts['entities']:,};" in lines["entities"]
        assert shares("entities") == expected(*entities)
    assert (counts["whole words"] == counts["touched words"]) is (name != "token")


def test_the_batches_are_those_that_a_run_trains_on(show, collated, tmp_path):
    task = ["--masking", "word", "--seed", "3", "--mask-rate", "0.2", "0.4"]
    show(" ".join([*task, "--examples 0 --sampled 2"]))
    shown = [batch for _, batch in collated]
    run = "--model tiny --batch-size 64 --micro-batch-size 32 --max-steps 1 --eval-tokens 600"
    run = [*run.split(), "--precision", "fp32", *SIZES, "--output", str(tmp_path / "run")]
    PRETRAIN.main([*show.base, *task, *run])
    for one, other in zip(shown, [batch for _, batch in collated[-2:]], strict=True):
        assert torch.equal(one.input_ids, other.input_ids)
        assert torch.equal(one.masked_positions, other.masked_positions)
        assert all(torch.equal(one.labels[name], other.labels[name]) for name in one.labels)


def test_the_table_of_a_run_has_no_special_token(tiny_tokenizer, vocabulary, tmp_path):
    """Neither unknown words nor text that is read as a special token may be drawn in place of
    words."""
    path = tmp_path / "similar.tsv"
    lines = ["a\t\u2603\t[MASK]\tb", "\u2603\tb", "b\t[SEP]\tc", "[MASK]\tc"]
    path.write_text("\n".join(lines), encoding="utf-8")
    config = Config(masking="word", replace="similar", similar=str(path))
    table = make_masking(config, tiny_tokenizer, vocabulary).similar
    assert set(tiny_tokenizer.convert_ids_to_tokens(table.ids.tolist())) == {"b", "c"}


# Examples.


def test_batches_are_saved_in_a_new_folder_but_not_as_one(show, tmp_path, capsys):
    target = tmp_path / "new" / "batch.pt"
    show(f"--sampled 1 --save {target}")
    assert torch.load(target)
    argv = [*show.base, "--save", str(tmp_path)]
    assert refusal(SHOW_MASKS.main, argv, capsys).startswith(f"--save {tmp_path}: ")


def test_a_phase_is_shown_as_at_its_first_step(show):
    show.base.remove("--max-length")
    show.base.remove("64")
    phases = "--phases 16:0.6 32:0.4 --mask-rate 0.3 0.1 --phase"
    for number, rate in ((1, 0.3), (2, 0.18)):
        assert any(f"mask rate {rate} (of" in line for line in show(f"{phases} {number}"))


def test_an_example_shows_tokens_and_replacements(show, files, collated):
    """Without color, as many as asked for: a mask after its token, another token in brackets, [=]
    if it stays, an entity between < and >."""
    entities = "--masking entity --lexicon {lexicon} --mask-split 0.4 0.3 0.3"
    told = show(f"{entities} --examples 9 --sampled 1")
    shown = [line.split(" ") for line in told if line.startswith("[CLS]")]
    tokenizer, ((packed, batch),), kinds = load(files["tokenizer"]), collated, set()
    masked, expected, start = masked_places(batch), [], 0
    for length in batch.lengths[: min(9, batch.num_sequences)]:
        expected.append([])
        for place in range(start, start + length):
            ids = [int(packed.ids[place]), int(batch.input_ids[place])]
            word, new = tokenizer.convert_ids_to_tokens(ids)
            if place in masked:
                kinds.add(new if new == "[MASK]" else new == word)
                word += new if new == "[MASK]" else "[=]" if new == word else f"[{new}]"
            in_entity = packed.flags[place] & (ENTITY_START | ENTITY_INSIDE)
            expected[-1].append(f"<{word}>" if in_entity else word)
        start += length
    assert shown == expected and kinds == {"[MASK]", True, False}
    assert any(word[0] == "<" for line in shown for word in line)


def test_color_codes_follow_the_option(show):
    options = "--masking entity --lexicon {lexicon} --examples 9 --sampled 1 --color"
    show(f"{options} off")  # the corpus is in the cache from now on
    plain, told = show(f"{options} off"), "\n".join(show(f"{options} on"))
    assert show(f"{options} auto") == plain  # the output is not a terminal here
    codes = re.compile(r"\x1b\[([0-9;]*)m")
    assert {"1;31", "1;35", "1;33", "4"} <= set(codes.findall(told))
    numbers = [line for line in plain if not line.startswith("[CLS]")]
    uncolored = codes.sub("", told).splitlines()
    assert [line for line in uncolored if not line.startswith("[CLS]")] == numbers


@pytest.mark.parametrize(
    "more",
    [
        "--examples -1",
        "--sampled 0",
        "--phase 2",
        "--position 0 1",
        "--position 0 0 0 1.5",
        "--position 99 99 99",
        "--position 0 0 99",
        "--color blue",
        "--masking entity",
        "--tokenizer absent",
    ],
)
def test_bad_options_are_one_message(more, show, capsys):
    refusal(SHOW_MASKS.main, [*show.base, *more.split()], capsys, f"{more}: ")
