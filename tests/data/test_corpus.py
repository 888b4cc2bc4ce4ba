"""The corpus on disk: its documents are those of the text, tokenized sentence by sentence, however many pieces the text is cut
into; it is finished after an interruption anywhere, equal to one written without; damage is named; held-out text is chosen
by what a document holds; and a corpus of another tokenizer is refused."""
import json
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pretrain.command import UserError
from pretrain.data import corpus as corpora
from pretrain.data import preparing, reading
from pretrain.data.corpus import ARRAYS, OPEN_SHARDS, WORD_START, Corpus, Shard, concatenate, is_corpus, load_tokenizer, open_corpus
from pretrain.data.preparing import prepare
from pretrain.data.tokenizer import SPECIAL_TOKENS, describe, fingerprint, from_vocabulary


def count(corpus):
    """(documents, tokens) of the part; the documents also as the corpus counts them."""
    tokens = sum(int(corpus.shard(index).document_tokens[corpus.documents(index)].sum()) for index in range(corpus.num_shards))
    assert corpus.count(at_most=1) <= corpus.count()
    return corpus.count(), tokens


def make_tokenizer(more: tuple[str, ...] = (), lowercase: bool = True):
    """WordPiece over letters and a few stems; unlike a trained one the same everywhere."""
    letters = "abcdefghijklmnopqrstuvwxyz."
    entries = [*SPECIAL_TOKENS, *letters, *(f"##{letter}" for letter in letters), "bank", "river", "model", "##ing", "##ation", *more]
    return from_vocabulary({entry: number for number, entry in enumerate(entries)}, lowercase)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def write_text(path: Path, documents: list[list[str]]) -> list[reading.Source]:
    path.write_text("\n\n".join("\n".join(document) for document in documents) + "\n", encoding="utf-8")
    return reading.check_files([path], "--train")


def expected_documents(documents: list[list[str]], tokenizer) -> list[list[list[int]]]:
    """Ids by document and sentence: the tokenizer called on one sentence at a time."""
    found = [[tokenizer(sentence, add_special_tokens=False)["input_ids"] for sentence in document] for document in documents]
    found = [[ids for ids in document if ids] for document in found]
    return [document for document in found if document]


def documents_of(corpus: Corpus) -> list[list[list[int]]]:
    """Ids by document and sentence, of the documents in the corpus' part."""
    found = []
    for index in range(corpus.num_shards):
        shard = corpus.shard(index)
        for place in corpus.documents(index).tolist():
            edges = shard.sentences[shard.documents[place]: shard.documents[place + 1] + 1].tolist()
            found.append([shard.ids[start:end].tolist() for start, end in zip(edges, edges[1:])])
    return found


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def message(function, *arguments) -> str:
    with pytest.raises(UserError) as caught:
        function(*arguments)
    return str(caught.value)


@pytest.fixture(scope="module")
def sources(documents, tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "text.txt", documents)


@pytest.fixture(scope="module")
def many_shards(sources, tokenizer, tmp_path_factory) -> Corpus:
    return prepare(sources, "sentences", tokenizer, tmp_path_factory.mktemp("corpus") / "many", piece_bytes=8000)


@pytest.fixture()
def copy(many_shards, tmp_path) -> Path:
    return Path(shutil.copytree(many_shards.folder, tmp_path / "copy"))


# ---------------------------------------------------------------- round trip

@pytest.mark.parametrize("piece_bytes", [1, 3000, 8000, 1 << 30])
def test_text_comes_back_from_the_shards(documents, sources, tokenizer, tmp_path, piece_bytes):
    corpus = prepare(sources, "sentences", tokenizer, tmp_path / "corpus", piece_bytes)
    expected = expected_documents(documents, tokenizer)
    assert documents_of(corpus) == expected
    assert (corpus.num_shards > 2) == (piece_bytes < 10_000)
    assert all(len(corpus.shard(index).hashes) >= 2 for index in range(corpus.num_shards))
    ids = [number for document in expected for sentence in document for number in sentence]
    assert count(corpus) == (len(expected), len(ids))
    info = corpus.info
    assert (info["documents"], info["sentences"], info["tokens"]) == (len(expected), sum(map(len, expected)), len(ids))
    assert info["unknown_tokens"] == ids.count(tokenizer.unk_token_id)
    words = [not token.startswith("##") for token in tokenizer.convert_ids_to_tokens(ids)]
    flags = np.concatenate([corpus.shard(index).flags for index in range(corpus.num_shards)])
    assert np.array_equal(flags, np.array(words) * WORD_START) and 0.05 < np.mean(words) < 0.95
    assert (info["words"], info["entities"], info["words_by"]) == (sum(words), 0, "tokenizer")


@pytest.mark.parametrize("text_format", ["sentences", "lines", "text"])
def test_formats(documents, tokenizer, tmp_path, text_format):
    sources = []
    for number, part in enumerate((documents[:3], documents[3:5])):
        sources += write_text(tmp_path / f"{number}.txt", part)
    expected = {"sentences": documents[:5], "lines": [[sentence] for document in documents[:5] for sentence in document],
                "text": [sum(documents[:3], []), sum(documents[3:5], [])]}[text_format]
    assert documents_of(prepare(sources, text_format, tokenizer, tmp_path / "corpus")) == expected_documents(expected, tokenizer)


def test_batches_of_any_size_give_the_same_corpus(sources, tokenizer, many_shards, tmp_path, monkeypatch):
    """Documents that reach over batches of the tokenizer keep their sentences and hashes."""
    monkeypatch.setattr(preparing, "BATCH_CHARACTERS", 100)
    assert content(prepare(sources, "sentences", tokenizer, tmp_path / "corpus", 8000).folder) == content(many_shards.folder)


def test_arrays_are_plain_and_small(many_shards):
    shard = many_shards.shard(0)
    assert isinstance(shard.ids.base, np.memmap) and not shard.ids.flags.writeable
    assert [getattr(shard, name).dtype for name in ARRAYS] == [np.uint16, np.uint8, np.int64, np.int64, np.uint64]
    assert shard.document_tokens.tolist() == [int(shard.sentences[last] - shard.sentences[first])
                                              for first, last in zip(shard.documents, shard.documents[1:])]


def test_a_large_vocabulary_is_kept_in_four_bytes(tmp_path):
    tokenizer = make_tokenizer(tuple(f"[u{number}]" for number in range(65_540)) + ("zebra",))
    corpus = prepare(write_text(tmp_path / "text.txt", [["zebra a"], ["a"]]), "sentences", tokenizer, tmp_path / "corpus")
    assert corpus.shard(0).ids.dtype == np.uint32
    assert documents_of(corpus) == [[[tokenizer.get_vocab()["zebra"], 5]], [[5]]] and tokenizer.get_vocab()["zebra"] > 65_536


def test_sentences_without_a_token_are_dropped(tokenizer, tmp_path):
    """Control characters are text to str.strip and nothing to BERT's normalizer."""
    documents = [["a b", "\x01", "c"], ["\x01", "\x02\x03"], ["\x01", "d"], ["e"]]
    corpus = prepare(write_text(tmp_path / "text.txt", documents), "sentences", tokenizer, tmp_path / "corpus")
    assert documents_of(corpus) == [[[5, 6], [7]], [[8]], [[9]]] == expected_documents(documents, tokenizer)
    assert len(corpus.shard(0).hashes) == 3


def test_text_without_any_token(tokenizer, tmp_path):
    sources = write_text(tmp_path / "text.txt", [["\x01"], ["\x02"]])
    assert message(prepare, sources, "sentences", tokenizer, tmp_path / "corpus") == (
        f"{sources[0].path}: the tokenizer finds no token in the text; needed is text in its script")
    assert not is_corpus(tmp_path / "corpus")


def test_a_tokenizer_set_to_truncate_and_pad_changes_nothing(documents, sources, many_shards, tmp_path):
    used = make_tokenizer()
    used(["a b c", "a"], truncation=True, max_length=3, padding=True)
    assert documents_of(prepare(sources, "sentences", used, tmp_path / "corpus")) == documents_of(many_shards)


def test_the_tokenizer_is_kept_in_the_corpus(many_shards, tokenizer, documents):
    found = load_tokenizer(many_shards.folder)
    assert fingerprint(found) == fingerprint(tokenizer) == many_shards.info["tokenizer"]
    assert expected_documents(documents[:2], found) == expected_documents(documents[:2], tokenizer)


def test_the_fingerprint_is_of_the_content(documents, sources, tokenizer, many_shards, tmp_path):
    again = prepare(sources, "sentences", tokenizer, tmp_path / "again", 8000)
    changed = write_text(tmp_path / "text.txt", [*documents[:-1], [*documents[-1], "a"]])
    other = prepare(changed, "sentences", tokenizer, tmp_path / "other", 8000)
    assert again.fingerprint == many_shards.fingerprint != other.fingerprint


# ---------------------------------------------------------------- small shards

@pytest.mark.parametrize("counts", [[1, 1], [1, 1, 1], [2, 1], [1, 2], [3, 1, 1], [1, 3, 1], [1, 1, 1, 1, 1], [2, 0, 1, 2], [0, 1, 0]])
def test_shards_of_fewer_than_two_documents_are_joined(tokenizer, tmp_path, counts):
    """A file is a piece of so many documents; one without a token gives no shard."""
    sources, expected = [], []
    for number, count in enumerate(counts):
        documents = [[f"file {'abcdefgh'[number]} text {'abcdefgh'[place]}", "model"] for place in range(count)] or [["\x01"]]
        expected += expected_documents(documents, tokenizer)
        sources += write_text(tmp_path / f"{number}.txt", documents)
    corpus = prepare(sources, "sentences", tokenizer, tmp_path / "corpus", piece_bytes=sources[0].size * 100 if sum(counts) < 2 else 1 << 6)
    assert documents_of(corpus) == expected
    sizes = [len(corpus.shard(index).hashes) for index in range(corpus.num_shards)]
    assert min(sizes) >= min(2, sum(counts)) and sum(sizes) == sum(counts)
    # what was joined is not left behind a second time
    assert sum(len(np.load(path)) for path in corpus.folder.glob("*.ids.npy")) == corpus.info["tokens"]


def test_concatenate_against_lists():
    source = np.random.default_rng(0)
    parts, ids, sentences, documents = [], [], [], []
    for _ in range(4):
        lengths, groups = source.integers(1, 5, 6), [1, 3, 2]
        tokens = source.integers(0, 9, lengths.sum())
        parts.append(Shard(tokens, tokens % 2, np.cumsum([0, *lengths]), np.cumsum([0, *groups]), source.integers(0, 9, 3)))
        ids += tokens.tolist()
        sentences += lengths.tolist()
        documents += groups
    joined = concatenate(parts)
    assert joined.ids.tolist() == ids and joined.flags.tolist() == [number % 2 for number in ids]
    assert np.diff(joined.sentences).tolist() == sentences and np.diff(joined.documents).tolist() == documents
    assert joined.sentences[0] == joined.documents[0] == 0
    assert joined.hashes.tolist() == [value for part in parts for value in part.hashes.tolist()]


# ---------------------------------------------------------------- interruptions

class Interruption(Exception):
    pass


def test_an_interrupted_preparation_goes_on_by_piece(sources, tokenizer, many_shards, tmp_path, monkeypatch):
    """Interrupted while the third piece is written; the second call writes it and what follows, and nothing else."""
    save, written = np.save, []

    def interrupted(path, array, **named):
        save(path, array, **named)
        if "shard-00002" in path.name:
            raise Interruption

    def noted(path, array, **named):
        written.append(path.name)
        save(path, array, **named)

    folder = tmp_path / "corpus"
    monkeypatch.setattr(np, "save", interrupted)
    with pytest.raises(Interruption):
        prepare(sources, "sentences", tokenizer, folder, 8000)
    assert not folder.exists() and not (tmp_path / "corpus.partial" / "corpus.json").exists()
    monkeypatch.setattr(np, "save", noted)
    prepare(sources, "sentences", tokenizer, folder, 8000)
    assert content(folder) == content(many_shards.folder)
    assert "shard-00002.ids.npy" in written and not [name for name in written if name < "shard-00002"]


def test_an_interruption_while_shards_are_joined(documents, tokenizer, tmp_path, monkeypatch):
    """Whichever file was the last to be removed, the next call finishes."""
    sources = write_text(tmp_path / "text.txt", documents[:5])
    whole = content(prepare(sources, "sentences", tokenizer, tmp_path / "whole", 1).folder)
    unlink, failed = Path.unlink, []

    for stop in range(100):
        folder, count = tmp_path / f"corpus-{stop}", iter(range(1000))

        def interrupted(path, *arguments, stop=stop, count=count, **named):
            if next(count) == stop:
                raise Interruption
            unlink(path, *arguments, **named)

        monkeypatch.setattr(Path, "unlink", interrupted)
        try:
            prepare(sources, "sentences", tokenizer, folder, 1)
            break  # there are no more files to remove
        except Interruption:
            monkeypatch.setattr(Path, "unlink", unlink)
        try:
            prepare(sources, "sentences", tokenizer, folder, 1)
        except UserError:
            failed.append(stop)
        else:
            assert content(folder) == whole
    assert stop > 10 and failed == [], f"not finished after an interruption at the removals {failed}"


@pytest.mark.parametrize("what", ["tokenizer", "text", "format"])
def test_pieces_left_by_another_preparation_are_not_taken(documents, tokenizer, tmp_path, monkeypatch, what):
    """The same --output after an interruption, but with another tokenizer, text or format: none of the pieces there fit."""
    def fail(*_, **__):
        raise Interruption

    folder, sources = tmp_path / "corpus", write_text(tmp_path / "text.txt", documents[:20])
    monkeypatch.setattr(preparing, "_join_small", fail)
    with pytest.raises(Interruption):
        prepare(sources, "sentences", tokenizer, folder, 3000)
    monkeypatch.undo()
    if what == "text":
        sources = write_text(tmp_path / "text.txt", documents[20:40])
    used = make_tokenizer(("water", "teach"), lowercase=False) if what == "tokenizer" else tokenizer
    text_format = "lines" if what == "format" else "sentences"
    corpus = prepare(sources, text_format, used, folder, 3000)
    assert documents_of(corpus) == documents_of(prepare(sources, text_format, used, tmp_path / "fresh", 3000))


def test_a_corpus_that_is_there_is_opened(copy, sources, tokenizer, monkeypatch):
    before = content(copy)

    def refuse(*_):
        raise AssertionError("text is read again")

    monkeypatch.setattr(reading, "cut_into_pieces", refuse)
    assert prepare(sources, "sentences", tokenizer, copy).num_shards > 2 and content(copy) == before


def test_a_text_that_is_gone_is_not_told_as_a_full_disk(documents, tokenizer, tmp_path):
    sources = write_text(tmp_path / "text.txt", documents[:3])
    Path(sources[0].path).unlink()
    with pytest.raises((UserError, OSError)) as caught:
        prepare(sources, "sentences", tokenizer, tmp_path / "corpus")
    assert "text.txt" in str(caught.value)


def test_a_folder_that_cannot_be_written(documents, tokenizer, tmp_path):
    (tmp_path / "file").write_text("no folder")
    sources = write_text(tmp_path / "text.txt", documents[:3])
    text = message(prepare, sources, "sentences", tokenizer, tmp_path / "file" / "corpus")
    assert text.startswith(f"{tmp_path / 'file' / 'corpus.partial'}: cannot be written (")


# ---------------------------------------------------------------- damage

def some_array(folder: Path, name: str = "ids") -> Path:
    return folder / f"{json.loads((folder / 'corpus.json').read_text())['shards'][1]['name']}.{name}.npy"


@pytest.mark.parametrize("name", ARRAYS)
def test_a_truncated_shard_is_named(copy, name):
    path = some_array(copy, name)
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-1])
    assert message(Corpus, copy) == f"{path}: has {size - 1} bytes, needed are {size}; remove {copy} and the corpus is prepared again"


def test_a_missing_shard_is_named(copy):
    path = some_array(copy)
    size = path.stat().st_size
    path.unlink()
    assert message(Corpus, copy) == f"{path}: is missing, needed are {size}; remove {copy} and the corpus is prepared again"


@pytest.mark.parametrize("name", ARRAYS)
def test_a_flipped_bit_is_named_when_the_shard_is_opened(copy, name):
    path = some_array(copy, name)
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    corpus = Corpus(copy)
    assert len(corpus.shard(0).ids)  # the others are good
    assert message(corpus.shard, 1) == (
        f"{path}: its content has changed since it was written; remove {copy} and the corpus is prepared again")


@pytest.mark.parametrize("raw, problem", [("{", "cannot be read ("), ("3", "the content is of type int, needed is an object"),
                                          ("{}", "is no corpus of format 3"),
                                          ("[" * 9999, "cannot be read (RecursionError"),
                                          ('{"format_version": 3}', "its checksum does not fit its content")])
def test_a_damaged_manifest_is_named(copy, raw, problem):
    (copy / "corpus.json").write_text(raw)
    assert message(Corpus, copy).startswith(f"{copy / 'corpus.json'}: {problem}")


@pytest.mark.parametrize("version", [1, 2, 99])
def test_another_format_version_is_refused(copy, version):
    info = json.loads((copy / "corpus.json").read_text())
    (copy / "corpus.json").write_text(json.dumps({**info, "format_version": version}))
    assert message(Corpus, copy) == f"{copy / 'corpus.json'}: is no corpus of format 3; remove the folder and the corpus is prepared again"


def test_a_folder_that_is_no_corpus(tmp_path):
    assert not is_corpus(tmp_path)
    assert message(Corpus, tmp_path).startswith(f"{tmp_path / 'corpus.json'}: cannot be read (")


def test_another_tokenizer_is_refused_with_both_fingerprints(many_shards, tokenizer):
    own, other, folder = describe(tokenizer), describe(make_tokenizer(("more",))), many_shards.folder
    assert open_corpus(folder, own, "--train").num_shards == many_shards.num_shards
    assert message(open_corpus, folder, other, "--train") == (
        f"--train {folder}: was prepared with the tokenizer {own.fingerprint} ({own.size} ids), the one in use is {other.fingerprint} "
        f"({own.size + 1} ids); give --tokenizer {folder / 'tokenizer'}, or the text itself to prepare it anew")
    assert "(62 ids)" in message(open_corpus, folder, replace(own, size=62), "--train")
    assert describe(load_tokenizer(folder)).fingerprint == own.fingerprint  # and what the message says helps


# ---------------------------------------------------------------- shards in a process

def test_a_shard_is_read_whole_only_once_in_a_process(many_shards, monkeypatch):
    """Its hash is checked when it is first opened; opening it again later, for want of room, only maps it."""
    checked, sha256_of = [], corpora.sha256_of

    def counted(path):
        checked.append(path.name)
        return sha256_of(path)

    monkeypatch.setattr(corpora, "sha256_of", counted)
    corpus = Corpus(many_shards.folder)
    assert corpus.num_shards > OPEN_SHARDS
    for _ in range(2):
        for index in range(corpus.num_shards):
            corpus.shard(index)
    assert len(corpus._open) <= OPEN_SHARDS and set(checked) == {
        f"{entry['name']}.{name}.npy" for entry in corpus.info["shards"] for name in ARRAYS}
    assert len(checked) == len(set(checked)), "hashed more than once"


def test_a_pickled_corpus_holds_no_text(many_shards):
    corpus = Corpus(many_shards.folder, many_shards.split(0.3)[1].part)
    before = documents_of(corpus)
    raw = pickle.dumps(corpus)
    assert corpus._open and len(raw) < 3000 + 1000 * corpus.num_shards and b"memmap" not in raw
    assert documents_of(pickle.loads(raw)) == before


# ---------------------------------------------------------------- held-out text

def texts(documents: list[list[list[int]]]) -> list[str]:
    return sorted(map(str, documents))


@pytest.mark.parametrize("fraction", [0.0001, 0.05, 0.3, 0.5])
def test_split_is_disjoint_and_whole(many_shards, fraction):
    training, held_out = many_shards.split(fraction)
    assert count(training)[0] + count(held_out)[0] == count(many_shards)[0]
    assert texts(documents_of(training) + documents_of(held_out)) == texts(documents_of(many_shards))
    assert not set(texts(documents_of(training))) & set(texts(documents_of(held_out)))
    share = count(held_out)[0] / count(many_shards)[0]
    assert count(held_out)[0] >= 2 and abs(share - max(fraction, 2 / 60)) < 0.25
    assert sum(count(part)[1] for part in (training, held_out)) == count(many_shards)[1]


def test_split_puts_copies_on_one_side(documents, tokenizer, tmp_path):
    doubled = [document for document in documents for _ in range(3)]
    order = np.random.default_rng(0).permutation(len(doubled))
    corpus = prepare(write_text(tmp_path / "text.txt", [doubled[place] for place in order]), "sentences", tokenizer,
                     tmp_path / "corpus", 8000)
    for fraction in (0.001, 0.3):
        sides = [texts(documents_of(side)) for side in corpus.split(fraction)]
        assert not set(sides[0]) & set(sides[1])
        assert len(set(sides[1])) >= 2  # two distinct ones, not a document and its copy
        assert all(side.count(text) >= 3 for side in sides for text in side)


def test_split_does_not_depend_on_the_order_of_files(documents, tokenizer, tmp_path):
    sides = []
    for number, (cut, shuffled) in enumerate(((10, documents), (45, documents[::-1]))):
        folder = tmp_path / str(number)
        folder.mkdir()
        sources = write_text(folder / "1.txt", shuffled[:cut]) + write_text(folder / "2.txt", shuffled[cut:])
        corpus = prepare(sources, "sentences", tokenizer, folder / "corpus", [8000, 1 << 20][number])
        sides.append([texts(documents_of(side)) for side in corpus.split(0.2)])
    assert sides[0] == sides[1]


def test_a_larger_fraction_holds_out_more_of_the_same(many_shards):
    small, large = (texts(documents_of(many_shards.split(fraction)[1])) for fraction in (0.1, 0.4))
    assert set(small) < set(large)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_of_few_documents_the_tails_are_held_out(tokenizer, tmp_path, count):
    lengths = [20, 1, 3][:count]
    documents = [[f"model {'abcdefghijklmnopqrstuvwxyz'[number]}" for number in range(length)] for length in lengths]
    corpus = prepare(write_text(tmp_path / "text.txt", documents), "sentences", tokenizer, tmp_path / "corpus")
    training, held_out = corpus.split(0.25)
    expected = expected_documents(documents, tokenizer)
    assert documents_of(training) == [expected[0][:15], *([expected[1]] if count > 1 else []), *([expected[2][:2]] if count > 2 else [])]
    assert documents_of(held_out) == [expected[0][15:], *([expected[2][2:]] if count > 2 else [])]
    assert training.count() == count and held_out.count() == [1, 1, 2][count - 1]
    # at least one sentence of several, whatever the fraction
    assert documents_of(corpus.split(0.001)[1])[0] == expected[0][-1:]
    selected = held_out.select(1000)
    expected = [number for document in documents_of(held_out) for sentence in document for number in sentence]
    assert sorted(selected.ids.tolist()) == sorted(expected)


def test_four_documents_are_split_by_hash(documents, tokenizer, tmp_path):
    corpus = prepare(write_text(tmp_path / "text.txt", documents[:4]), "sentences", tokenizer, tmp_path / "corpus")
    assert [count(side)[0] for side in corpus.split(0.05)] == [2, 2]


# ---------------------------------------------------------------- selection

@pytest.mark.parametrize("max_tokens", [1, 500, 3000, 10**9])
@pytest.mark.parametrize("held_out", [False, True])
def test_selection_takes_documents_of_lowest_hash(many_shards, max_tokens, held_out):
    corpus = many_shards.split(0.4)[1] if held_out else many_shards
    hashes = [value for index in range(corpus.num_shards) for value in corpus.shard(index).hashes[corpus.documents(index)].tolist()]
    by_hash = [document for _, document in sorted(zip(hashes, documents_of(corpus)))]
    expected, num_tokens = [], 0
    for document in by_hash:
        if num_tokens >= max_tokens and len(expected) >= 2:  # two documents at least: a random B needs another one
            break
        expected.append(document)
        num_tokens += sum(map(len, document))
    chosen = corpus.select(max_tokens)
    edges = chosen.sentences.tolist()
    found = [[chosen.ids[edges[place]: edges[place + 1]].tolist() for place in range(first, last)]
             for first, last in zip(chosen.documents, chosen.documents[1:])]
    assert found == expected and chosen.hashes.tolist() == sorted(hashes)[:len(expected)]
    assert len(chosen.flags) == len(chosen.ids) and not isinstance(chosen.ids.base, np.memmap)
