"""Shared fixtures: a small text, tokenizers and a corpus made of it, and runs of the scripts' `main` in this process; everything
offline and on one thread."""
import importlib.util
import json
import os
import random
import shutil
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pytest  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers  # noqa: E402
from transformers import RobertaTokenizer, XLMRobertaTokenizer  # noqa: E402

from pretrain import train  # noqa: E402
from pretrain.command import run_command  # noqa: E402
from pretrain.data import reading, tokenizer  # noqa: E402
from pretrain.data.preparing import prepare  # noqa: E402
from pretrain.runtime import checkpoint as ckpt  # noqa: E402

torch.set_num_threads(1)  # the tensors are small, and bit-equality is promised per thread count
ROOT = Path(__file__).resolve().parent.parent
SIZES = ["--config-override", "hidden_size=32", "intermediate_size=64", "num_attention_heads=2"]


def make_documents(count: int = 60, seed: int = 7) -> list[list[str]]:
    """Documents of 1 to 30 sentences of 1 to 24 words; long words fall into several pieces."""
    source = random.Random(seed)
    stems = ["bank", "river", "money", "water", "teach", "learn", "train", "model", "token", "mask", "sentence", "quick", "slow"]
    endings = ["", "s", "ed", "ing", "er", "ation", "ization", "ally"]
    words = [stem + ending for stem in stems for ending in endings]
    return [[" ".join(source.choices(words, k=source.randint(1, 24))) + " ." for _ in range(source.randint(1, 30))]
            for _ in range(count)]


@pytest.fixture(scope="session")
def documents() -> list[list[str]]:
    return make_documents()


@pytest.fixture(scope="session")
def text_file(documents, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join("\n".join(document) for document in documents) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tiny_tokenizer(documents):
    return tokenizer.train(lambda: (sentence for document in documents for sentence in document), 120)


@pytest.fixture(scope="session")
def vocabulary(tiny_tokenizer):
    return tokenizer.describe(tiny_tokenizer)


@pytest.fixture(scope="session")
def corpus(text_file, tiny_tokenizer, tmp_path_factory):
    sources = reading.check_files([text_file], "--train")
    return prepare(sources, "sentences", tiny_tokenizer, tmp_path_factory.mktemp("corpus") / "corpus")


def trained_state(model, trainer, texts) -> dict:
    """The model part of tokenizer.json, after training with byte-level or with SentencePiece's rules."""
    made = Tokenizer(model)
    if isinstance(model, models.BPE):
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        made.normalizer, made.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Metaspace()
    made.train_from_iterator(texts, trainer)
    return json.loads(made.to_str())["model"]


@pytest.fixture(scope="session")
def roberta_tokenizer(documents) -> RobertaTokenizer:
    """Byte-level BPE."""
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    state = trained_state(models.BPE(), trainer, (sentence for document in documents for sentence in document))
    return RobertaTokenizer(vocab=state["vocab"], merges=[tuple(pair) for pair in state["merges"]])


@pytest.fixture(scope="session")
def xlm_roberta_tokenizer(documents) -> XLMRobertaTokenizer:
    """SentencePiece unigrams."""
    trainer = trainers.UnigramTrainer(vocab_size=150, special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"], unk_token="<unk>",
                                      show_progress=False)
    state = trained_state(models.Unigram(), trainer, (sentence for document in documents for sentence in document))
    return XLMRobertaTokenizer(vocab=[tuple(entry) for entry in state["vocab"]])


# Runs of the scripts.

def script(name):
    """The module of a script; importing it does not run it."""
    kept = sys.path[0]
    spec = importlib.util.spec_from_file_location(f"script_{name}", ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path[0] = kept
    return module


def ten_steps(text_file, cache, micro_batch_size) -> list[str]:
    """Options of a run of ten steps with dropout, accumulation, whole words and NSP."""
    return ["--train", str(text_file), "--model", "tiny", *SIZES, "--vocab-size", "120", "--masking", "word", "--max-length", "32",
            "--batch-size", "16", "--micro-batch-size", str(micro_batch_size), "--max-steps", "10", "--save-every", "2", "--eval-every",
            "4", "--log-every", "3", "--keep", "9", "--eval-tokens", "600", "--cache", str(cache), "--learning-rate", "1e-3",
            "--precision", "fp32"]


def rows(output):
    """Rows of metrics.jsonl, without what depends on the clock and the machine."""
    read = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith(("speed/", "memory/"))} for row in read]


def assert_same_run(left, right, step=10):
    """Weights, optimizer, random states and numbers are equal bit for bit."""
    a, b = load_file(left / "final" / "model.safetensors"), load_file(right / "final" / "model.safetensors")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    a, b = ckpt.read_tensors(left / f"checkpoint-{step}"), ckpt.read_tensors(right / f"checkpoint-{step}")
    for name, state in a["optimizer"].items():
        assert all(torch.equal(state[key], b["optimizer"][name][key]) for key in state)
    assert torch.equal(a["random_states"][0]["cpu"], b["random_states"][0]["cpu"])
    assert rows(left) == rows(right)


def interrupted_copy(finished, output, step):
    """The run folder as a crash after `step` leaves it: later checkpoints absent, later numbers already logged."""
    shutil.copytree(finished, output)
    for folder in ckpt.checkpoints(output):
        if int(folder.name.split("-")[1]) > step:
            shutil.rmtree(folder)
    shutil.rmtree(output / "final")
    (output / "summary.json").unlink()


def refusal(main, argv, capsys) -> str:
    """What the command tells as it refuses: exit code 2 and messages alone, a line each."""
    capsys.readouterr()
    assert run_command(main, [str(part) for part in argv]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines and all(line.startswith("error: ") for line in lines)
    return "\n".join(line.removeprefix("error: ") for line in lines)


def in_processes(folder, main, argv, count=1, prepare=lambda rank: None, seconds=60) -> list[tuple[int, str]]:
    """(exit code, what was told on stderr) of the command in each of `count` forked processes, which find one another as under
    torchrun; negative is the signal that has ended one. `prepare` is called in each before: what is to go wrong there."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = {}
    for rank in range(count):
        children[rank] = os.fork()
        if not children[rank]:
            code = 1
            try:
                for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1",
                                    "MASTER_PORT": port}.items() if count > 1 else ():
                    os.environ[name] = str(value)
                sys.stdout, sys.stderr = ((folder / f"{name}-{rank}").open("w", buffering=1) for name in ("out", "err"))
                os.dup2(sys.stderr.fileno(), 2)  # what is written past Python
                prepare(rank)
                code = run_command(main, [str(part) for part in argv])
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
    end, codes = time.monotonic() + seconds, {}
    while len(codes) < count:
        for rank in children.keys() - codes.keys():
            if time.monotonic() > end:
                os.kill(children[rank], signal.SIGKILL)
            ended, status = os.waitpid(children[rank], os.WNOHANG)
            if ended:
                codes[rank] = os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    return [(codes[rank], (folder / f"err-{rank}").read_text()) for rank in range(count)]


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> Path:
    """Prepared corpora, converted text and trained tokenizers of all tests."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def steps_seen(monkeypatch) -> list:
    """The micro-batches of every step that the test trains."""
    seen, original = [], train.train_step

    def observed(model, loss_weights, batches, *more):
        seen.append(batches)
        return original(model, loss_weights, batches, *more)

    monkeypatch.setattr(train, "train_step", observed)
    return seen
