"""Measure the speeds of this machine against their peers, both sides in one run, real tokens only (padding never counts).

prepare: text to token ids, against the tokenizer alone. data: plan, pairs, packing and masks on one core. train: the whole
step against transformers.Trainer on the same examples, and as a share of the device's matrix rate."""
import dataclasses
import importlib.util
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # else `import pretrain` may find a script

from pretrain.config import (  # noqa: E402
    Config, MachineOptions, ModelOptions, TaskOptions, TextOptions, TokenizerOptions, UserError, check, option, parse, run_command,
    validate,
)

PARTS = ("prepare", "data", "train")
QUICK = {"model": "mini", "max_length": 128, "batch_size": 32, "micro_batch_size": 32, "steps": 5}
SAMPLE_BYTES = 4 << 20  # text of `prepare`; less is repeated, so that what a corpus costs once weighs little
REPEATS = 5  # timed, after one that warms up
EPOCH_SHARDS = 2  # of a larger corpus `data` walks so many shards
BLOCK_STEPS = {"cpu": 1, "cuda": 8}  # a side's steps in a row: a GPU queues the next while it computes, as in a run
WARM_UP_BLOCKS = 2  # of each side; the first compiles


@dataclasses.dataclass
class BenchmarkOptions(MachineOptions, TaskOptions, TextOptions, TokenizerOptions, ModelOptions):
    """Options of this command."""

    model: str = option("mini", "a size to train from scratch, as pretrain.py's, or a BERT checkpoint")
    train: list[str] = option([], "text: files, folders, globs, or one prepared corpus (default: the embedded English text)",
                              nargs="+", metavar="PATH")
    batch_size: int = option(64, "sequences of max-length in an optimizer step")
    micro_batch_size: int = option(32, "sequences of max-length that go through the device at once")
    steps: int = option(10, "timed optimizer steps of each side")
    parts: list[str] = option(list(PARTS), "what is measured", nargs="+", choices=PARTS)
    quick: bool = option(False, f"about two minutes on two cores: {', '.join(f'--{k} {v}'.replace('_', '-') for k, v in QUICK.items())}")


def main(argv: list[str]) -> None:
    """Parse, measure the parts, print a table; JSON on the last line."""
    options = parse(argv, BenchmarkOptions, __doc__)
    if options.quick:
        options = parse(argv, BenchmarkOptions, __doc__, defaults=QUICK)
    check(validate(options) + ([] if options.steps >= 1 else [f"--steps {options.steps}: needed is a whole number of at least 1"]))
    if "train" in options.parts and importlib.util.find_spec("accelerate") is None:
        raise UserError("--parts train: transformers.Trainer needs accelerate: pip install accelerate (or --parts prepare data)")

    import torch

    from pretrain import embedded, setup
    from pretrain.text import check_text

    if not options.train:
        options.train, options.format = [str(embedded.write_text(Path(options.cache)))], "sentences"
    shared = {entry.name for entry in dataclasses.fields(Config)}
    config = Config(**{name: value for name, value in vars(options).items() if name in shared}, valid_fraction=0.0)
    run = setup.build(config)
    if run.world.size > 1 or run.device.index:
        raise UserError(f"--device {options.device}: needed is one process on the first GPU (CUDA_VISIBLE_DEVICES chooses it)")
    results, repeats = {}, 3 if options.quick else REPEATS
    if "prepare" in options.parts:
        text = check_text(options.train, "--train", options, run.world)
        if text is None:
            raise UserError(f"--train {options.train[0]}: is a prepared corpus; needed is text, or --parts data train")
        results["prepare"] = measure_prepare(text, run.tokenizer, repeats)
    if "data" in options.parts:
        results["data"] = {masking: measure_data(run, masking, repeats) for masking in ("token", "word")}
    if "train" in options.parts:
        results["train"] = measure_train(run, options.steps)
    report = {"machine": describe_machine(run.device, torch), "versions": describe_versions(), "precision": run.precision,
              "options": vars(options), "results": results}
    print_table(report)
    print(json.dumps(report))


def measure_prepare(text, tokenizer, repeats: int) -> dict:
    """Tokens/s of `prepare` and of `encode_batch_fast` alone, over the same sentences, in turns."""
    from pretrain.data import preparing, reading

    files = [Path(source.path) for source in text.sources]
    piece = reading.cut_into_pieces(files, text.text_format, SAMPLE_BYTES)[0]
    stream = list(reading.sentences(piece, text.text_format))
    stream *= max(1, SAMPLE_BYTES // sum(len(sentence) for sentence in stream if sentence))
    sentences, times = [sentence for sentence in stream if sentence], []
    with tempfile.TemporaryDirectory() as folder:
        sample = Path(folder, "sample.txt")
        sample.write_text("".join("\n" if sentence is None else f"{sentence}\n" for sentence in stream), encoding="utf-8")
        sources = reading.check_files([sample], "sample")
        for number in range(repeats + 1):
            begin = time.perf_counter()
            corpus = preparing.prepare(sources, "sentences", tokenizer, Path(folder, str(number)))
            middle = time.perf_counter()
            encodings = tokenizer.backend_tokenizer.encode_batch_fast(sentences, add_special_tokens=False)
            times.append((middle - begin, time.perf_counter() - middle))
    tokens = corpus.info["tokens"]
    assert tokens == sum(len(encoding.ids) for encoding in encodings), "the sides must do the same work"
    ours, peer = (tokens / statistics.median(side) for side in zip(*times[1:]))
    return {"tokens_per_second": ours, "raw_tokens_per_second": peer, "ratio": ours / peer, "tokens": tokens}


def measure_data(run, masking: str, repeats: int) -> dict:
    """Tokens/s of planning an epoch and of packing and masking all its micro-batches, in this process alone."""
    from pretrain.data.dataset import DataPosition, PretrainingDataset

    collator, rates = dataclasses.replace(run.collator, masking=masking), []
    for epoch in range(repeats + 1):  # another epoch has other pairs, so nothing is planned already
        dataset, tokens = PretrainingDataset(run.dataset.source, run.dataset.task), 0
        begin = time.perf_counter()
        for position in dataset.positions(DataPosition(epoch, 0, 0), end_epoch=epoch + 1):
            if position.place == EPOCH_SHARDS:
                break
            tokens += collator(dataset.__getitems__([position])).num_tokens
        rates.append(tokens / (time.perf_counter() - begin))
    return {"tokens_per_second": statistics.median(rates[1:]), "tokens": tokens}


def our_steps(run) -> Iterator[tuple[int, float]]:
    """One optimizer step for each `next`, made as `train` makes it; yields its real tokens and floating-point operations."""
    import torch

    from pretrain.data.dataset import DataPosition, MicroBatchSampler, make_loader
    from pretrain.model.bert import count_flops
    from pretrain.runtime.optim import autocast, make_optimizer
    from pretrain.train import train_step

    config, model = run.config, run.model.train()
    trained = torch.compile(model) if run.compile else model
    optimizer = make_optimizer(model, config.learning_rate, config.weight_decay, config.adam_betas, config.adam_epsilon)
    scaler = torch.amp.GradScaler(run.device.type, enabled=run.precision == "fp16")
    context = autocast(run.device, run.precision)
    loader = iter(make_loader(run.dataset, run.collator, MicroBatchSampler(run.dataset, DataPosition(0, 0, 0)), config.workers,
                              pin_memory=run.device.type == "cuda"))
    while True:
        batches = [next(loader) for _ in range(config.batch_size // config.micro_batch_size)]
        train_step(trained, model.loss_weights, batches, optimizer, scaler, context, config.learning_rate, config.max_grad_norm,
                   run.device)
        yield sum(batch.num_tokens for batch in batches), sum(count_flops(model, batch) for batch in batches)


def unpacked(run, count: int) -> list[dict]:
    """The first `count` examples of the run, with its masks, as transformers wants them; its order is kept."""
    import torch

    from pretrain.batch import IGNORED
    from pretrain.data.dataset import DataPosition

    collator, rows = dataclasses.replace(run.collator, fill=False), []
    for position in run.dataset.positions(DataPosition(0, 0, 0)):
        batch = collator(run.dataset.__getitems__([position]))
        labels = torch.full_like(batch.input_ids, IGNORED)
        labels[batch.masked_positions] = batch.masked_lm_labels
        columns = {"input_ids": batch.input_ids.split(batch.lengths), "token_type_ids": batch.token_type_ids.split(batch.lengths),
                   "labels": labels.split(batch.lengths)}
        if "nsp" in run.model.loss_weights:
            columns["next_sentence_label"] = batch.next_sentence_label
        rows += [dict(zip(columns, values)) for values in zip(*columns.values())]
        if len(rows) >= count:
            return rows[:count]


def make_trainer(run, rows: list[dict], steps: int, folder: str, callback):
    """transformers.Trainer with the stock model over `rows`, padded to the longest of a batch: what people would run."""
    import torch
    import transformers
    from torch.nn.utils.rnn import pad_sequence
    from transformers.trainer_callback import PrinterCallback

    from pretrain.batch import IGNORED

    def pad(chosen: list[dict]) -> dict:
        fillings = {"input_ids": run.collator.vocabulary.pad_id, "token_type_ids": 0, "labels": IGNORED, "attention_mask": 0}
        chosen = [{**row, "attention_mask": torch.ones_like(row["input_ids"])} for row in chosen]
        whole = {name: torch.stack([row[name] for row in chosen]) for name in chosen[0].keys() - fillings.keys()}
        return whole | {name: pad_sequence([row[name] for row in chosen], True, value) for name, value in fillings.items()}

    config = run.config
    stock = transformers.AutoModelForMaskedLM if config.objective == "mlm" else transformers.AutoModelForPreTraining
    arguments = transformers.TrainingArguments(
        folder, per_device_train_batch_size=config.micro_batch_size, max_steps=steps, optim="adamw_torch_fused",
        gradient_accumulation_steps=config.batch_size // config.micro_batch_size, learning_rate=config.learning_rate,
        weight_decay=config.weight_decay, max_grad_norm=config.max_grad_norm, bf16=run.precision == "bf16",
        fp16=run.precision == "fp16", use_cpu=run.device.type == "cpu", gradient_checkpointing=config.gradient_checkpointing,
        train_sampling_strategy="sequential", dataloader_num_workers=config.workers, remove_unused_columns=False,
        logging_strategy="no", save_strategy="no", eval_strategy="no", report_to="none", disable_tqdm=True)
    trainer = transformers.Trainer(stock.from_config(run.model.config, attn_implementation="sdpa"), arguments, pad, rows,
                                   callbacks=[callback])
    trainer.remove_callback(PrinterCallback)
    return trainer


def measure_train(run, steps: int) -> dict:
    """Real tokens/s, share of the matrix rate and, on a GPU, peak memory of both sides; blocks of steps take turns."""
    import torch
    from transformers import TrainerCallback

    from pretrain.runtime.optim import peak_flops

    device, block, batch_size = run.device, BLOCK_STEPS[run.device.type], run.config.batch_size
    blocks = WARM_UP_BLOCKS + -(-steps // block)
    rows, ours = unpacked(run, blocks * block * batch_size), our_steps(run)
    lengths = [len(row["input_ids"]) for row in rows]
    sides = {"ours": [], "peer": []}  # of each block (tokens, seconds, FLOP, peak bytes)
    on_gpu = device.type == "cuda"

    class TakeTurns(TrainerCallback):
        """Ends a block of the peer's, makes one of ours, and starts the peer's clock again."""

        held = torch.cuda.memory_allocated(device) if on_gpu else 0  # by our side, between its blocks

        def close(self, side: str, tokens: int, flops: float, held_by_other: int) -> int:
            """End a block; returns the memory that is in use."""
            if on_gpu:
                torch.cuda.synchronize(device)
            peak, in_use = (torch.cuda.max_memory_allocated(device), torch.cuda.memory_allocated(device)) if on_gpu else (0, 0)
            sides[side].append((tokens, time.perf_counter() - self.begin, flops, peak - held_by_other))
            if on_gpu:
                torch.cuda.reset_peak_memory_stats(device)
            self.begin = time.perf_counter()
            return in_use

        def on_train_begin(self, *_, **__) -> None:
            self.begin = time.perf_counter()

        def on_step_end(self, arguments, state, control, **_) -> None:
            if state.global_step % block == 0:
                last = state.global_step * batch_size
                of_peer = self.close("peer", sum(lengths[last - block * batch_size: last]), 0.0, self.held) - self.held
                counted = [next(ours) for _ in range(block)]
                self.held = self.close("ours", *map(sum, zip(*counted)), of_peer) - of_peer

    peak = peak_flops(device, run.precision)
    with tempfile.TemporaryDirectory() as folder:
        make_trainer(run, rows, blocks * block, folder, TakeTurns()).train()
    timed = {name: kept[WARM_UP_BLOCKS:] for name, kept in sides.items()}
    tokens_per_second = {name: statistics.median(entry[0] / entry[1] for entry in kept) for name, kept in timed.items()}
    flops_a_token = sum(entry[2] for entry in timed["ours"]) / sum(entry[0] for entry in timed["ours"])
    result = {"tokens_per_second": tokens_per_second, "ratio": tokens_per_second["ours"] / tokens_per_second["peer"],
              "step_seconds": {name: statistics.median(entry[1] for entry in kept) / block for name, kept in timed.items()},
              "share_of_matrix_rate": {name: rate * flops_a_token / peak for name, rate in tokens_per_second.items()},
              "matrix_flops": peak, "steps": (blocks - WARM_UP_BLOCKS) * block}
    if on_gpu:
        result["peak_bytes"] = {name: max(entry[3] for entry in kept) for name, kept in timed.items()}
    return result


def describe_machine(device, torch) -> dict:
    """What the numbers were measured on; a load above 0 when the run began means that others took part of it."""
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    names = [line.partition(":")[2].strip() for line in cpuinfo.splitlines() if line.startswith("model name")]
    capabilities = torch.cpu.get_capabilities()
    return {"cpu": names[0] if names else platform.processor() or platform.machine(), "cores": os.cpu_count(),
            "threads": torch.get_num_threads(), "load": round(os.getloadavg()[0], 2),
            "bf16": [name for name in ("avx512_bf16", "amx_bf16") if capabilities.get(name)],
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"}


def describe_versions() -> dict[str, str]:
    """Versions of Python and of the packages that are measured."""
    from importlib.metadata import version

    names = [name for name in ("torch", "transformers", "tokenizers", "accelerate", "numpy") if importlib.util.find_spec(name)]
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def print_table(report: dict) -> None:
    """The results, a line each."""
    results, rows = report["results"], []
    if "prepare" in results:
        rows.append(("prepare, tokens/s (raw encode_batch_fast)", *(results["prepare"][name] for name in ("tokens_per_second",
                                                                                                      "raw_tokens_per_second"))))
    for masking, numbers in results.get("data", {}).items():
        rows.append((f"plan, pairs, pack, mask {masking}s, tokens/s", numbers["tokens_per_second"], None))
    named = {"tokens_per_second": "train, real tokens/s (Trainer)", "step_seconds": "seconds a step",
             "share_of_matrix_rate": "share of the matrix rate", "peak_bytes": "peak memory, bytes"}
    for key, name in named.items():
        if key in results.get("train", {}):
            rows.append((name, *results["train"][key].values()))
    for kind in ("machine", "versions"):
        print(f"{kind}: " + ", ".join(f"{name} {value}" for name, value in report[kind].items()))
    print(f"{'':44}{'ours':>16}{'peer':>16}{'ours/peer':>11}")
    for name, ours, peer in rows:
        shown = [f"{value:>16,.0f}" if value > 100 else f"{value:>16.3f}" for value in (ours, peer) if value is not None]
        print(f"{name:44}{''.join(shown)}" + (f"{ours / peer:>11.2f}" if peer else ""))


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
