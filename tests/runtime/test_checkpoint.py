"""Folders are complete or absent: a failed write leaves the old one, any damage is found and the
file named, and a run resumes from the newest checkpoint that verifies."""

import errno
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from conftest import content, fail, in_processes, refused, without_privileges
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_reference import small_model
from safetensors import SafetensorError

from pretrain import files
from pretrain.runtime import checkpoint as ckpt

FACTS = {"objective": "mlm+nsp", "max_length": 64, "started_from": "tiny", "step": 7}
FACTS |= {"held_out": {"perplexity": 12.5}}


@pytest.fixture(scope="module")
def checkpoint(vocabulary, tiny_tokenizer, tmp_path_factory):
    """A checkpoint as written by a run."""
    folder, model = tmp_path_factory.mktemp("run") / "checkpoint-7", small_model(vocabulary.size)

    def write(target):
        ckpt.write_model(target, model, tiny_tokenizer, FACTS, model.state_dict())
        ckpt.write_state(target, {"optimizer": {"weights": torch.arange(4.0)}}, {"step": 7})

    ckpt.write_folder(folder, write)
    return folder


def write_text(text):
    """Writes one file, and the training state that makes a folder a checkpoint."""

    def write(folder):
        (folder / "text").write_text(text)
        ckpt.write_state(folder, {}, {})

    return write


# Writing.


def test_a_folder_has_size_and_hash_of_every_file(tmp_path):
    def write(folder):
        (folder / "inner").mkdir()
        (folder / "inner" / "file").write_bytes(b"abc")
        (folder / "inner" / "file").chmod(0o600)  # as safetensors does; the umask decides

    ckpt.write_folder(tmp_path / "deep" / "folder", write)
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    sums = json.loads((tmp_path / "deep" / "folder" / ckpt.CHECKSUMS).read_text())
    assert sums == {"inner/file": {"bytes": 3, "sha256": digest}}
    assert os.listdir(tmp_path / "deep") == ["folder"]
    folder = tmp_path / "deep" / "folder"
    modes = {path.stat().st_mode for path in (folder / ckpt.CHECKSUMS, folder / "inner" / "file")}
    assert len(modes) == 1


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    """Whatever a killed write has left behind."""
    for leftover in (".best.partial", ".best.previous"):
        (tmp_path / leftover).mkdir()
        (tmp_path / leftover / "text").write_text("half")
    for text in ("old", "new"):
        ckpt.write_folder(tmp_path / "best", write_text(text))
    assert (tmp_path / "best" / "text").read_text() == "new"
    assert os.listdir(tmp_path) == ["best"] and ckpt.problem_of(tmp_path / "best") is None


DISK_ERRORS = {
    "disk full": (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
    "torch.save": (RuntimeError("[inline_container.cc:672] . pos 64 vs 0\nframe"), "pos 64 vs 0"),
    "tokenizers": (Exception("No space left on device (os error 28)"), "No space left on device"),
    "numpy": (OSError("306906 requested and 55232 written"), "No space left on device"),
    "safetensors": (SafetensorError("Error while serializing: I/O error"), "I/O error"),
}


@pytest.mark.parametrize("error, reason", DISK_ERRORS.values(), ids=DISK_ERRORS)
def test_a_write_that_fails_changes_nothing(error, reason, tmp_path):
    ckpt.write_folder(tmp_path / "best", write_text("old"))
    before = content(tmp_path)

    def write(folder):
        (folder / "text").write_text("half of the n")
        raise error

    for path in (tmp_path / "best", tmp_path / "final"):
        refused(ckpt.write_folder, path, write, begins=f"{path}: ", names=reason)
    assert content(tmp_path) == before and os.listdir(tmp_path) == ["best"]


def test_a_rename_that_fails_puts_the_old_folder_back(tmp_path, monkeypatch):
    ckpt.write_folder(tmp_path / "best", write_text("old"))
    before, rename = content(tmp_path), Path.rename

    def fails(path, target):
        if path.name.endswith(".partial"):
            raise OSError(errno.EIO, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fails)
    refused(ckpt.write_folder, tmp_path / "best", write_text("new"), names="Input/output error")
    assert content(tmp_path) == before


def test_a_folder_moved_aside_before_a_kill_is_put_back_unless_it_was_replaced(tmp_path):
    for kept in ("old", "new"):
        ckpt.write_folder(tmp_path / ".best.previous", write_text("old"))
        if kept == "new":
            ckpt.write_folder(tmp_path / "best", write_text("new"))
        ckpt.put_back(tmp_path / "best")
        assert (tmp_path / "best" / "text").read_text() == kept


def test_only_what_a_run_wrote_may_be_overwritten(tmp_path):
    hidden = [".best.partial", ".final.previous", ".checkpoint-2.removed", ".checkpoint-4.damaged"]
    for name in ["best", "final", "checkpoint-2", *hidden, ".summary.json.0a1b2c3d.partial"]:
        (tmp_path / name).mkdir()
    ckpt.check_output(tmp_path, overwrite=True)
    for name in ("final.zip", "best.csv", "checkpoint-2.tar", "notes.tmp", "draft.partial"):
        (tmp_path / name).touch()
        refused(ckpt.check_output, tmp_path, overwrite=True, begins=f"{tmp_path}: ", names=name)
        (tmp_path / name).unlink()


def test_a_file_that_cannot_be_replaced_stays_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "summary.json"
    files.write_json(path, {"name": "Übung 北京"})
    monkeypatch.setattr(files, "sync", fail(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(OSError):
        files.write_json(path, {"name": "new"})
    assert json.loads(path.read_text(encoding="utf-8")) == {"name": "Übung 北京"}
    assert os.listdir(tmp_path) == ["summary.json"]


# Verifying.


@settings(max_examples=4, deadline=None)
@given(where=st.floats(0, 1, exclude_max=True))
def test_damage_to_any_file_is_found_and_named(checkpoint, tmp_path_factory, where):
    folder = tmp_path_factory.mktemp("damaged") / "checkpoint-7"
    shutil.copytree(checkpoint, folder)
    for path in map(folder.joinpath, content(folder).keys() - {ckpt.CHECKSUMS}):
        good = path.read_bytes()
        place = int(where * len(good))
        flipped = good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :]
        for bad in (good[:place], flipped, good + b"\0"):
            path.write_bytes(bad)
            assert ckpt.problem_of(folder).startswith(f"{path} ")
        path.unlink()
        assert ckpt.problem_of(folder).startswith(f"{path} ")
        path.write_bytes(good)
    assert ckpt.problem_of(folder) is None


def test_too_few_open_files_are_no_damage(checkpoint, monkeypatch):
    """Else a resumed run would move a good checkpoint aside."""
    monkeypatch.setattr(ckpt, "sums_of", fail(OSError(errno.EMFILE, "Too many open files")))
    with pytest.raises(OSError):
        ckpt.problem_of(checkpoint)


EMPTY = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
GARBLED = [None, b"{", b"\xff\xfe", b"3", b'{"a": null}', b'{"text": {"bytes": 3}}']
LEAD_OUT = json.dumps({"inner/../../outside": {"bytes": 0, "sha256": EMPTY}}).encode()


@pytest.mark.parametrize("sums", [*GARBLED, LEAD_OUT])
def test_garbled_checksums_and_checksums_outside_the_folder(sums, tmp_path):
    folder = tmp_path / "checkpoint-1"
    ckpt.write_folder(folder, write_text("new"))
    (folder / ckpt.CHECKSUMS).unlink()
    (folder / "a").write_text("")
    (tmp_path / "outside").write_text("")
    if sums is not None:
        (folder / ckpt.CHECKSUMS).write_bytes(sums)
    assert ckpt.problem_of(folder).startswith(f"{folder}/")


# Choosing and removing.


@pytest.fixture
def run(tmp_path):
    """A run folder with checkpoints 5, 9, 10 and 100, and other entries."""
    for step in (9, 100, 10, 5):
        ckpt.write_folder(tmp_path / f"checkpoint-{step}", write_text(str(step)))
    others = ("best", "final", "checkpoint-", "checkpoint-x", "checkpoint-7b")
    for other in (*others, ".checkpoint-200.partial", ".checkpoint-300.previous"):
        (tmp_path / other).mkdir()
    return tmp_path


def test_a_run_whose_checkpoints_are_all_damaged_is_refused(run, capsys):
    for folder in ckpt.checkpoints(run):
        (folder / "text").unlink()
    refused(ckpt.newest_good, run, names=f"{run}: ")
    assert f"{run}/checkpoint-5/text" in capsys.readouterr().out
    assert ckpt.newest_good(run / "best") is None, "a run without checkpoints has none"


def test_a_checkpoint_that_may_not_be_read_is_skipped(run):
    def main(argv):
        print(ckpt.newest_good(run).name)

    (run / "checkpoint-100").chmod(0)
    try:
        ended = in_processes(run, main, [], prepare=lambda rank: without_privileges())
    finally:
        (run / "checkpoint-100").chmod(0o755)
    assert ended[0][0] == 0, ended
    first, second = (run / "out-0").read_text().splitlines()
    assert f"{run}/checkpoint-100/" in first and second == "checkpoint-10"


def test_a_write_in_another_container_is_not_disturbed(tmp_path, monkeypatch):
    """Each has a process 1. What a killed one has left is removed by the next."""
    monkeypatch.setattr(os, "getpid", lambda: 1)
    path = tmp_path / "text"

    def write(partial):
        files.write_text(path, "of the other")
        partial.write_text("of this one")

    files.write_aside(path, write)
    assert path.read_text() == "of this one" and os.listdir(tmp_path) == ["text"]
    child = os.fork()
    if not child:

        def kill(partial):
            partial.mkdir()
            signal.raise_signal(signal.SIGKILL)

        files.write_aside(path, kill)
    os.waitpid(child, 0)
    assert len(os.listdir(tmp_path)) == 2
    other = tmp_path / ".text.csv.01234567.partial"  # of another target
    other.touch()
    with files.exclusive(path):
        files.write_text(path, "whole")
    assert sorted(os.listdir(tmp_path)) == [other.name, "text"]


@settings(max_examples=20, deadline=None)
@given(steps=st.sets(st.integers(0, 2000), max_size=6), keep=st.integers(1, 8))
def test_prune_keeps_the_newest(steps, keep, tmp_path_factory):
    run = tmp_path_factory.mktemp("run")
    for step in steps:
        (run / f"checkpoint-{step}").mkdir()
    (run / "best").mkdir()
    ckpt.prune(run, keep)
    kept = {f"checkpoint-{step}" for step in sorted(steps)[-keep:]}
    assert set(os.listdir(run)) == {"best", *kept}


# What is in them.


def test_facts_that_are_garbled_or_absent_are_left_out(checkpoint, tmp_path):
    assert ckpt.read_facts(checkpoint) == FACTS
    card = (checkpoint / "README.md").read_text("utf-8")
    shown = ("`AutoModelForPreTraining`", "| max length | 64 |", "perplexity | 12.5000 |")
    assert all(of in card for of in shown)
    garbled = {"objective": "all", "max_length": -1, "eval_tokens": "9"}
    (tmp_path / ckpt.FACTS).write_text(json.dumps({**garbled, "eval_batch_size": 3, "other": 1}))
    assert ckpt.read_facts(tmp_path) == {"eval_batch_size": 3, "other": 1}


def test_non_finite_numbers_are_not_saved(tmp_path):
    bad = float("nan")
    state = {"weights": {"decoder": {"exp_avg": torch.tensor([1.0, bad])}}}
    told = refused(ckpt.write_state, tmp_path, {"optimizer": state}, {})
    assert "optimizer weights decoder exp_avg" in told
    weights = {"decoder.weight": torch.tensor(bad)}
    refused(ckpt.write_model, tmp_path, None, None, {}, weights, names="decoder.weight")
    assert os.listdir(tmp_path) == []


def test_a_part_of_a_sharded_tensor_is_not_saved(tmp_path):
    """The others would be lost."""
    part = torch.zeros(2)
    part.full_tensor = lambda: torch.zeros(4)  # as a DTensor has
    with pytest.raises(AssertionError, match="average decoder"):
        ckpt.write_state(tmp_path, {"average": {"decoder": part}}, {})
    assert os.listdir(tmp_path) == []


def test_nothing_is_unpickled(tmp_path):
    refused(ckpt.write_state, tmp_path, {"a": {"path": Path("x")}}, {}, names=ckpt.STATE_TENSORS)
    refused(ckpt.read_states, tmp_path, names=ckpt.STATE_TENSORS)
