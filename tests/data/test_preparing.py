"""Who prepares a text, and what interrupts it, changes no byte of the corpus: this process, worker processes, Ray's; killed before any
of its file operations, with torn pieces or a killed worker, the next call finishes the same. Nothing is left running."""
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
from conftest import refusal, script

from pretrain.command import UserError, run_command
from pretrain.data import preparing, reading, spreading
from pretrain.data.marking import Markup
from pretrain.data.preparing import prepare

PREPARE = script("prepare")
PIECE_BYTES = 4000
SLEEP = "(open(sign, 'a').close(), __import__('time').sleep(seconds), 1 / 0)"  # for `eval`, which needs no module in a worker


def write_files(folder: Path, documents: list[list[str]], per_file: int) -> list[reading.Source]:
    folder.mkdir()
    groups = [documents[start: start + per_file] for start in range(0, len(documents), per_file)]
    for number, group in enumerate(groups):
        text = "\n\n".join("\n".join(document) for document in group)
        (folder / f"{number:03d}.txt").write_text(text + "\n", encoding="utf-8")
    return reading.check_files(sorted(folder.iterdir()), "--input")


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def await_(holds, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def sources(documents, tmp_path_factory):
    """Many small files, one that makes several pieces, and documents that are more than a piece."""
    pytest.importorskip("ahocorasick_rs")
    folder = tmp_path_factory.mktemp("text")
    return (write_files(folder / "small", documents[:30], 1) + write_files(folder / "large", documents, len(documents))
            + write_files(folder / "long", [sum(documents[:15], []), sum(documents[15:30], [])], 1))


@pytest.fixture(scope="module")
def make(sources, tiny_tokenizer):
    """Prepares the sources into a folder. The lexicon has found terms already, with an engine that cannot be sent to workers."""
    markup = Markup(lexicon=("bank", "water"))
    assert markup.find("a bank")
    return partial(prepare, sources, "sentences", tiny_tokenizer, piece_bytes=PIECE_BYTES, markup=markup)


@pytest.fixture(scope="module")
def whole(make, tmp_path_factory) -> dict[str, bytes]:
    """What one process writes, undisturbed."""
    corpus = make(tmp_path_factory.mktemp("corpus") / "whole", workers=1)
    assert corpus.num_shards > 10 and any(entry["name"].endswith("-joined") for entry in corpus.info["shards"])
    return content(corpus.folder)


# ---------------------------------------------------------------- workers

@pytest.mark.parametrize("workers", [0, 2, 3])
def test_workers_change_no_byte(make, whole, tmp_path, workers):
    corpus = make(tmp_path / "corpus", workers=workers)
    assert content(corpus.folder) == whole
    assert multiprocessing.active_children() == []


def test_ray_changes_no_byte(make, whole, tmp_path, monkeypatch):
    pytest.importorskip("ray", reason="--ray needs the package ray")
    monkeypatch.chdir(tmp_path)  # a worker's working folder is another
    assert content(make(Path("corpus"), ray="local").folder) == whole


@pytest.mark.parametrize("size, expected", [(1, 0), (127, 1), (128, 2), (1000, 3)])
def test_workers_by_the_cores_and_the_text(monkeypatch, size, expected):
    """Less than two whole pieces are not worth the start of a process."""
    asked = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2}, raising=False)
    monkeypatch.setattr(spreading, "in_processes", lambda *given: asked.append(given[-1]) or (entry for entry in ()))
    monkeypatch.setattr(preparing, "_write_piece", lambda *_: {})
    pieces = [[reading.Span("text", start << 20, min(start + 64, size) << 20)] for start in range(0, size, 64)]
    preparing._write_pieces(None, pieces, None, None)
    assert asked == [expected] * (expected > 1)


def test_a_killed_worker_is_told():
    """With tasks of more than a pipe holds: one that waits to be sent must not hold up the end."""
    def kill():
        await_(multiprocessing.active_children)
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)

    threading.Thread(target=kill).start()
    tasks = [({"sign": os.devnull, "seconds": 3600, "more": bytes(1 << 20)},)] * 6
    with pytest.raises(UserError, match="a worker process was killed, .* needed is room for 2 at once"):
        dict(spreading.in_processes(eval, SLEEP, tasks, 2))
    assert multiprocessing.active_children() == []


def test_a_task_that_fails_ends_the_others():
    """Its own error comes, while the other worker would go on for long: the test would not end."""
    with pytest.raises(ZeroDivisionError):
        dict(spreading.in_processes(eval, SLEEP, [({"sign": os.devnull, "seconds": seconds},) for seconds in (3600, 0, 3600)], 2))
    assert multiprocessing.active_children() == []


# ---------------------------------------------------------------- kills

def in_child(function) -> int:
    """The process id of a fork, a group of its own, that runs `function` and ends."""
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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_workers_end_with_their_parent(tmp_path, number):
    """Ctrl-C reaches all of the group, SIGKILL the parent alone."""
    def run():
        with (tmp_path / "told").open("w") as told:
            os.dup2(told.fileno(), 1)
            os.dup2(told.fileno(), 2)
        sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
        signal.signal(signal.SIGINT, signal.default_int_handler)
        tasks = [({"sign": str(tmp_path / f"{number}.started"), "seconds": 3600},) for number in range(4)]
        return run_command(lambda _: dict(spreading.in_processes(eval, SLEEP, tasks, 2)), [])

    child = in_child(run)
    try:
        await_(lambda: len(list(tmp_path.glob("*.started"))) == 2)
        (os.killpg if number == signal.SIGINT else os.kill)(child, number)
        status = os.waitpid(child, 0)[1]
        assert (os.WEXITSTATUS(status) == 130) if number == signal.SIGINT else (os.WTERMSIG(status) == number)
        await_(lambda: not lives(child))
    finally:
        with suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
    told = (tmp_path / "told").read_text()
    assert ("interrupted by SIGINT\n" in told) == (number == signal.SIGINT) and "Traceback" not in told


def kill_before(operation: int, folder: Path) -> None:
    """From now on, have this process killed before so many file operations in `folder`."""
    left = [operation]

    def count(event, arguments):
        if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir") and str(arguments[0]).startswith(str(folder)):
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)


def test_killed_anywhere_and_started_again(documents, tiny_tokenizer, tmp_path):
    """Of two single documents, joined, and two together."""
    sources = write_files(tmp_path / "text", [documents[0], documents[1]], 1) + write_files(tmp_path / "more", documents[2:4], 2)
    expected = content(prepare(sources, "sentences", tiny_tokenizer, tmp_path / "whole", 100).folder)
    assert any("joined" in name for name in expected)
    for operation in range(0, 1000, 2):
        folder = tmp_path / f"corpus-{operation}"
        run = partial(prepare, sources, "sentences", tiny_tokenizer, folder, 100)
        status = os.waitpid(in_child(lambda run=run, place=(operation, folder): kill_before(*place) or run() and 0), 0)[1]
        assert status in (0, signal.SIGKILL), operation
        assert content(prepare(sources, "sentences", tiny_tokenizer, folder, 100).folder) == expected, operation
        shutil.rmtree(folder)
        if status == 0:
            break
    assert 50 < operation < 999


def interrupted(make, folder: Path) -> Path:
    """The unfinished folder of a preparation that was interrupted when all pieces were written."""
    def stop(*_):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(preparing, "_join_small", stop)
        make(folder)
    return folder.with_name(f"{folder.name}.partial")


@pytest.mark.parametrize("torn", ["ids.npy", "hashes.npy", "piece.json"])
@pytest.mark.parametrize("how", ["cut", "zeros", "bit", "gone"])
def test_a_torn_piece_is_made_again(make, whole, tmp_path, monkeypatch, torn, how):
    """As a power cut leaves files whose data had not reached the disk; the other pieces are kept."""
    path = interrupted(make, tmp_path / "corpus") / f"shard-00001.{torn}"
    raw = path.read_bytes()
    path.write_bytes({"cut": raw[:-9], "zeros": bytes(len(raw)), "bit": raw[:-9] + bytes([raw[-9] ^ 1]) + raw[-8:], "gone": b""}[how])
    if how == "gone":
        path.unlink()
    made, write = [], preparing._write_shard
    monkeypatch.setattr(preparing, "_write_shard", lambda folder, name, *more: made.append(name) or write(folder, name, *more))
    assert content(make(tmp_path / "corpus").folder) == whole
    assert [name for name in made if "joined" not in name] == ["shard-00001"]


def test_a_folder_that_is_no_corpus_any_more_is_replaced(make, whole, tmp_path):
    folder = make(tmp_path / "corpus").folder
    for path in [folder / "corpus.json", *folder.glob("*.npy")]:
        path.unlink()
    assert content(make(folder).folder) == whole
    assert [path.name for path in tmp_path.iterdir() if not path.name.endswith(".lock")] == ["corpus"]


# ---------------------------------------------------------------- the command

@pytest.mark.parametrize("given, expected", [([], (None, None)), (["--workers", "2"], (2, None)), (["--ray"], (None, "local")),
                                             (["--ray", "auto"], (None, "auto"))])
def test_the_command_says_who_prepares(text_file, tiny_tokenizer, tmp_path, monkeypatch, given, expected):
    asked, write = [], preparing._write_pieces
    monkeypatch.setattr(preparing, "_write_pieces", lambda recipe, pieces, *who: asked.append(who) or write(recipe, pieces, 0, None))
    monkeypatch.setitem(sys.modules, "ray", sys)
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
    PREPARE.main(["--input", str(text_file), "--tokenizer", str(tmp_path / "tokenizer"), "--cache", str(tmp_path / "cache"), *given])
    assert asked == [expected]


def test_options_that_do_not_fit_are_refused(text_file, monkeypatch, capsys):
    arguments = ["--input", text_file]
    assert refusal(PREPARE.main, [*arguments, "--workers", "-1"], capsys) == "--workers -1: needed is 0 to 256 processes"
    assert refusal(PREPARE.main, [*arguments, "--workers", "2", "--ray", "auto"], capsys) == (
        "--workers 2 --ray auto: exclude each other; needed is one of the two")
    monkeypatch.setitem(sys.modules, "ray", None)
    assert refusal(PREPARE.main, [*arguments, "--ray"], capsys) == "--ray: needs the package ray, which is not installed: pip install ray"
