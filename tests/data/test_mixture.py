"""Mixtures: whose turn it is, against a slow form in fractions, and positions against a slow walk.
test_mix.py compares the steps of runs."""

import json
from fractions import Fraction
from itertools import islice

import pytest
from conftest import make_documents, write_documents
from hypothesis import given
from hypothesis import strategies as st

from pretrain.data.loader import PretrainingDataset
from pretrain.data.mixture import Mixture, furthest_behind
from pretrain.data.pairs import Task
from pretrain.data.prepare import prepare
from pretrain.data.sources import check_files

WEIGHTS = (5, 2, 1)
SHARES = [Fraction(weight, sum(WEIGHTS)) for weight in WEIGHTS]
TASK = Task("random", 32, 4, 0.15, 11)


@pytest.fixture(scope="module")
def corpora(tiny_tokenizer, tmp_path_factory):
    """Three texts of several shards; the last is small."""
    folder, made = tmp_path_factory.mktemp("mixture"), []
    for seed, count in enumerate((60, 40, 8)):
        path = write_documents(folder / f"{seed}.txt", make_documents(count, seed))
        options = {"piece_bytes": 9000}
        files = check_files([path])
        made.append(prepare(files, "sentences", tiny_tokenizer, folder / str(seed), **options))
    assert all(corpus.num_shards > 1 for corpus in made)
    return made


def mixture_of(corpora, task=TASK):
    return Mixture([PretrainingDataset(corpus, task) for corpus in corpora], WEIGHTS)


# Whose turn it is.


@given(st.data())
def test_the_text_furthest_behind_its_share_is_next(data):
    count = data.draw(st.integers(2, 5))
    weights = data.draw(st.lists(st.integers(1, 50), min_size=count, max_size=count))
    sizes = st.integers(1, 40_000)
    tokens = [0] * count
    for _ in range(data.draw(st.integers(0, 60))):
        shares = [Fraction(weight, sum(weights)) for weight in weights]
        missing = [share * sum(tokens) - given for share, given in zip(shares, tokens)]
        found = furthest_behind(tokens, weights)
        assert missing[found] == max(missing) and found == missing.index(max(missing))
        tokens[found] += data.draw(sizes)


# The micro-batches.


def slow_walk(parts):
    """(part, position) of each micro-batch, endless: for each part a list of its own, and the
    tokens counted from the batches."""
    walks, tokens = [part.positions(part.start) for part in parts], [0] * len(parts)
    while True:
        total = sum(tokens)
        missing = [share * total - given for share, given in zip(SHARES, tokens)]
        number = missing.index(max(missing))
        position = next(walks[number])
        yield number, position
        tokens[number] += int(parts[number][position].plan.lengths.sum())


def test_positions_equal_the_slow_walk(corpora):
    mixture = mixture_of(corpora)
    count, drawn = 300, [0, 0, 0]
    slow = islice(slow_walk(mixture_of(corpora).parts), count)
    walk = list(islice(mixture.positions(mixture.start), count))
    for position, (number, place) in zip(walk, slow, strict=True):
        assert position.tokens == tuple(drawn) and position.places[number] == place
        found, expected = mixture[position], mixture.parts[number][place]
        assert (found.plan.keys == expected.plan.keys).all()
        drawn[number] += int(found.plan.lengths.sum())
    assert walk[-1].places[2].epoch > walk[-1].places[0].epoch, "it was repeated"
    for first in (0, 1, 17, 120):
        again = mixture_of(corpora).positions(walk[first])
        assert list(islice(again, 101)) == walk[first : first + 101]


def test_an_epoch_is_a_pass_over_the_first_text(corpora):
    mixture = mixture_of(corpora)
    walk = list(mixture.positions(mixture.start, end_epoch=1))
    first = mixture.parts[0]
    seen = {position.places[0] for position in walk}
    assert seen == set(first.positions(first.start, 1))
    assert walk[-1].places[0].epoch == 0


def test_a_position_survives_as_plain_numbers(corpora):
    mixture = mixture_of(corpora)
    *_, position = islice(mixture.positions(mixture.start), 78)
    assert mixture.position_of(json.loads(json.dumps(position.numbers))) == position
    numbers = [float(word) for word in str(position._replace(progress=0.25)).split()]
    assert numbers == [*position.numbers, 0.25]
    for numbers in (position.numbers[:-1], position.numbers[:8], ()):
        with pytest.raises(ValueError):
            mixture.position_of(numbers)
