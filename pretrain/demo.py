"""The embedded demo: English text that comes with Python, and a run sized to the machine.

The text is the language reference (`pydoc_data.topics`) and the docstrings of the standard library,
split into sentences at periods: one document per topic and per module.
"""

import ast
import copy
import platform
import re
import sysconfig
import time
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import median

import torch

from pretrain import files
from pretrain.build import build
from pretrain.config import Config
from pretrain.data.loader import DataPosition
from pretrain.errors import counted
from pretrain.inputs import cache_named
from pretrain.pretraining import PretrainingRun
from pretrain.runtime.distributed import gather
from pretrain.runtime.optim import autocast, make_optimizers
from pretrain.schema import AUTO
from pretrain.train import train_step

TRAINING_SECONDS = 110.0  # of three minutes; start, preparation, evaluation, saving take the rest
MIN_EPOCHS = 0.1
TIMED_STEPS = 4
MAX_MODULE_BYTES = 1 << 20
SKIPPED_FOLDERS = {"site-packages", "test", "tests", "idle_test"}


def embedded_text(cache: Path) -> Path:
    """The text as a file in the `sentences` format, written once per version of Python."""
    path = cache / f"python-docs-{platform.python_version()}.txt"

    if path.exists():
        return path
    with cache_named(cache), files.exclusive(path):
        if not path.exists():  # else another process was faster
            print("collecting the embedded text: Python's language reference and docstrings")
            text = "\n\n".join("\n".join(document) for document in _documents())
            files.write_text(path, f"{text}\n")
    return path


def _documents() -> list[list[str]]:
    from pydoc_data.topics import topics

    texts = [topics[name] for name in sorted(topics)]
    library = Path(sysconfig.get_path("stdlib"))
    for file in sorted(library.rglob("*.py")):
        is_skipped = SKIPPED_FOLDERS & set(file.relative_to(library).parts)
        if not is_skipped and file.stat().st_size < MAX_MODULE_BYTES:
            texts.append("\n\n".join(_docstrings(file)))
    documents = [_sentences(text) for text in texts]
    return [document for document in documents if len(document) > 2]


def _docstrings(file: Path) -> list[str]:
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError, ValueError):  # some files are broken on purpose
        return []
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
    return [text for text in found if text]


def _sentences(text: str) -> list[str]:
    """Sentences of paragraphs, split after periods; those without a word are dropped."""
    sentences = []
    for paragraph in re.split(r"\n\s*\n", text):
        sentences += re.split(r"(?<=[.!?:]) +(?=[A-Z\"'(])", " ".join(paragraph.split()))
    return [sentence for sentence in sentences if re.search(r"[A-Za-z]{2}", sentence)]


def fit_to_machine(config: Config) -> Config:
    """Time a few steps to choose precision, threads (set here) and epochs for TRAINING_SECONDS.

    On a busy machine one thread is often faster than several, which wait for each other."""
    run = build(replace(config, shard=False))  # sharded weights cannot be copied
    precisions, threads = {run.precision}, {torch.get_num_threads()}
    if run.device.type == "cpu":  # on a GPU the precision decides the attention
        precisions |= {"fp32"} if config.precision == "auto" else set()
        threads |= {1}
    candidates = product(sorted(precisions), sorted(threads))
    times = {candidate: _seconds_per_step(run, *candidate) for candidate in candidates}
    times = gather(times)[0]  # so that every process chooses the same
    for (precision, threads), seconds in times.items():
        how = f"in {precision} on {counted(threads, 'thread')}"
        print(f"a step takes {1000 * seconds:.0f} ms {how}")
    precision, threads = min(times, key=times.get)
    print(f"training in {precision} on {counted(threads, 'thread')}")
    torch.set_num_threads(threads)
    epochs = config.epochs
    if not config.max_steps and epochs == AUTO:
        steps = TRAINING_SECONDS / times[precision, threads]
        epochs = max(MIN_EPOCHS, steps / run.data_facts["steps_per_epoch"])
    return replace(config, precision=precision, epochs=epochs)


def _seconds_per_step(run: PretrainingRun, precision: str, threads: int) -> float:
    """Median of a few steps after one to warm up; they train a copy of the model."""
    torch.set_num_threads(threads)
    config, phase = run.config, run.phases[0]
    model = copy.deepcopy(run.model).train()
    optimizers = make_optimizers(model, config)
    scaler = torch.amp.GradScaler(enabled=False)
    context, max_norm = autocast(run.device, precision), config.max_grad_norm
    places = [DataPosition(0, 0, n) for n in range(config.batch_size // run.micro_batch_size)]
    batches = [phase.collator(phase.dataset[place]) for place in places]
    times = []
    for _ in range(TIMED_STEPS + 1):
        begin = time.perf_counter()
        step = train_step(model, batches, optimizers, scaler, context, 0.0, max_norm, run.device)
        bool(step.finite)  # waits for the device
        times.append(time.perf_counter() - begin)
    return median(times[1:])
