"""The embedded default: real English that every Python installation carries, and a run sized to the machine.

The text is the language reference (`pydoc_data.topics`) and the docstrings of the standard library, cut into sentences by
full stops, a document for each topic and for each module.
"""
from __future__ import annotations

import ast
import copy
import platform
import re
import sysconfig
import time
from pathlib import Path

import torch

from pretrain import files
from pretrain.data.dataset import DataPosition
from pretrain.evaluate import fill_masks
from pretrain.phases import phase_ends
from pretrain.runtime.distributed import gather
from pretrain.runtime.optim import autocast, make_optimizer
from pretrain.setup import Run
from pretrain.train import train_step

TRAINING_SECONDS = 110.0  # of the three minutes; the rest is start, preparation, evaluations and saving
MIN_STEPS, MAX_STEPS = 100, 4000
TIMED_STEPS = 4
MAX_MODULE_BYTES = 1 << 20
EXAMPLES = ("Return True [MASK] the object is a string.", "Return [MASK] if the path exists, False otherwise.",
            "This is the end of [MASK] file.")


def write_text(cache: Path) -> Path:
    """The text as a file in the `sentences` format; written once for each version of Python."""
    path = cache / f"python-docs-{platform.python_version()}.txt"
    if not path.is_file():
        print("collecting the embedded text: Python's language reference and docstrings")
        files.write_text(path, "\n\n".join("\n".join(document) for document in _documents()) + "\n")
    return path


def _documents() -> list[list[str]]:
    from pydoc_data.topics import topics

    texts = [topics[name] for name in sorted(topics)]
    library = Path(sysconfig.get_path("stdlib"))
    for file in sorted(library.rglob("*.py")):
        if not {"site-packages", "test", "tests", "idle_test"} & set(file.relative_to(library).parts) and (
                file.stat().st_size < MAX_MODULE_BYTES):
            texts.append("\n\n".join(_docstrings(file)))
    documents = [_sentences(text) for text in texts]
    return [document for document in documents if len(document) > 2]


def _docstrings(file: Path) -> list[str]:
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError, ValueError):  # a few files of the library are broken on purpose
        return []
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return [text for node in ast.walk(tree) if isinstance(node, kinds) and (text := ast.get_docstring(node))]


def _sentences(text: str) -> list[str]:
    """Sentences of prose: paragraphs joined, cut after a full stop; lines without letters are left away."""
    paragraphs = [" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text)]
    return [sentence for paragraph in paragraphs for sentence in re.split(r"(?<=[.!?:]) +(?=[A-Z\"'(])", paragraph)
            if re.search(r"[A-Za-z]{2}", sentence)]


def fit_to_machine(run: Run, seconds: float = TRAINING_SECONDS) -> None:
    """Choose precision, threads and step count of `run` from a few timed steps, so that training takes about `seconds`.

    On a busy machine one thread is often faster than all, which wait for each other. The steps go through a copy of the
    model; the random state is put back."""
    state, ways = torch.get_rng_state(), [(run.precision, torch.get_num_threads())]
    if run.device.type == "cpu":  # on a GPU the attention was chosen for the precision
        precisions = {run.precision, "fp32"} if run.config.precision == "auto" else {run.precision}
        ways = [(precision, threads) for precision in sorted(precisions) for threads in sorted({1, torch.get_num_threads()})]
    times = gather({way: _seconds_a_step(run, *way) for way in ways})[0]  # every process decides the same
    torch.set_rng_state(state)
    run.precision, threads = min(times, key=times.get)
    torch.set_num_threads(threads)
    step_seconds = times[run.precision, threads]
    run.config.precision = run.precision
    if not run.config.max_steps and run.config.epochs == type(run.config)().epochs:
        run.config.max_steps = max(MIN_STEPS, min(MAX_STEPS, int(seconds / step_seconds)))
        run.total_steps = run.config.max_steps
        phase_ends(run.config, run.total_steps)  # refuses too few
    shown = ", ".join(f"{1000 * value:.0f} ms ({precision}, {threads} threads)" for (precision, threads), value in times.items())
    print(f"a step takes {shown}: {run.total_steps} steps in {run.precision} on {threads} threads")


def fill_examples(folder: Path) -> str:
    """A few masks, filled by the model of `folder`, as lines."""
    filled = zip(EXAMPLES, fill_masks(str(folder), EXAMPLES, top=3, max_length=512))
    return "\n".join(f"  {text}\n    " + ", ".join(f"{token} {score:.2f}" for token, score, _ in rows) for text, rows in filled)


def _seconds_a_step(run: Run, precision: str, threads: int) -> float:
    """Median of a few steps after one to warm up."""
    torch.set_num_threads(threads)
    config, model = run.config, copy.deepcopy(run.model).train()
    optimizer = make_optimizer(model, 0.0, 0.0, config.adam_betas, config.adam_epsilon)
    positions = [DataPosition(0, 0, number) for number in range(config.batch_size // config.micro_batch_size)]
    batches = [run.collator(run.dataset.__getitems__([position])) for position in positions]
    times = []
    for _ in range(TIMED_STEPS + 1):
        begin = time.perf_counter()
        result = train_step(model, model.loss_weights, batches, optimizer, torch.amp.GradScaler(enabled=False),
                            autocast(run.device, precision), 0.0, config.max_grad_norm, run.device)
        float(result.grad_norm)  # waits for the device
        times.append(time.perf_counter() - begin)
    return sorted(times[1:])[TIMED_STEPS // 2]
