"""Shared by all tests: a small text, tokenizers and a corpus made from it, and functions that run
the `main` of a command in this process. Everything is offline and on one thread."""

import contextlib
import csv
import ctypes
import gc
import importlib
import json
import os
import random
import shutil
import signal
import socket
import struct
import sys
import time
import traceback
import types
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
# The tensors are small, and bit-equality is promised per number of threads; also in processes.
os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pytest  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from tokenizers import (  # noqa: E402
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import (  # noqa: E402
    BertModel,
    PreTrainedTokenizerFast,
    RobertaTokenizer,
    XLMRobertaTokenizer,
)

from pretrain.cli import parse, run_command  # noqa: E402
from pretrain.config import Config  # noqa: E402
from pretrain.data import tokenizer  # noqa: E402
from pretrain.data.corpus import Corpus  # noqa: E402
from pretrain.data.prepare import prepare  # noqa: E402
from pretrain.data.sources import check_files  # noqa: E402
from pretrain.errors import UserError  # noqa: E402
from pretrain.files import read_json  # noqa: E402
from pretrain.runtime import checkpoint as ckpt  # noqa: E402
from pretrain.runtime import optim  # noqa: E402

os.fsync = lambda handle: None  # no power fails here, and each run would wait 100 times
ROOT = Path(__file__).resolve().parent.parent
SIZES = ["--config-override", "hidden_size=32", "intermediate_size=64", "num_attention_heads=2"]
STEMS = "bank river money water teach learn train model token mask sentence quick slow"
ENDINGS = ["", "s", "ed", "ing", "er", "ation", "ization", "ally"]
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]


def pytest_collection_finish() -> None:
    """Keeps the collector out of what is imported: each run asks it to free memory."""
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def rate_of_this_machine():
    """It is measured once; each run of a test would spend a fifth of its time on it."""
    measured, measure = [], optim.best_seconds

    def measure_once(work, device):
        measured[:] = measured or [measure(work, device)]
        return measured[0]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(optim, "best_seconds", measure_once)
        optim.peak_flops(torch.device("cpu"), "fp32")
        yield


def make_documents(count: int = 60, seed: int = 7) -> list[list[str]]:
    """Documents of 1 to 30 sentences of 1 to 24 words; long words fall into several pieces."""
    source = random.Random(seed)
    words = [stem + ending for stem in STEMS.split() for ending in ENDINGS]

    def sentence() -> str:
        return " ".join(source.choices(words, k=source.randint(1, 24))) + " ."

    return [[sentence() for _ in range(source.randint(1, 30))] for _ in range(count)]


def write_documents(path: Path, documents: list[list[str]]) -> Path:
    """Write text in the `sentences` format; returns its path."""
    text = "\n\n".join("\n".join(document) for document in documents)
    path.write_text(f"{text}\n", encoding="utf-8")
    return path


def write_rows(path: Path, rows: list[dict]) -> str:
    """Write rows as CSV, TSV, JSONL or Parquet, by suffix; returns the path."""
    if path.suffix == ".parquet":
        pytest.importorskip("datasets").Dataset.from_list(rows).to_parquet(path)
        return str(path)
    with path.open("w", encoding="utf-8", newline="") as out:
        if path.suffix == ".jsonl":
            out.writelines(json.dumps(row) + "\n" for row in rows)
        else:
            writer = csv.DictWriter(out, list(rows[0]), delimiter="\t,"[path.suffix == ".csv"])
            writer.writeheader()
            writer.writerows(rows)
    return str(path)


def read_rows(path) -> list[dict]:
    """The rows of a CSV or JSONL file."""
    with open(path, encoding="utf-8", newline="") as handle:
        if str(path).endswith(".csv"):
            return list(csv.DictReader(handle))
        return [json.loads(line) for line in handle]


def as_conll(texts, entities, scheme="BIO") -> str:
    """Words and tags of texts whose words are separated by spaces."""
    middle, last = {"BIO": "II", "BIOES": "IE", "BMES": "ME"}[scheme]
    lines = []
    for text, spans in zip(texts, entities):
        place = 0
        for word in text.split(" "):
            word_end, tag = place + len(word), "O"
            for start, end, label in spans:
                if start <= place < end:
                    prefix = "B" if place == start else last if word_end == end else middle
                    is_single = (place, word_end) == (start, end) and scheme != "BIO"
                    tag = f"{'S' if is_single else prefix}-{label}"
            lines.append(f"{word}\t{tag}")
            place = word_end + 1
        lines.append("")
    return "\n".join(lines)


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, hidden ones too, with its bytes."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture(scope="session")
def documents() -> list[list[str]]:
    return make_documents()


@pytest.fixture(scope="session")
def all_sentences(documents) -> list[str]:
    return [sentence for document in documents for sentence in document]


@pytest.fixture(scope="session")
def text_file(documents, tmp_path_factory) -> Path:
    return write_documents(tmp_path_factory.mktemp("text") / "text.txt", documents)


@pytest.fixture(scope="session")
def tiny_tokenizer(all_sentences):
    return tokenizer.train(lambda: iter(all_sentences), 120)


@pytest.fixture(scope="session")
def vocabulary(tiny_tokenizer):
    return tokenizer.describe(tiny_tokenizer)


@pytest.fixture(scope="session")
def corpus(text_file, tiny_tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus") / "corpus"
    return prepare(check_files([text_file]), "sentences", tiny_tokenizer, folder)


@pytest.fixture(scope="session")
def source(text_file, tiny_tokenizer, tmp_path_factory) -> Corpus:
    """The same text in more shards than a process keeps open."""
    folder, files = tmp_path_factory.mktemp("source") / "corpus", check_files([text_file])
    made = prepare(files, "sentences", tiny_tokenizer, folder, piece_bytes=16_000)
    assert made.num_shards > 5
    return made


def trained_state(model, trainer, texts) -> dict:
    """The model part of tokenizer.json, trained by byte-level or by SentencePiece's rules."""
    made = Tokenizer(model)
    if isinstance(model, models.BPE):
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        made.normalizer, made.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Metaspace()
    made.train_from_iterator(texts, trainer)
    return json.loads(made.to_str())["model"]


def byte_level(texts, size=400) -> RobertaTokenizer:
    """Byte-level BPE."""
    settings = {"special_tokens": SPECIAL, "show_progress": False, "vocab_size": size}
    settings["initial_alphabet"] = sorted(pre_tokenizers.ByteLevel.alphabet())
    state = trained_state(models.BPE(), trainers.BpeTrainer(**settings), texts)
    return RobertaTokenizer(vocab=state["vocab"], merges=[tuple(pair) for pair in state["merges"]])


def sentence_pieces(texts, size=150, alphabet="") -> XLMRobertaTokenizer:
    """SentencePiece unigrams."""
    settings = {"special_tokens": SPECIAL, "show_progress": False, "vocab_size": size}
    settings |= {"unk_token": "<unk>", "initial_alphabet": list(alphabet)}
    state = trained_state(models.Unigram(), trainers.UnigramTrainer(**settings), texts)
    return XLMRobertaTokenizer(vocab=[tuple(entry) for entry in state["vocab"]])


@pytest.fixture(scope="session")
def roberta_tokenizer(all_sentences) -> RobertaTokenizer:
    return byte_level(all_sentences)


@pytest.fixture(scope="session")
def xlm_roberta_tokenizer(all_sentences) -> XLMRobertaTokenizer:
    return sentence_pieces(all_sentences)


@pytest.fixture(scope="session")
def modernbert_tokenizer(all_sentences) -> PreTrainedTokenizerFast:
    """Byte-level BPE with BERT's special tokens, as ModernBERT has it."""
    made = Tokenizer(models.BPE())
    made.normalizer = normalizers.NFC()
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    settings = {"special_tokens": tokenizer.SPECIAL_TOKENS, "show_progress": False}
    settings |= {"vocab_size": 400, "initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}
    made.train_from_iterator(all_sentences, trainers.BpeTrainer(**settings))
    ends = [(token, made.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=ends
    )
    names = {f"{token[1:-1].lower()}_token": token for token in tokenizer.SPECIAL_TOKENS}
    names["mask_token"] = AddedToken("[MASK]", lstrip=True, special=True)
    return PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=8192, **names)


def save(folder: Path, model, tokenizer) -> Path:
    """Save a model and its tokenizer in `folder`, which is returned."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def encoder(tiny_tokenizer, vocabulary, tmp_path_factory):
    """A pretrained encoder: one narrow layer, at most 64 tokens."""
    import packed_reference

    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(3)
    config = packed_reference.small_config(
        vocabulary.size, num_hidden_layers=1, hidden_dropout_prob=0.1
    )
    return str(save(folder, BertModel(config), tiny_tokenizer))


@pytest.fixture(scope="session")
def pretrained(tiny_tokenizer, vocabulary, tmp_path_factory) -> Path:
    """A small BERT with both heads and noise on every weight, and its tokenizer."""
    import packed_reference

    model = packed_reference.small_model(vocabulary.size)
    return save(tmp_path_factory.mktemp("pretrained") / "model", model, tiny_tokenizer)


# Faults and observers: functions that change the process in which something will happen.


def at(target, name, call, act, put=setattr):
    """Pass the arguments of call number `call`, from 1 on, of a function to `act` first; 0: of each
    call."""

    def patch():
        original, calls = getattr(target, name), []

        def watched(*given, **named):
            calls.append(name)
            if call in (0, len(calls)):
                act(*given)
            return original(*given, **named)

        put(target, name, watched)

    return patch


def send(number):
    return lambda *given: os.kill(os.getpid(), number)


def fail(error):
    def act(*given, **named):
        raise error

    return act


# Runs of the commands.


def script(name):
    """The module of the command that a script runs."""
    return importlib.import_module(f"pretrain.commands.{name}")


def arguments_of(*parts) -> list[str]:
    """Arguments of a command, from lines of text and lists of words."""
    arguments = []
    for part in parts:
        arguments += part.split() if isinstance(part, str) else map(str, part)
    return arguments


def pretrain_into(output: Path, *options) -> Path:
    """Run pretrain.py with lines and lists of options; returns `output`."""
    from pretrain.commands.pretrain import main

    main(arguments_of(*options, ["--output", output]))
    return output


def built(output: Path, *options):
    """The run that pretrain.py would start with lines and lists of options."""
    from pretrain.build import build

    return build(parse(arguments_of(*options, ["--output", output]), Config, ""))


@pytest.fixture(scope="module")
def finished(arguments, tmp_path_factory) -> Path:
    """The uninterrupted run with the `arguments` of the tests of a file, for comparison."""
    return pretrain_into(tmp_path_factory.mktemp("runs") / "finished", arguments)


def resume(output: Path, *options) -> Path:
    """Resume the run in `output`, which is returned."""
    return pretrain_into(output, "--resume", *options)


SHORT_RUN = """--model tiny --recipe classic --batch-size 16 --learning-rate 1e-3 --precision fp32
--max-steps 10 --save-every 2 --eval-every 4 --log-every 3 --keep 9 --eval-tokens 600"""


def ten_steps(text_file, cache, micro_batch_size) -> list[str]:
    """Options of a ten-step run with dropout, accumulation, whole-word masks and NSP."""
    more = f"--vocab-size 120 --masking word --max-length 32 --micro-batch-size {micro_batch_size}"
    files = ["--train", text_file, "--cache", cache]
    return arguments_of(files, SHORT_RUN, SIZES, more)


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> Path:
    """Prepared corpora, converted text and trained tokenizers of all tests."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def output(tmp_path) -> Path:
    """The folder of a run."""
    return tmp_path / "run"


def rows(output):
    """Rows of metrics.jsonl, one per step, without numbers that depend on clock or machine."""
    by_step = {}
    for numbers in read_rows(output / "metrics.jsonl"):
        row = by_step.setdefault(numbers["step"], {"step": numbers.pop("step")})
        assert not row.keys() & numbers.keys(), "a number is logged twice"
        for name, value in numbers.items():
            if not name.startswith(("speed/", "memory/")):
                row[name] = value
    return list(by_step.values())


def summary_of(output):
    return read_json(output / "summary.json")


def evaluated(model, text, capsys, *options) -> dict:
    """The scores that evaluate.py gives a model on a text, as runs are validated here."""
    from pretrain.commands.evaluate import main

    capsys.readouterr()
    files = ["--model", model, "--input", text]
    main(arguments_of(files, "--valid-fraction 0.05 --precision fp32", *options))
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def scores_of(row, group="eval") -> dict:
    """The scores in a row of metrics.jsonl, under the names of evaluate.py."""
    names = [name for name in row if name.startswith(f"{group}/")]
    return {name.partition("/")[2]: row[name] for name in names}


def leaves(value, name="") -> dict:
    """Every tensor and plain value in `value`, by its place."""
    if not isinstance(value, (dict, list, tuple)):
        return {name: value}
    found = {}
    for key, part in value.items() if isinstance(value, dict) else enumerate(value):
        found |= leaves(part, f"{name} {key}")
    return found


def assert_same(left: dict, right: dict) -> None:
    """Tensors and plain values are equal bit for bit."""
    assert left.keys() == right.keys()
    for name, value in left.items():
        is_equal = torch.equal if isinstance(value, torch.Tensor) else lambda a, b: a == b
        assert is_equal(value, right[name]), name


def assert_same_run(left, right, step=10):
    """Weights, training state and numbers are equal bit for bit, except for times."""
    weights = [load_file(folder / "final" / "model.safetensors") for folder in (left, right)]
    assert_same(*weights)
    states = []
    for folder in (left, right):
        state = leaves(ckpt.read_states(folder / f"checkpoint-{step}"))
        states.append({name: value for name, value in state.items() if "seconds" not in name})
    assert_same(*states)
    assert rows(left) == rows(right)


def change_json(path, change) -> None:
    """Write what `change` makes of the content."""
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def change_weights(folder, change) -> None:
    """Call `change` with the weights of a model folder, by name, and save them."""
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def overflowing(folder, copy, factor=1e30) -> Path:
    """A copy of a model whose weights are finite, unless the factor is not, and outputs are not."""

    def multiply(weights):
        for name in weights:
            if "intermediate.dense.weight" in name or "output.dense.weight" in name:
                weights[name] *= factor

    change_weights(shutil.copytree(folder, copy), multiply)
    return copy


@pytest.fixture
def on_hub(tmp_path, monkeypatch):
    """A function that makes the folder of a model in the hub's cache, which is empty at first."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))

    def make(name) -> Path:
        folder = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        snapshot = folder / "snapshots" / ("0" * 40)
        for needed in (snapshot, folder / "refs"):
            needed.mkdir(parents=True, exist_ok=True)
        (folder / "refs" / "main").write_text("0" * 40)
        return snapshot

    return make


def interrupted_copy(finished, output, step):
    """The run folder as a crash after `step` leaves it: without later checkpoints, but with later
    numbers in the log. Returns `output`."""
    shutil.copytree(finished, output)
    for folder in ckpt.checkpoints(output):
        if ckpt.step_of(folder) > step:
            shutil.rmtree(folder)
    shutil.rmtree(output / "final")
    (output / "summary.json").unlink()
    return output


def refused(call, *arguments, begins="", names="", **options) -> str:
    """The message of the UserError that the call raises: how it begins, and what it names."""
    with pytest.raises(UserError) as caught:
        call(*arguments, **options)
    told = str(caught.value)
    assert told.startswith(begins) and str(names) in told, told
    return told


def refusal(main, argv, capsys, begins=None, unwritten=None) -> str:
    """The messages of a command that refuses its input, with exit code 2 and no other output: one
    line, if it is given how that `begins`. The folder `unwritten` does not exist then."""
    capsys.readouterr()
    assert run_command(main, [str(part) for part in argv]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines and all(line.startswith("error: ") for line in lines)
    told = "\n".join(line.removeprefix("error: ") for line in lines)
    assert begins is None or (told.startswith(begins) and len(lines) == 1), told
    assert unwritten is None or not unwritten.exists()
    return told


def without_privileges() -> None:
    """From now on this process may open only what its permissions allow, even as root."""
    if os.getuid() == 0:
        header = struct.pack("Ii", 0x20080522, 0)  # version 3 of linux/capability.h, this process
        assert ctypes.CDLL(None).capset(header, bytes(24)) == 0


@contextlib.contextmanager
def observed_steps():
    """A list that collects the micro-batches of every training step inside the context."""
    from pretrain import train

    seen = []

    def note(model, batches, *more):
        seen.append(batches)

    with pytest.MonkeyPatch.context() as patched:
        at(train, "train_step", 0, note, patched.setattr)()
        yield seen


def observed_run(folder: Path, arguments: list[str]) -> types.SimpleNamespace:
    """The output of a run into `folder`, and the micro-batches of its steps."""
    with observed_steps() as seen:
        output = pretrain_into(folder, arguments)
    return types.SimpleNamespace(output=output, steps=list(seen))


@pytest.fixture
def steps_seen():
    """The micro-batches of every training step of the test."""
    with observed_steps() as seen:
        yield seen


def _run_child(folder, main, argv, rank, variables, prepare) -> None:
    """Run the command in a forked process, then end the process."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # even if the tests run under nohup
    # After a fork the threads of the tokenizers library are gone, and it would wait for them.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    code = 1
    try:
        os.environ.update(variables)
        sys.stdout = (folder / f"out-{rank}").open("w", buffering=1)
        sys.stderr = (folder / f"err-{rank}").open("w", buffering=1)
        os.dup2(sys.stderr.fileno(), 2)  # for output that bypasses Python
        prepare(rank)
        code = run_command(main, [str(part) for part in argv])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def in_processes(
    folder, main, argv, count=1, prepare=lambda rank: None, seconds=60
) -> list[tuple[int, str]]:
    """(exit code, stderr) of the command in each of `count` forked processes, which find one
    another as under torchrun; a negative code is the signal that ended one. `prepare(rank)` is
    called in each one first, to inject a fault."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = {}
    for rank in range(count):
        variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count}
        variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        found = {name: str(value) for name, value in variables.items()} if count > 1 else {}
        children[rank] = os.fork()
        if not children[rank]:
            _run_child(folder, main, argv, rank, found, prepare)
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
