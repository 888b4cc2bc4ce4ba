"""Measure the speeds of this machine against their peers, both sides in one run, real tokens only (padding never counts).

prepare: text to token ids, against the tokenizer alone. data: plan, pairs, packing and masks on one core. train: the whole
step against transformers.Trainer on the same examples, and as a share of the device's matrix rate."""
import copy
import dataclasses
import importlib.util
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from statistics import median

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # else `import pretrain` may find a script

from pretrain import config as cli  # noqa: E402
from pretrain.command import UserError, check, option, parse, run_command  # noqa: E402

PARTS = ("prepare", "data", "train")
QUICK = {"model": "mini", "max_length": 128, "batch_size": 32, "micro_batch_size": 32, "steps": 5}
SAMPLE_BYTES = 4 << 20  # text of `prepare`; less is repeated, so that what a corpus costs once weighs little
REPEATS = 5  # timed, after one that warms up
EPOCH_SHARDS = 2  # of a larger corpus `data` walks so many shards
BLOCK_STEPS = {"cpu": 1, "cuda": 8}  # a side's steps in a row: a GPU queues the next while it computes, as in a run
WARM_UP_BLOCKS = 2  # of each side; the first compiles


@dataclasses.dataclass
class BenchmarkOptions(cli.MachineOptions, cli.TaskOptions, cli.TextOptions, cli.TokenizerOptions, cli.ModelOptions):
    """Options of this command."""

    model: str = option("mini", "a size to train from scratch, as pretrain.py's, or a BERT checkpoint")
    train: list[str] = option([], "text: files, folders, globs, or one prepared corpus (default: the embedded English text)",
                              nargs="+", metavar="PATH")
    batch_size: int = option(64, "sequences of max-length in an optimizer step")
    micro_batch_size: int = option(32, "sequences of max-length that go through the device at once")
    steps: int = option(10, "timed optimizer steps of each side (on a GPU rounded up to blocks of 8)")
    parts: list[str] = option(list(PARTS), "what is measured", nargs="+", choices=PARTS)
    quick: bool = option(False, "under two minutes on two cores: " + " ".join(f"--{k} {v}".replace("_", "-") for k, v in QUICK.items()))


def main(argv: list[str]) -> None:
    """Parse, measure the parts, print a table; JSON on the last line."""
    options = parse(argv, BenchmarkOptions, __doc__)
    if options.quick:
        options = parse(argv, BenchmarkOptions, __doc__, defaults=QUICK)
    check(cli.validate(options) + [f"--steps {options.steps}: needed is a whole number of at least 1"] * (options.steps < 1)
          + ["--phases: a measurement has one length; needed is --max-length"] * bool(options.phases))
    if "train" in options.parts and importlib.util.find_spec("accelerate") is None:
        raise UserError("--parts train: transformers.Trainer needs accelerate: pip install accelerate (or --parts prepare data)")

    import torch

    from pretrain import embedded, setup
    from pretrain.text import check_text

    if not options.train:
        options.train, options.format = [str(embedded.write_text(Path(options.cache)))], "sentences"
    known = {entry.name for entry in dataclasses.fields(cli.Config)}
    run = setup.build(cli.Config(**{name: value for name, value in vars(options).items() if name in known}, valid_fraction=0.0))
    if run.world.size > 1 or run.device.type == "cuda" and torch.cuda.device_count() > 1:
        raise UserError(f"--device {options.device}: needed is one process that sees one GPU (CUDA_VISIBLE_DEVICES=0)")
    report = {"machine": describe_machine(run.device), "options": vars(options), "precision": run.precision}
    repeats = 3 if options.quick else REPEATS
    if "prepare" in options.parts:
        text = check_text(options.train, "--train", options, run.world)
        if text is None:
            raise UserError(f"--train {options.train[0]}: is a prepared corpus; needed is text, or --parts data train")
        report["prepare"] = measure_prepare(text, run.tokenizer, repeats)
    if "data" in options.parts:
        report |= measure_data(run, repeats)
    if "train" in options.parts:
        report["train"] = measure_train(run, options.steps)
    print_table(report)
    print(json.dumps(report))


def measure_prepare(text, tokenizer, repeats: int) -> dict:
    """Tokens/s of `prepare` and of `encode_batch_fast` alone, over the same sentences, in turns."""
    from pretrain.data import preparing, reading

    piece = reading.cut_into_pieces([Path(source.path) for source in text.sources], text.text_format, SAMPLE_BYTES)[0]
    stream = [item and item[0] for item in reading.sentences(piece, text.text_format)]
    stream *= max(1, SAMPLE_BYTES // sum(len(sentence) for sentence in stream if sentence))
    sentences, times = [sentence for sentence in stream if sentence], []
    with tempfile.TemporaryDirectory() as folder:
        sample = Path(folder, "sample.txt")
        sample.write_text("".join(f"{sentence or ''}\n" for sentence in stream), encoding="utf-8")
        sources = reading.check_files([sample], "sample")
        for number in range(repeats + 1):
            begin = time.perf_counter()
            corpus = preparing.prepare(sources, "sentences", tokenizer, Path(folder, str(number)))
            middle = time.perf_counter()
            encodings = tokenizer.backend_tokenizer.encode_batch_fast(sentences, add_special_tokens=False)
            times.append((middle - begin, time.perf_counter() - middle))
    tokens = corpus.info["tokens"]
    assert tokens == sum(len(encoding.ids) for encoding in encodings), "the sides must do the same work"
    return {"tokens_per_second": {side: tokens / median(taken) for side, taken in zip(("ours", "peer"), zip(*times[1:]))}}


def measure_data(run, repeats: int) -> dict:
    """Tokens/s of planning an epoch and of packing and masking all its micro-batches, in this process alone; every strategy
    in turns, beside token masks. Entities need text with some (--lexicon, spans or tags, under --masking entity), similar words
    a table (--similar)."""
    from pretrain.data.dataset import DataPosition, PretrainingDataset

    corpus, given = run.dataset.source, run.collator.masking
    strategies = {masking: dataclasses.replace(given, masking=masking, similar=None) for masking in ("token", "word", "span", "entity")}
    strategies["similar"] = dataclasses.replace(given, masking="word")
    available = {"entity": corpus.info["entities"], "similar": given.similar}
    rates = {masking: [] for masking in strategies if available.get(masking, True)}
    for epoch in range(repeats + 1):  # another epoch has other pairs, so nothing is planned already
        for masking, kept in rates.items():
            collator = dataclasses.replace(run.collator, masking=strategies[masking])
            dataset, tokens = PretrainingDataset(corpus, run.dataset.task), 0
            begin = time.perf_counter()
            for position in dataset.positions(DataPosition(epoch, 0, 0), end_epoch=epoch + 1):
                if position.place == EPOCH_SHARDS:
                    break
                tokens += collator(dataset.__getitems__([position])).num_tokens
            kept.append(tokens / (time.perf_counter() - begin))
    medians = {masking: median(kept[1:]) for masking, kept in rates.items()}
    return {f"data_{masking}": {"tokens_per_second": {"ours": rate} | ({"peer": medians["token"]} if masking != "token" else {})}
            for masking, rate in medians.items()}


def our_steps(run) -> Iterator[tuple[int, float]]:
    """One optimizer step for each `next`, as `train` makes it; yields its real tokens and floating-point operations."""
    import torch

    from pretrain.data.dataset import DataPosition, MicroBatchSampler, make_loader
    from pretrain.model.bert import count_flops
    from pretrain.runtime.distributed import wrap
    from pretrain.runtime.optim import autocast, make_optimizer
    from pretrain.train import train_step

    config, model = run.config, run.model.train()
    trained = wrap(model, run.compile)
    optimizer = make_optimizer(model, config.learning_rate, config.weight_decay, config.adam_betas, config.adam_epsilon)
    scaler = torch.amp.GradScaler(run.device.type, enabled=run.precision == "fp16")
    sampler = MicroBatchSampler(run.dataset, DataPosition(0, 0, 0))
    loader = iter(make_loader(run.dataset, run.collator, sampler, config.workers, pin_memory=run.device.type == "cuda"))
    while True:
        batches = [next(loader) for _ in range(config.batch_size // config.micro_batch_size)]
        train_step(trained, model.loss_weights, batches, optimizer, scaler, autocast(run.device, run.precision), config.learning_rate,
                   config.max_grad_norm, run.device)
        yield sum(batch.num_tokens for batch in batches), sum(count_flops(model, batch) for batch in batches)


def unpack(run, count: int) -> list[dict]:
    """The first `count` examples of the run, in order and with its masks, as transformers wants them."""
    import torch

    from pretrain.batch import IGNORED
    from pretrain.data.dataset import DataPosition

    collator, positions, rows = dataclasses.replace(run.collator, fill=False), run.dataset.positions(DataPosition(0, 0, 0)), []
    while len(rows) < count:
        batch = collator(run.dataset.__getitems__([next(positions)]))
        labels = torch.full_like(batch.input_ids, IGNORED)
        labels[batch.masked_positions] = batch.masked_lm_labels
        packed = {"input_ids": batch.input_ids, "token_type_ids": batch.token_type_ids, "labels": labels,
                  "attention_mask": torch.ones_like(labels)}
        columns = {name: tensor.split(batch.lengths) for name, tensor in packed.items()}
        if "nsp" in run.model.loss_weights:
            columns["next_sentence_label"] = batch.next_sentence_label
        rows += [dict(zip(columns, values)) for values in zip(*columns.values())]
    return rows[:count]


def make_trainer(run, rows: list[dict], steps: int, folder: str, callback):
    """transformers.Trainer with the stock model over `rows`, padded to the longest of a batch: what people would run."""
    import torch
    import transformers
    from torch.nn.utils.rnn import pad_sequence
    from transformers.trainer_callback import PrinterCallback

    from pretrain.batch import IGNORED

    filling = {"input_ids": run.collator.vocabulary.pad_id, "token_type_ids": 0, "labels": IGNORED, "attention_mask": 0}

    def pad(chosen: list[dict]) -> dict:
        columns = {name: [row[name] for row in chosen] for name in chosen[0]}
        return {name: pad_sequence(values, batch_first=True, padding_value=filling[name]) if name in filling else torch.stack(values)
                for name, values in columns.items()}

    config = run.config
    stock = transformers.AutoModelForMaskedLM if config.objective == "mlm" else transformers.AutoModelForPreTraining
    model = stock.from_config(copy.deepcopy(run.model.config), attn_implementation="sdpa")
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    arguments = transformers.TrainingArguments(
        folder, per_device_train_batch_size=config.micro_batch_size, max_steps=steps, optim="adamw_torch_fused",
        gradient_accumulation_steps=config.batch_size // config.micro_batch_size, learning_rate=config.learning_rate,
        weight_decay=config.weight_decay, max_grad_norm=config.max_grad_norm, bf16=run.precision == "bf16",
        fp16=run.precision == "fp16", use_cpu=run.device.type == "cpu", train_sampling_strategy="sequential",
        dataloader_num_workers=config.workers, remove_unused_columns=False, logging_strategy="no", save_strategy="no",
        eval_strategy="no", report_to="none", disable_tqdm=True)
    trainer = transformers.Trainer(model, arguments, pad, rows, callbacks=[callback])
    trainer.remove_callback(PrinterCallback)
    return trainer


def measure_train(run, steps: int) -> dict:
    """Real tokens/s, share of the matrix rate and, on a GPU, peak memory of both sides; blocks of steps take turns."""
    import torch
    from transformers import TrainerCallback

    from pretrain.runtime.optim import peak_flops

    device, block, batch_size, cuda = run.device, BLOCK_STEPS[run.device.type], run.config.batch_size, torch.cuda
    blocks = WARM_UP_BLOCKS + -(-steps // block)
    rows, ours = unpack(run, blocks * block * batch_size), our_steps(run)
    lengths = [len(row["input_ids"]) for row in rows]
    sides = {"ours": [], "peer": []}  # of each block (tokens, FLOP, seconds, peak bytes)

    class TakeTurns(TrainerCallback):
        """Ends a block of the peer's, makes one of ours, and starts the peer's clock again."""

        held = cuda.memory_allocated(device) if device.type == "cuda" else 0  # by our side, between its blocks
        begin = 0.0

        def close(self, side: str, tokens: int, flops: float, held_by_other: int) -> int:
            """End a block and begin the next; returns the bytes that this side holds between its blocks."""
            in_use = peak = 0
            if device.type == "cuda":
                cuda.synchronize(device)
                in_use, peak = cuda.memory_allocated(device), cuda.max_memory_allocated(device)
                cuda.reset_peak_memory_stats(device)
            sides[side].append((tokens, flops, time.perf_counter() - self.begin, peak - held_by_other))
            self.begin = time.perf_counter()
            return in_use - held_by_other

        def on_step_end(self, arguments, state, control, **_) -> None:
            if state.global_step % block == 0:
                end = state.global_step * batch_size
                held_by_peer = self.close("peer", sum(lengths[end - block * batch_size: end]), 0.0, self.held)
                tokens, flops = map(sum, zip(*(next(ours) for _ in range(block))))
                self.held = self.close("ours", tokens, flops, held_by_peer)

    matrix_rates = [peak_flops(device, run.precision) for _ in range(REPEATS)]  # before and after: what others took shows
    with tempfile.TemporaryDirectory() as folder:
        make_trainer(run, rows, blocks * block, folder, TakeTurns()).train()
    matrix_rate = max(*matrix_rates, *(peak_flops(device, run.precision) for _ in range(REPEATS)))
    timed = {side: kept[WARM_UP_BLOCKS:] for side, kept in sides.items()}
    flops_a_token = sum(flops for _, flops, _, _ in timed["ours"]) / sum(tokens for tokens, _, _, _ in timed["ours"])
    rates = {side: median(tokens / seconds for tokens, _, seconds, _ in kept) for side, kept in timed.items()}
    result = {"tokens_per_second": rates,
              "share_of_matrix_rate": {side: rate * flops_a_token / matrix_rate for side, rate in rates.items()},
              "step_seconds": {side: median(seconds for _, _, seconds, _ in kept) / block for side, kept in timed.items()}}
    if device.type == "cuda":
        result["peak_gib"] = {side: max(peak for _, _, _, peak in kept) / 2**30 for side, kept in timed.items()}
    return result | {"matrix_flops": matrix_rate, "steps": (blocks - WARM_UP_BLOCKS) * block}


def describe_machine(device) -> dict:
    """What the numbers are measured on; a load far above 0 before the run means that others have a part of it."""
    import torch

    cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").is_file() else ""
    names = [line.partition(": ")[2] for line in cpuinfo.splitlines() if line.startswith("model name")]
    fast = [name for name in ("avx512_bf16", "amx_bf16") if torch.cpu.get_capabilities().get(name)]
    packages = [name for name in ("torch", "transformers", "tokenizers", "accelerate", "numpy") if importlib.util.find_spec(name)]
    return {"cpu": " ".join([names[0] if names else platform.machine(), *fast]), "cores": os.cpu_count(),
            "threads": torch.get_num_threads(), "load": round(os.getloadavg()[0], 1),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "python": platform.python_version(), **{name: version(name) for name in packages}}


def print_table(report: dict) -> None:
    """The results, a line each."""
    names = {"prepare": "prepare (peer: raw encode_batch_fast)", "data_token": "plan, pairs, pack, mask tokens",
             **{f"data_{masking}": f"the same with {masking} masks (peer: tokens)" for masking in ("word", "span", "entity", "similar")},
             "train": "train (peer: transformers.Trainer)"}
    print(", ".join(f"{name} {value}" for name, value in report["machine"].items()))
    print(f"{'':58}{'ours':>12}{'peer':>12}{'ours/peer':>11}")
    for part in [part for part in names if part in report]:
        for what, sides in report[part].items():
            if isinstance(sides, dict):
                shown = "".join(f"{value:>12,.0f}" if value > 100 else f"{value:>12.3f}" for value in sides.values())
                ratio = f"{sides['ours'] / sides['peer']:>11.2f}" if "peer" in sides else ""
                print(f"{names[part] + ', ' + what.replace('_', ' '):58}{shown}{ratio}")


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
