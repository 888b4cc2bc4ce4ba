"""Folders that are whole or absent: a write that fails leaves what was there, damage of any kind is found and the file named, and the
newest checkpoint that verifies is the one a run goes on from."""
import errno
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_reference import small_model
from safetensors import SafetensorError
from transformers import AutoModelForPreTraining, AutoTokenizer

from pretrain.command import UserError
from pretrain.runtime import checkpoint as ckpt

FACTS = {"objective": "mlm+nsp", "max_length": 64, "step": 7, "started_from": "base", "held_out": {"perplexity": 12.5, "mlm_loss": 2.5}}
FILES = ["README.md", "config.json", "model.safetensors", "pretraining.json", "tokenizer.json", "tokenizer_config.json",
         "training_state.json", "training_state.pt"]


@pytest.fixture(scope="module")
def checkpoint(vocabulary, tiny_tokenizer, tmp_path_factory):
    """A checkpoint as a run writes it."""
    folder, model = tmp_path_factory.mktemp("run") / "checkpoint-7", small_model(vocabulary.size)

    def write(target):
        ckpt.write_model(target, model, tiny_tokenizer, FACTS, model.state_dict())
        ckpt.write_state(target, {"optimizer": {"weight": {"exp_avg": torch.arange(4.0)}}}, {"progress": {"step": 7}})

    ckpt.write_folder(folder, write)
    return folder


def content(folder):
    """Every file under `folder`, hidden ones too, with its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def write_text(text):
    """A writer of one file, with what makes a folder count as a checkpoint."""
    def write(folder):
        (folder / "text").write_text(text)
        ckpt.write_state(folder, {"optimizer": {}}, {})
    return write


# Writing.

def test_a_folder_comes_with_size_and_hash_of_every_file(tmp_path):
    def write(folder):
        (folder / "inner").mkdir()
        (folder / "inner" / "file").write_bytes(b"abc")

    ckpt.write_folder(tmp_path / "deep" / "folder", write)
    assert json.loads((tmp_path / "deep" / "folder" / ckpt.CHECKSUMS).read_text()) == {
        "inner/file": {"bytes": 3, "sha256": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"}}
    assert os.listdir(tmp_path / "deep") == ["folder"]


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    for text in ("old", "new"):
        ckpt.write_folder(tmp_path / "best", write_text(text))
    assert (tmp_path / "best" / "text").read_text() == "new"
    assert os.listdir(tmp_path) == ["best"] and ckpt.problem_of(tmp_path / "best") is None


@pytest.mark.parametrize("error, reason", [
    (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
    (PermissionError(errno.EACCES, "Permission denied"), "Permission denied"),
    (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0\nframe 1"), "unexpected pos 64 vs 0"),
    (SafetensorError("Error while serializing: I/O error"), "I/O error"),
], ids=["disk full", "no right", "torch.save", "safetensors"])
@pytest.mark.parametrize("exists", [True, False], ids=["replaces", "is new"])
def test_a_write_that_fails_changes_nothing(exists, error, reason, tmp_path):
    if exists:
        ckpt.write_folder(tmp_path / "best", write_text("old"))
    before = content(tmp_path)

    def write(folder):
        (folder / "text").write_text("half of the n")
        raise error

    with pytest.raises(UserError) as raised:
        ckpt.write_folder(tmp_path / "best", write)
    assert re.fullmatch(rf"{tmp_path}/best: cannot be written \(.*{re.escape(reason)}\); needed is room and the right to write\. "
                        r"What was there before is whole", str(raised.value))
    assert content(tmp_path) == before
    assert os.listdir(tmp_path) == ["best"] * exists


def test_a_folder_under_a_file_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file/checkpoint-1: cannot be written"):
        ckpt.write_folder(tmp_path / "file" / "checkpoint-1", write_text("new"))
    assert content(tmp_path) == {"file": b""}


def test_a_rename_that_fails_puts_the_old_folder_back(tmp_path, monkeypatch):
    ckpt.write_folder(tmp_path / "best", write_text("old"))
    before, rename = content(tmp_path), Path.rename

    def fails(path, target):
        if path.name.endswith(".partial"):
            raise OSError(errno.EIO, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(UserError, match=r"cannot be written \(Input/output error\)"):
        ckpt.write_folder(tmp_path / "best", write_text("new"))
    assert content(tmp_path) == before


def test_restore_puts_back_what_a_kill_between_two_renames_has_moved_aside(tmp_path):
    ckpt.write_folder(tmp_path / "best", write_text("old"))
    (tmp_path / "best").rename(tmp_path / ".best.previous")
    ckpt.put_back(tmp_path / "best")
    assert os.listdir(tmp_path) == ["best"] and ckpt.problem_of(tmp_path / "best") is None
    shutil.copytree(tmp_path / "best", tmp_path / ".best.previous")  # a kill after both: the new one stays
    (tmp_path / "best" / "text").write_text("new")
    ckpt.put_back(tmp_path / "best")
    assert (tmp_path / "best" / "text").read_text() == "new"
    ckpt.put_back(tmp_path / "never")  # nothing to put back
    assert not (tmp_path / "never").exists()


def test_what_a_killed_write_has_left_is_no_obstacle(tmp_path):
    for leftover in (".best.partial", ".best.previous"):
        (tmp_path / leftover).mkdir()
        (tmp_path / leftover / "text").write_text("half")
    ckpt.write_folder(tmp_path / "best", write_text("new"))
    assert os.listdir(tmp_path) == ["best"] and (tmp_path / "best" / "text").read_text() == "new"


def test_write_json_replaces_at_once_or_not_at_all(tmp_path):
    path = tmp_path / "summary.json"
    ckpt.write_json(path, {"name": "Übung 北京"})
    assert json.loads(path.read_text(encoding="utf-8")) == {"name": "Übung 北京"} and "北京" in path.read_text(encoding="utf-8")
    with pytest.raises(TypeError):
        ckpt.write_json(path, {"name": object()})
    assert json.loads(path.read_text(encoding="utf-8")) == {"name": "Übung 北京"}
    assert os.listdir(tmp_path) == ["summary.json"]


# Verifying.

def test_a_good_checkpoint_has_no_problem_and_holds_every_file(checkpoint):
    assert ckpt.problem_of(checkpoint) is None
    assert sorted(content(checkpoint)) == sorted([*FILES, ckpt.CHECKSUMS])


@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from(FILES), damage=st.sampled_from(["cut short", "flipped", "longer", "missing"]), where=st.floats(0, 1))
def test_damage_of_any_file_is_found_and_the_file_named(checkpoint, tmp_path_factory, name, damage, where):
    folder = tmp_path_factory.mktemp("damaged") / "checkpoint-7"
    shutil.copytree(checkpoint, folder)
    path = folder / name
    good = path.read_bytes()
    place = min(int(where * len(good)), len(good) - 1)
    flipped = good[:place] + bytes([good[place] ^ 1]) + good[place + 1:]
    path.write_bytes({"cut short": good[:place], "flipped": flipped, "longer": good + b"\0"}.get(damage, b""))
    if damage == "missing":
        path.unlink()
    expected = {"missing": "is missing", "flipped": r"is damaged \(its hash differs\)"}.get(
        damage, rf"has \d+ bytes, needed are {len(good)}")
    assert re.fullmatch(f"{re.escape(str(path))} {expected}", ckpt.problem_of(folder))
    shutil.rmtree(folder)


@pytest.mark.parametrize("sums", [None, b"", b"{", b"\xff\xfe", b"[]", b"{\"a\": null}", b"{\"text\": {\"bytes\": 3}}", b"3"])
def test_checksums_that_cannot_be_read(sums, tmp_path):
    ckpt.write_folder(tmp_path / "checkpoint-1", write_text("new"))
    path = tmp_path / "checkpoint-1" / ckpt.CHECKSUMS
    path.unlink()
    (tmp_path / "checkpoint-1" / "a").write_text("")
    if sums is not None:
        path.write_bytes(sums)
    assert ckpt.problem_of(tmp_path / "checkpoint-1").startswith(f"{path} cannot be read (")


@pytest.mark.parametrize("name", ["../outside", "inner/../../outside", "/etc/hostname"])
def test_checksums_that_lead_out_of_the_folder_are_refused(name, tmp_path):
    folder = tmp_path / "checkpoint-1"
    ckpt.write_folder(folder, write_text("new"))
    (tmp_path / "outside").write_bytes(b"")
    sums = json.loads((folder / ckpt.CHECKSUMS).read_text())
    empty = {"bytes": 0, "sha256": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"}
    (folder / ckpt.CHECKSUMS).write_text(json.dumps({name: empty, **sums}))
    assert ckpt.problem_of(folder) == f"{folder / ckpt.CHECKSUMS} names {name}, outside the folder"


def test_a_plain_model_folder_is_no_checkpoint(tmp_path):
    ckpt.write_folder(tmp_path / "checkpoint-1", lambda folder: (folder / "config.json").write_text("{}"))
    assert ckpt.problem_of(tmp_path / "checkpoint-1") == f"{tmp_path / 'checkpoint-1'} holds no training state"


# Choosing and removing.

@pytest.fixture
def run(tmp_path):
    """A run folder with checkpoints 5, 9, 10 and 100, and what else lies there."""
    for step in (9, 100, 10, 5):
        ckpt.write_folder(tmp_path / f"checkpoint-{step}", write_text(str(step)))
    for other in ("best", "final", "checkpoint-", "checkpoint-x", "checkpoint-7b", ".checkpoint-200.partial", ".checkpoint-300.previous"):
        (tmp_path / other).mkdir()
    return tmp_path


def names(folders):
    return [folder.name for folder in folders]


def test_checkpoints_are_found_by_number_newest_first(run, tmp_path):
    assert names(ckpt.checkpoints(run)) == ["checkpoint-100", "checkpoint-10", "checkpoint-9", "checkpoint-5"]
    assert ckpt.checkpoints(tmp_path / "nowhere") == []


def test_the_newest_good_checkpoint_is_taken_and_damaged_ones_are_named(run, capsys):
    assert ckpt.newest_good(run).name == "checkpoint-100"
    assert capsys.readouterr().out == ""
    (run / "checkpoint-100" / "text").unlink()
    (run / "checkpoint-10" / ckpt.STATE_TENSORS).write_bytes(b"")
    assert ckpt.newest_good(run).name == "checkpoint-9"
    first, second = capsys.readouterr().out.splitlines()
    assert first == f"passed over: {run}/checkpoint-100/text is missing"
    assert second.startswith(f"passed over: {run}/checkpoint-10/{ckpt.STATE_TENSORS} has 0 bytes")


def test_a_run_whose_checkpoints_are_all_damaged_is_refused(run):
    for folder in ckpt.checkpoints(run):
        (folder / "text").unlink()
    with pytest.raises(UserError, match=rf"--resume --output {run}: none of its 4 checkpoints verifies \({run}/checkpoint-100/text is "
                                        r"missing\); restore one, or start anew with --overwrite"):
        ckpt.newest_good(run)


def test_a_run_without_checkpoints_has_none(tmp_path):
    assert ckpt.newest_good(tmp_path) is None


@settings(max_examples=20, deadline=None)
@given(steps=st.sets(st.integers(0, 2000), max_size=6), keep=st.integers(1, 8))
def test_prune_keeps_the_newest(steps, keep, tmp_path_factory):
    run = tmp_path_factory.mktemp("run")
    for step in steps:
        (run / f"checkpoint-{step}").mkdir()
    (run / "best").mkdir()
    ckpt.prune(run, keep)
    assert set(os.listdir(run)) == {"best", *(f"checkpoint-{step}" for step in sorted(steps)[-keep:])}


# What is in them.

def test_a_model_folder_opens_with_transformers(checkpoint, vocabulary, tiny_tokenizer):
    model, expected = AutoModelForPreTraining.from_pretrained(checkpoint), small_model(vocabulary.size)
    for name, weight in expected.named_parameters():
        assert torch.equal(model.get_parameter(name), weight), name
    text = "banking rivers teach quickly ."
    assert AutoTokenizer.from_pretrained(checkpoint)(text)["input_ids"] == tiny_tokenizer(text)["input_ids"]


def test_facts_and_model_card(checkpoint, vocabulary, tiny_tokenizer, tmp_path):
    assert ckpt.read_facts(checkpoint) == FACTS
    card = (checkpoint / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\npipeline_tag: fill-mask\n")
    assert "| held-out perplexity | 12.5000 |" in card and "| max length | 64 |" in card and "were not trained" not in card
    model = small_model(vocabulary.size, "mlm")
    ckpt.write_model(tmp_path, model, tiny_tokenizer, {**FACTS, "objective": "mlm"}, model.state_dict())
    assert "The pooler and the NSP head (`bert.pooler`, `cls.seq_relationship`) were not trained" in (tmp_path / "README.md").read_text()


def test_another_programs_folder_has_no_facts(tmp_path):
    assert ckpt.read_facts(tmp_path) == {}
    (tmp_path / ckpt.FACTS).write_text("{")
    assert ckpt.read_facts(tmp_path) == {}


def test_training_state_goes_there_and_back(tmp_path):
    layer = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True)
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    state = {"weight": optimizer.state[layer.weight], "bias": optimizer.state[layer.bias]}
    tensors = {"optimizer": state, "random_states": [ckpt.random_states(torch.device("cpu"))]}
    ckpt.write_state(tmp_path, tensors, {"progress": {"position": [0, 2, 5]}})
    assert ckpt.read_values(tmp_path) == {"progress": {"position": [0, 2, 5]}}
    read = ckpt.read_tensors(tmp_path)
    for name, entry in state.items():
        assert all(torch.equal(read["optimizer"][name][part], value) for part, value in entry.items())
    expected = torch.rand(3)  # the state was taken before this draw
    ckpt.set_random_states(read["random_states"][0], torch.device("cpu"))
    assert torch.equal(torch.rand(3), expected)


def test_nothing_is_unpickled(tmp_path):
    torch.save({"path": Path("x")}, tmp_path / ckpt.STATE_TENSORS)
    with pytest.raises(UserError, match="training_state.pt: cannot be read .UnpicklingError: Weights only load failed"):
        ckpt.read_tensors(tmp_path)


@pytest.mark.parametrize("text", [None, "{"])
def test_values_that_cannot_be_read(text, tmp_path):
    if text:
        (tmp_path / ckpt.STATE_JSON).write_text(text)
    with pytest.raises(UserError, match=rf"{tmp_path}/{ckpt.STATE_JSON}: cannot be read \("):
        ckpt.read_values(tmp_path)
