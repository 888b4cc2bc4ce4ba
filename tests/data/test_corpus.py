"""The corpus on disk: its documents are those of the text, tokenized sentence by sentence, however
many pieces the text is cut into; damage is named; validation text is chosen by what a document
holds; and a corpus of another tokenizer is refused."""

from dataclasses import replace

import numpy as np
import pytest
from conftest import refused
from data_reference import write_documents

from pretrain.data import corpus as corpora
from pretrain.data.corpus import ARRAYS, WORD_START, Corpus, Shard, is_corpus, open_corpus
from pretrain.data.prepare import prepare
from pretrain.data.tokenizer import SPECIAL_TOKENS, describe, fingerprint, from_vocabulary

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def make_tokenizer(*more: str):
    """WordPiece over letters and a few stems; the same on every machine, unlike a trained one."""
    pieces = [*LETTERS, ".", *(f"##{letter}" for letter in f"{LETTERS}.")]
    entries = [*SPECIAL_TOKENS, *pieces, "bank", "river", "model", "##ing", "##ation", *more]
    return from_vocabulary({entry: number for number, entry in enumerate(entries)}, True)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def make(tokenizer, tmp_path):
    """Prepare documents into a corpus."""

    def make_corpus(documents, name="corpus", piece_bytes=1 << 30, tokenizer=tokenizer) -> Corpus:
        sources = write_documents(tmp_path / f"{name}.txt", documents)
        return prepare(sources, "sentences", tokenizer, tmp_path / name, piece_bytes)

    return make_corpus


def expected_documents(documents: list[list[str]], tokenizer) -> list[list[list[int]]]:
    """Ids by document and sentence: the tokenizer called on one sentence at a time."""
    found = [
        [tokenizer(sentence, add_special_tokens=False)["input_ids"] for sentence in document]
        for document in documents
    ]
    found = [[ids for ids in document if ids] for document in found]
    return [document for document in found if document]


def sentences_of(shard: Shard, place: int) -> list[list[int]]:
    first, last = shard.documents[place : place + 2]
    edges = shard.sentences[first : last + 1].tolist()
    return [shard.ids[start:end].tolist() for start, end in zip(edges, edges[1:])]


def documents_of(corpus: Corpus) -> list[list[list[int]]]:
    """Ids by document and sentence, for the documents in a part of the corpus."""
    shards = [(corpus.shard(index), corpus.documents(index)) for index in range(corpus.num_shards)]
    return [sentences_of(shard, place) for shard, places in shards for place in places.tolist()]


def flat(documents: list[list[list[int]]]) -> list[int]:
    return [number for document in documents for ids in document for number in ids]


@pytest.fixture(scope="module")
def sources(documents, tmp_path_factory):
    return write_documents(tmp_path_factory.mktemp("text") / "text.txt", documents)


@pytest.fixture(scope="module")
def many_shards(sources, tokenizer, tmp_path_factory) -> Corpus:
    folder = tmp_path_factory.mktemp("corpus") / "many"
    return prepare(sources, "sentences", tokenizer, folder, piece_bytes=8000)


@pytest.mark.parametrize("piece_bytes", [3000, 1 << 30])
def test_shards_hold_the_text(documents, make, tokenizer, piece_bytes):
    corpus = make(documents, piece_bytes=piece_bytes)
    expected = expected_documents(documents, tokenizer)
    assert documents_of(corpus) == expected
    assert (corpus.num_shards > 2) == (piece_bytes < 10_000)
    assert all(len(corpus.shard(index).hashes) >= 2 for index in range(corpus.num_shards))
    ids, info = flat(expected), corpus.info
    words = [not token.startswith("##") for token in tokenizer.convert_ids_to_tokens(ids)]
    flags = np.concatenate([corpus.shard(index).flags for index in range(corpus.num_shards)])
    assert np.array_equal(flags, np.array(words) * WORD_START) and 0.05 < np.mean(words) < 0.95
    numbers = {"documents": len(expected), "sentences": sum(map(len, expected))}
    numbers |= {"tokens": len(ids), "unknown_tokens": ids.count(tokenizer.unk_token_id)}
    numbers |= {"words": sum(words), "entities": 0, "words_by": "tokenizer"}
    assert {name: info[name] for name in numbers} == numbers
    assert corpus.count() == len(expected) >= corpus.count(at_most=1)


def test_arrays_are_plain_and_small(many_shards):
    shard = many_shards.shard(0)
    assert isinstance(shard.ids.base, np.memmap) and not shard.ids.flags.writeable
    kinds = [np.uint16, np.uint8, np.int64, np.int64, np.uint64]
    assert [getattr(shard, name).dtype for name in ARRAYS] == kinds
    documents = [sentences_of(shard, place) for place in range(len(shard.hashes))]
    assert shard.document_tokens.tolist() == [len(flat([document])) for document in documents]
    tokens = many_shards.split(0.3)[0].tokens(0).tolist()
    assert tokens == flat(documents_of(many_shards.split(0.3)[0]))[: len(tokens)]


def test_a_large_vocabulary_uses_four_bytes(make):
    tokenizer = make_tokenizer(*(f"[u{number}]" for number in range(65_540)), "zebra")
    corpus, zebra = make([["zebra a"], ["a"]], tokenizer=tokenizer), len(tokenizer) - 1
    assert corpus.shard(0).ids.dtype == np.uint32 and zebra > 65_536
    assert documents_of(corpus) == [[[zebra, 5]], [[5]]]


def test_text_without_a_token_is_dropped(make, tokenizer, tmp_path):
    """Control characters are text to str.strip and nothing to BERT's normalizer."""
    documents = [["a b", "\x01", "c"], ["\x01", "\x02\x03"], ["\x01", "d"], ["e"]]
    corpus = make(documents)
    assert documents_of(corpus) == [[[5, 6], [7]], [[8]], [[9]]]
    assert documents_of(corpus) == expected_documents(documents, tokenizer)
    assert len(corpus.shard(0).hashes) == 3
    assert refused(make, [["\x01"], ["\x02"]], "none").startswith(f"{tmp_path / 'none.txt'}: ")
    assert not is_corpus(tmp_path / "none")


def test_a_tokenizer_set_to_truncate_and_pad_changes_nothing(documents, make, many_shards):
    used = make_tokenizer()
    used(["a b c", "a"], truncation=True, max_length=3, padding=True)
    assert documents_of(make(documents, tokenizer=used)) == documents_of(many_shards)


def test_the_fingerprints(documents, make, many_shards, tokenizer):
    """Fingerprints of the tokenizer (saved in the corpus) and of the text."""
    found = corpora.load_tokenizer(many_shards.folder)
    assert fingerprint(found) == fingerprint(tokenizer) == many_shards.info["tokenizer"]
    assert expected_documents(documents[:2], found) == expected_documents(documents[:2], tokenizer)
    assert make([*documents, ["a"]], piece_bytes=8000).fingerprint != many_shards.fingerprint


@pytest.mark.parametrize(
    "counts",
    [[1, 1, 1], [1, 3, 1], [3, 1, 1], [2, 0, 1, 2], [0, 1, 0]],
)
def test_shards_of_fewer_than_two_documents_are_joined(tokenizer, tmp_path, counts):
    """Each file is a piece with that many documents; a file without tokens gives no shard."""
    sources, expected = [], []
    for number, count in enumerate(counts):
        names = [f"file {LETTERS[number]} text {LETTERS[place]}" for place in range(count)]
        documents = [[name, "model"] for name in names] or [["\x01"]]
        expected += expected_documents(documents, tokenizer)
        sources += write_documents(tmp_path / f"{number}.txt", documents)
    corpus = prepare(sources, "sentences", tokenizer, tmp_path / "corpus", piece_bytes=64)
    assert documents_of(corpus) == expected
    sizes = [len(corpus.shard(index).hashes) for index in range(corpus.num_shards)]
    assert min(sizes) >= min(2, sum(counts)) and sum(sizes) == sum(counts)
    on_disk = [len(np.load(path)) for path in corpus.folder.glob("*.ids.npy")]
    assert sum(on_disk) == corpus.info["tokens"]  # what was joined is not left behind


def test_another_tokenizer_is_refused_with_both_fingerprints(many_shards, tokenizer):
    own, other, folder = describe(tokenizer), describe(make_tokenizer("more")), many_shards.folder
    assert open_corpus(folder, own).num_shards == many_shards.num_shards
    text = refused(open_corpus, folder, other)
    assert text.startswith(f"{folder}: ") and str(folder / "tokenizer") in text
    assert own.fingerprint in text and other.fingerprint in text
    assert "(62 ids)" in refused(open_corpus, folder, replace(own, size=62))


def texts(documents: list[list[list[int]]]) -> list[str]:
    return sorted(map(str, documents))


def sides(corpus: Corpus, fraction: float) -> list[list[str]]:
    return [texts(documents_of(side)) for side in corpus.split(fraction)]


@pytest.mark.parametrize("fraction", [0.0001, 0.3])
def test_split_is_disjoint_and_complete(many_shards, fraction):
    training, validation = sides(many_shards, fraction)
    assert sorted(training + validation) == texts(documents_of(many_shards))
    assert not set(training) & set(validation)
    share = len(validation) / many_shards.count()
    assert len(validation) >= 2 and abs(share - max(fraction, 2 / 60)) < 0.25
    counts = [side.count() for side in many_shards.split(fraction)]
    for side in many_shards.split(fraction):
        assert side.count_tokens() == sum(map(len, map(side.tokens, range(side.num_shards))))
    assert counts == [len(training), len(validation)]


def test_split_puts_copies_on_one_side(documents, make):
    tripled = [document for document in documents for _ in range(3)]
    order = np.random.default_rng(0).permutation(len(tripled))
    corpus = make([tripled[place] for place in order], piece_bytes=8000)
    for fraction in (0.001, 0.3):
        training, validation = sides(corpus, fraction)
        assert not set(training) & set(validation)
        assert len(set(validation)) >= 2  # two distinct ones, not a document and its copy
        assert all(side.count(text) >= 3 for side in (training, validation) for text in side)


def test_split_does_not_depend_on_the_order_of_files(documents, tokenizer, tmp_path):
    found = []
    for cut, shuffled, piece_bytes in ((10, documents, 8000), (45, documents[::-1], 1 << 20)):
        sources = write_documents(tmp_path / f"{cut}-1.txt", shuffled[:cut])
        sources += write_documents(tmp_path / f"{cut}-2.txt", shuffled[cut:])
        folder = tmp_path / str(cut)
        found.append(sides(prepare(sources, "sentences", tokenizer, folder, piece_bytes), 0.2))
    assert found[0] == found[1]


@pytest.mark.parametrize("count", [1, 3])
def test_few_documents_are_split_by_their_tails(make, tokenizer, count):
    documents = [[f"model {LETTERS[n]}" for n in range(length)] for length in [20, 1, 3][:count]]
    corpus = make(documents)
    training, validation = corpus.split(0.25)
    ids = expected_documents(documents, tokenizer)
    beginnings, tails = [ids[0][:15], *ids[1:2]], [ids[0][15:]]
    if count == 3:
        beginnings.append(ids[2][:2])
        tails.append(ids[2][2:])
    assert documents_of(training) == beginnings and documents_of(validation) == tails
    assert (training.count(), validation.count()) == (len(beginnings), len(tails))
    # At least one sentence of several, whatever the fraction.
    assert documents_of(corpus.split(0.001)[1])[0] == ids[0][-1:]
    assert sorted(validation.select(1000).ids.tolist()) == sorted(flat(tails))
    assert [side.count() for side in make([["a"], ["b"], ["c"], ["d"]], "4").split(0.05)] == [2, 2]


@pytest.mark.parametrize("max_tokens", [1, 500, 10**9])
def test_selection_takes_documents_of_lowest_hash(many_shards, max_tokens):
    corpus = many_shards.split(0.4)[1]
    hashes, expected = [], []
    for index in range(corpus.num_shards):
        hashes += corpus.shard(index).hashes[corpus.documents(index)].tolist()
    for _, document in sorted(zip(hashes, documents_of(corpus))):
        # Two documents at least: a random B needs another one.
        if len(flat(expected)) < max_tokens or len(expected) < 2:
            expected.append(document)
    chosen = corpus.select(max_tokens)
    assert chosen.hashes.tolist() == sorted(hashes)[: len(expected)]
    assert [sentences_of(chosen, place) for place in range(len(chosen.hashes))] == expected
    assert len(chosen.flags) == len(chosen.ids) and not isinstance(chosen.ids.base, np.memmap)
