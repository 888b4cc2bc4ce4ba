"""Who prepares a text, and what interrupts it, changes no byte of the corpus: this process, worker
processes, Ray's; killed before any of its file operations, with torn pieces or a killed worker, the
next call finishes the same corpus. No process outlives its parent."""

import gzip
import json
import multiprocessing
import os
import shlex
import shutil
import signal
import sys
import threading
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from conftest import (
    arguments_of,
    at,
    content,
    fail,
    in_processes,
    refusal,
    refused,
    script,
    without_privileges,
)
from data_reference import write_documents

from pretrain import corpora
from pretrain.cli import run_command
from pretrain.data import parallel
from pretrain.data import prepare as prepare_module
from pretrain.data.annotate import Markup
from pretrain.data.prepare import prepare
from pretrain.data.sources import Source
from pretrain.errors import UserError

PREPARE = script("prepare")
PIECE_BYTES = 4000
# For `eval`, which workers can call without importing a module of tests.
SLEEP = "(open(sign, 'a').close(), __import__('time').sleep(seconds), 1 / 0)"


def write_files(folder: Path, documents: list[list[str]], per_file: int) -> list[Source]:
    groups = [documents[start : start + per_file] for start in range(0, len(documents), per_file)]
    files = [write_documents(folder / f"{n:03d}.txt", group) for n, group in enumerate(groups)]
    return sum(files, [])


def await_(holds) -> None:
    end = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def sources(documents, tmp_path_factory):
    """Many small files, one that makes several pieces, and documents larger than a piece."""
    pytest.importorskip("ahocorasick_rs")
    folder = tmp_path_factory.mktemp("text")
    long = [sum(documents[:8], []), sum(documents[8:16], [])]
    files = write_files(folder / "small", documents[:12], 1)
    files += write_files(folder / "large", documents[:30], 30)
    return files + write_files(folder / "long", long, 1)


@pytest.fixture(scope="module")
def make(sources, tiny_tokenizer):
    """Prepare the sources into a folder; the lexicon has an engine that cannot be pickled."""
    markup = Markup(lexicon=("bank", "water"))
    assert markup.find("a bank")
    options = {"piece_bytes": PIECE_BYTES, "markup": markup}
    return partial(prepare, sources, "sentences", tiny_tokenizer, **options)


@pytest.fixture(scope="module")
def whole(make, tmp_path_factory) -> dict[str, bytes]:
    """The corpus that a single undisturbed process writes."""
    corpus = make(tmp_path_factory.mktemp("corpus") / "whole", workers=1)
    names = [entry["name"] for entry in corpus.info["shards"]]
    assert len(names) > 10 and any(name.endswith("-joined") for name in names)
    return content(corpus.folder)


def test_workers_change_no_byte(make, whole, tmp_path):
    assert content(make(tmp_path / "corpus", workers=2).folder) == whole
    assert multiprocessing.active_children() == []


def test_ray_changes_no_byte(make, whole, tmp_path, monkeypatch):
    pytest.importorskip("ray", reason="--ray needs the package ray")
    monkeypatch.chdir(tmp_path)  # a worker's working folder is another
    parallel.connect("local")
    assert content(make(Path("corpus"), on_cluster=True).folder) == whole


def test_a_killed_worker_is_reported():
    """The tasks do not fit into a pipe: one that waits to be sent must not delay the end."""

    def kill():
        await_(multiprocessing.active_children)
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)

    threading.Thread(target=kill).start()
    tasks = [({"sign": os.devnull, "seconds": 3600, "more": bytes(1 << 20)},)] * 6
    with pytest.raises(UserError, match="worker"):
        dict(parallel.in_processes(eval, SLEEP, tasks, 2))
    assert multiprocessing.active_children() == []


def test_a_task_that_fails_ends_the_others():
    """Its own error is raised, and the other worker, which would run forever, is ended."""
    tasks = [({"sign": os.devnull, "seconds": seconds},) for seconds in (3600, 0, 3600)]
    with pytest.raises(ZeroDivisionError):
        dict(parallel.in_processes(eval, SLEEP, tasks, 2))
    assert multiprocessing.active_children() == []


def in_child(function) -> int:
    """Run `function` in a forked process with its own process group; returns the process id."""
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the threads are in the parent
        code = 70
        try:
            code = function()
        finally:
            os._exit(code or 0)
    return child


def lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGKILL])
def test_workers_end_with_their_parent(tmp_path, number):
    """Ctrl-C and the end of a terminal reach the whole group, SIGKILL only the parent."""

    def run():
        with (tmp_path / "told").open("w") as told:
            os.dup2(told.fileno(), 1)
            os.dup2(told.fileno(), 2)
        sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        signs = [str(tmp_path / f"{task}.started") for task in range(4)]
        tasks = [({"sign": sign, "seconds": 3600},) for sign in signs]
        return run_command(lambda _: dict(parallel.in_processes(eval, SLEEP, tasks, 2)), [])

    child = in_child(run)
    try:
        await_(lambda: len(list(tmp_path.glob("*.started"))) == 2)
        (os.kill if number == signal.SIGKILL else os.killpg)(child, number)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code == (-number if number == signal.SIGKILL else 128 + number)
        await_(lambda: not lives(child))
    finally:
        with suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
    told = (tmp_path / "told").read_text()
    assert (number.name in told) == (number != signal.SIGKILL) and "Traceback" not in told


def kill_before(operation: int, folder: Path) -> None:
    """Kill this process before file operation `number` in `folder`."""
    left = [operation]

    def count(event, arguments):
        is_operation = event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir")
        if is_operation and str(arguments[0]).startswith(str(folder)):
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)


def test_a_killed_preparation_writes_the_same_corpus(documents, tiny_tokenizer, tmp_path):
    """From two single documents, which are joined, and a pair."""
    sources = write_files(tmp_path / "text", documents[:2], 1)
    sources += write_files(tmp_path / "more", documents[2:4], 2)

    def run(folder):
        return content(prepare(sources, "sentences", tiny_tokenizer, folder, 100).folder)

    def run_and_kill(operation, folder):
        kill_before(operation, folder)
        run(folder)

    expected = run(tmp_path / "whole")
    assert any("joined" in name for name in expected)
    for operation in range(0, 1000, 9):
        folder = tmp_path / f"corpus-{operation}"
        child = in_child(partial(run_and_kill, operation, folder))
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code in (0, -signal.SIGKILL), operation
        assert run(folder) == expected, operation
        shutil.rmtree(folder)
        if code == 0:
            break
    assert 50 < operation < 999


class Interruption(Exception):
    pass


def interrupted(prepare, folder: Path, ending: str) -> Path:
    """The folder of a preparation interrupted when a file with that suffix is written."""
    save = np.save

    def save_and_stop(path, array, **named):
        save(path, array, **named)
        if str(path).endswith(ending):
            raise Interruption

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interruption):
        patch.setattr(np, "save", save_and_stop)
        prepare(folder)
    partial = folder.with_name(f"{folder.name}.partial")
    assert not folder.exists() and not (partial / "corpus.json").exists()
    return partial


@pytest.mark.parametrize(
    "torn, how",
    [("", ""), ("ids.npy", "bit"), ("hashes.npy", "gone"), ("piece.json", "cut")],
)
def test_an_interrupted_preparation_resumes_by_piece(make, whole, tmp_path, torn, how):
    """Interrupted at the third piece; a power failure may have torn the second one."""
    folder = interrupted(make, tmp_path / "corpus", "shard-00002.ids.npy")
    arrays = {n: folder / f"shard-{n:05d}.ids.npy" for n in range(3)}
    if torn:
        path = folder / f"shard-00001.{torn}"
        raw = path.read_bytes()
        changed = {"cut": raw[:-9], "bit": raw[:-9] + bytes([raw[-9] ^ 1]) + raw[-8:]}
        path.unlink() if how == "gone" else path.write_bytes(changed[how])
    written = []
    with pytest.MonkeyPatch.context() as patch:
        at(np, "save", 0, lambda path, array: written.append(path), patch.setattr)()
        assert content(make(tmp_path / "corpus").folder) == whole
    again = [number for number, path in arrays.items() if path in written]
    assert again == ([1, 2] if torn else [2])


def test_text_that_is_edited_meanwhile_is_refused(documents, tiny_tokenizer, tmp_path):
    (source,) = write_files(tmp_path / "text", documents[:9], 9)
    path = Path(source.path)
    before = path.read_text()
    path.write_text("One more sentence .\n" * 900)
    folder = tmp_path / "corpus"
    message = refused(prepare, [source], "sentences", tiny_tokenizer, folder)
    assert message.startswith(f"{path}: ") and not folder.exists()
    path.write_text(before)
    os.utime(path, ns=(source.mtime_ns, source.mtime_ns))
    corpus = prepare([source], "sentences", tiny_tokenizer, folder)
    assert corpus.info["documents"] == 9


def test_another_corpus_that_took_the_name_meanwhile_is_not_returned(make, tmp_path, monkeypatch):
    other, folder = make(tmp_path / "other").folder, tmp_path / "corpus"
    exclusive = prepare_module.exclusive

    def wait(path):
        shutil.copytree(other, folder)
        return exclusive(path)

    monkeypatch.setattr(prepare_module, "exclusive", wait)
    assert refused(make, folder).startswith(f"{folder}: ")


@pytest.mark.parametrize("what", ["tokenizer", "text", "order", "format", "markup"])
def test_pieces_of_another_preparation_are_not_used(
    documents, tiny_tokenizer, roberta_tokenizer, tmp_path, what
):
    """The same folder after an interruption, with something else."""
    first, second = (
        write_documents(tmp_path / f"{number}.txt", documents[20 * number : 20 * (number + 1)])
        for number in range(2)
    )
    both = [*first, *second]
    other = {
        "sources": {"text": second, "order": both[::-1]}.get(what, both),
        "text_format": "lines" if what == "format" else "sentences",
        "tokenizer": roberta_tokenizer if what == "tokenizer" else tiny_tokenizer,
        "markup": Markup(lexicon=("bank",) if what == "markup" else ()),
        "piece_bytes": 3000,
    }
    begin = partial(prepare, both, "sentences", tiny_tokenizer, piece_bytes=3000)
    interrupted(begin, tmp_path / "corpus", "shard-00002.hashes.npy")
    found, fresh = (prepare(folder=tmp_path / name, **other) for name in ("corpus", "fresh"))
    assert content(found.folder) == content(fresh.folder)


@pytest.fixture
def arguments(text_file, tiny_tokenizer, tmp_path) -> list:
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
    folders = ["--tokenizer", tmp_path / "tokenizer", "--cache", tmp_path / "cache"]
    return ["--input", text_file, *folders]


def test_the_command_prepares_once(arguments, tmp_path, capsys):
    """It writes to the cache, where it finds the corpus again, or to --output."""
    made = []
    for more in ([], [], ["--workers", "0", "--output", tmp_path / "corpus"]):
        PREPARE.main(arguments_of(arguments, more))
        made.append(capsys.readouterr().out)
    assert ["prepared in" in told for told in made] == [True, False, True]
    (cached,) = (tmp_path / "cache").glob("*/corpus.json")
    assert content(cached.parent) == content(tmp_path / "corpus")
    assert f"--train {tmp_path / 'corpus'}" in made[2]
    info = json.loads(cached.read_text())
    assert f"{info['tokens']:,} tokens" in made[0]
    for token in ("[EOT]", "eos_token=[EOT]"):  # the same ids, with another role
        PREPARE.main(arguments_of(arguments, ["--add-special-tokens", token]))
    assert len(list((tmp_path / "cache").glob("*/corpus.json"))) == 3


def test_a_cluster_prepares_the_text(arguments, monkeypatch):
    asked = []

    def on_cluster(function, shared, tasks):
        asked.append("cluster")
        yield from enumerate(function(shared, *task) for task in tasks)

    monkeypatch.setitem(sys.modules, "ray", sys)
    monkeypatch.setattr(parallel, "connect", asked.append)
    monkeypatch.setattr(parallel, "on_cluster", on_cluster)
    PREPARE.main(arguments_of(arguments, "--ray auto"))
    assert asked == ["auto", "cluster"]


def test_advice_for_a_killed_worker_leads_to_the_corpus(arguments, tmp_path, monkeypatch):
    """It names this command: with others, --workers means something else."""
    argv = arguments_of(arguments)
    with monkeypatch.context() as patch:
        patch.setattr(corpora, "prepare", fail(parallel.WorkersFailed("a worker was killed")))
        told = refused(PREPARE.main, argv)
    words = shlex.split(told.partition("prepare.py ")[2])
    assert "--workers" in words
    PREPARE.main([*argv, *words])
    assert list((tmp_path / "cache").glob("*/corpus.json"))


@pytest.mark.parametrize("damage", ["changed", "no shard", "no manifest"])
def test_a_damaged_corpus_in_the_cache_is_prepared_again(arguments, tmp_path, capsys, damage):
    argv = arguments_of(arguments)
    PREPARE.main(argv)
    (manifest,) = (tmp_path / "cache").glob("*/corpus.json")
    ids, expected = manifest.with_name("shard-00000.ids.npy"), content(manifest.parent)
    (manifest if damage == "no manifest" else ids).unlink()
    if damage == "changed":
        ids.write_bytes(expected[ids.name][:-2] + b"\0\0")
    capsys.readouterr()
    PREPARE.main(argv)
    assert content(manifest.parent) == expected
    assert str(manifest.parent) in capsys.readouterr().out.splitlines()[1]


def test_a_read_only_cache_serves_what_it_holds(arguments, tmp_path):
    """Only text that it lacks needs to be written; --cache names another folder."""
    cache, argv = tmp_path / "cache", arguments_of(arguments)
    PREPARE.main(argv)
    (cache / "sources.json").unlink()
    cache.chmod(0o555)
    (tmp_path / "other.txt").write_text("bank .\n\nriver .\n")
    (tmp_path / "other.csv").write_text("text\nbank .\nriver .\n")
    (tmp_path / "other.txt.gz").write_bytes(gzip.compress(b"bank .\n\nriver .\n"))
    others = [["--input", tmp_path / f"other.{kind}"] for kind in ("txt", "csv", "txt.gz")]
    others.append([*others[0], "--tokenizer="])
    try:
        for more, code in (([], 0), *((other, 2) for other in others)):
            given = {"prepare": lambda rank: without_privileges()}
            ((found, text),) = in_processes(tmp_path, PREPARE.main, [*argv, *more], **given)
            assert found == code and "Traceback" not in text, text
            assert (f"error: --cache {cache}: " in text) == (code == 2), text
    finally:
        cache.chmod(0o755)


@pytest.mark.parametrize(
    "more, named",
    [
        (["--workers", "-1"], "--workers -1: "),
        (["--ray", "auto", "--workers", "2"], "--ray auto --workers 2: "),
        (["--ray"], "--ray local: "),  # the package is missing
        (["--ray", "127.0.0.1:9"], "--ray 127.0.0.1:9: "),  # nobody answers
        (["--output", "."], "--output .: "),
    ],
)
def test_options_that_do_not_fit_are_refused(arguments, monkeypatch, capsys, more, named):
    monkeypatch.setitem(sys.modules, "ray", sys if more[-1:] == ["127.0.0.1:9"] else None)
    assert refusal(PREPARE.main, [*arguments, *more], capsys).startswith(named)
