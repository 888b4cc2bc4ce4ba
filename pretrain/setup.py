"""From options to a `Run` that is ready to train: every check that can be made before the first step is made here.

Order: values, device, run folder, text files, tokenizer and model (their configs first), corpus, plan. What costs little and
fails often comes first; text is tokenized once everything else fits.
"""
from __future__ import annotations

import datetime
import os
import platform
import shlex
import shutil
from bisect import bisect_right
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import transformers
from transformers import PreTrainedTokenizerBase

from pretrain import parts, phases
from pretrain.command import UserError, check
from pretrain.config import MODEL_SIZES, Config, FinetuneOptions, interval, validate
from pretrain.data import tokenizer as tokenizers
from pretrain.data.collate import Collator
from pretrain.data.dataset import DataPosition, PretrainingDataset
from pretrain.files import hold, sha256_of, write_json, write_text
from pretrain.model.attention import VARLEN, choose_attention
from pretrain.model.packed import PackedModel
from pretrain.progress import STATE_FORM
from pretrain.runtime import checkpoint as ckpt
from pretrain.runtime.distributed import World, any_rank, gather, place, start, wait_for_all
from pretrain.runtime.faults import explained, micro_batch_fits
from pretrain.runtime.optim import autocast, choose_precision
from pretrain.text import open_text, prepare_tokenizer

# What may change when a run is resumed; everything else decides the data, the weights or the update.
MAY_CHANGE = {"max_steps", "epochs", "max_minutes", "eval_every", "save_every", "log_every", "keep", "workers", "device", "precision",
              "compile", "patience", "output", "resume", "overwrite", "cache", "gradient_checkpointing", "shard"}


@dataclass
class Run:
    """All that `train` needs. Derived numbers are decided once and saved, never recomputed."""

    config: Config
    world: World
    device: torch.device
    precision: str
    output: Path
    tokenizer: PreTrainedTokenizerBase
    model: PackedModel
    phases: list[parts.Phase]
    corpus_folders: dict[str, str]
    steps_per_epoch: int
    total_steps: int
    compile: bool
    asked_micro_batch_size: int  # what is in the options may be less, see `build`
    checkpoint: Path | None = None
    state: dict = field(default_factory=dict)
    similar_words: str | None = None  # what names the table of similar words, which a resumed run reads anew
    added_tokens: dict[str, int] = field(default_factory=dict)  # how often each occurs in the training text
    replaced: Path | None = None  # the old run under --overwrite, until the new one has a checkpoint

    def every(self, value: str) -> int:
        """Steps between evaluations or checkpoints, from --eval-every or --save-every."""
        every = interval(value)
        return every if isinstance(every, int) else self.steps_per_epoch if every == "epoch" else max(10, min(1000, self.total_steps // 10))

    @property
    def dataset(self) -> PretrainingDataset:  # of the first phase, by which steps and epochs are counted
        return self.phases[0].dataset

    @property
    def collator(self) -> Collator:
        return self.phases[0].collator

    @property
    def phase_ends(self) -> list[int]:
        return phases.phase_ends(self.config, self.total_steps)

    def phase_at(self, step: int) -> parts.Phase:
        """The phase of a step, counted from 0; the nearest one for a number outside the run."""
        return self.phases[min(bisect_right(self.phase_ends, step), len(self.phases) - 1)]

    def rebuild(self, position: DataPosition, step: int) -> str:
        """The command that shows the micro-batches of a step, counted from 1, again, and keeps them in a file."""
        phase = ["--phase", str(self.phase_at(step - 1).number + 1)] if self.config.phases else []
        return shlex.join(["python", "scripts/show_masks.py", "--config", str(self.output / "config.json"), "--position",
                           *(str(number) for number in position if number is not None), *phase, "--sampled",
                           str(self.config.batch_size // self.config.micro_batch_size), "--save", "batch.pt"])

    @property
    def is_finished(self) -> bool:
        """Whether the run to resume has no step left to do."""
        progress = self.state.get("progress", {"is_logged": False})
        return progress["is_logged"] and (progress["step"] >= self.total_steps or (
            progress["finished"] and self.total_steps == self.state["total_steps"]))

    def has_result(self) -> bool:
        """Whether the run is finished and `final/` is its model. All processes call this, the first looks."""
        final = self.output / "final"
        return gather(self.is_finished and self.world.is_main and ckpt.problem_of(final, needed=()) is None
                      and ckpt.read_facts(final).get("step") == self.state["progress"]["step"])[0]

    def mask_rate(self, step: int) -> float | None:
        """Rate of the schedule in a step from 0 on; None where there is one rate."""
        first, last = self.config.mask_rate[0], self.config.mask_rate[-1]
        return None if first == last else first + (last - first) * min(1.0, step / max(1, self.total_steps - 1))

    def saved_values(self) -> dict:
        """What a checkpoint keeps of the run, beside its progress."""
        return {"options": saved_options(self.config), "asked_micro_batch_size": self.asked_micro_batch_size, "precision": self.precision,
                "total_steps": self.total_steps, "steps_per_epoch": self.steps_per_epoch, "threads": torch.get_num_threads(),
                "processes": self.world.size, "similar_words": self.similar_words, "corpus_folders": self.corpus_folders,
                "corpus": self.dataset.source.fingerprint,
                "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "python": platform.python_version()}}

    def remove_replaced(self) -> None:
        """Remove the run that this one replaces; called once it has a checkpoint."""
        if self.replaced:
            shutil.rmtree(self.replaced, ignore_errors=True)
            self.replaced = None


def build(config: Config) -> Run:
    """Check everything, prepare tokenizer and corpus, make the model; UserError tells what does not fit.

    A full micro-batch is tried, but where a run goes on, which has its micro-batches. Where one process finds no room for it, all
    halve it: the run is built anew with the smaller one and more accumulation, as if that had been asked for."""
    check(validate(config))
    world, device = start(config.device)
    if config.output and world.is_main:
        hold(_output(config))
    config.output = config.output or f"runs/{datetime.datetime.now():%Y%m%d-%H%M%S}"
    is_default = config.micro_batch_size is None
    asked = config.micro_batch_size = parts.default_micro_batch_size(config, device, world) if is_default else config.micro_batch_size
    while True:
        with explained(config.micro_batch_size):
            run = _assemble(config, world, device, asked, is_default)
            fits = run.checkpoint or all(
                micro_batch_fits(run.model, phase.collator(phase.dataset.__getitems__([phase.dataset.fullest()])).to(device),
                                 autocast(device, run.precision)) for phase in run.phases)
            # Sharded weights travel in the trial: the others wait there for a process that has no room, and end with it.
            if not config.shard and not any_rank(not fits) or config.shard and fits:
                torch.manual_seed(config.seed + world.rank)  # dropout differs between processes, weights do not
                if device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats(device)  # the logged peak is that of the steps, not of the trial
                return run
        micro, least = config.micro_batch_size, phases.least_micro_batch_size(config)
        smaller = max((size for size in range(least, micro // 2 + 1) if config.batch_size % (size * world.size) == 0), default=0)
        if not smaller or config.shard:
            way = "in a new run a smaller one" if smaller else f"shorter sequences ({phases.option_of(config)})"
            raise UserError(f"--micro-batch-size {micro}: the memory of {device} is too small for it; needed is a larger device, "
                            f"--gradient-checkpointing, or {way}")
        config.micro_batch_size = smaller
        print(f"--micro-batch-size {micro}: the memory of {device} is too small for it, so it is {smaller} in this run")
        del run


def _output(config: Config) -> Path:
    return Path(os.path.abspath(config.output)) if config.output in (".", "..") else Path(config.output)


def _assemble(config: Config, world: World, device: torch.device, asked: int, is_default: bool) -> Run:
    config.workers = (2 if device.type == "cuda" else 0) if config.workers is None else config.workers
    config.max_length = None if config.phases else phases.longest(config)
    output = _output(config)
    checkpoint = gather(find_checkpoint(output, config) if world.is_main else None)[0]
    state = ckpt.read_values(checkpoint, STATE_FORM) if checkpoint else {}
    if state and state["progress"]["best_perplexity"] is not None:
        damage = gather(ckpt.problem_of(output / "best", needed=()) if world.is_main else None)[0]
        if damage:
            print(f"{damage}: the next evaluation makes best/ anew")
            state["progress"]["best_perplexity"] = None
    if checkpoint:
        if is_default or config.micro_batch_size == state["asked_micro_batch_size"]:  # less may be in force since the first start
            config.micro_batch_size, asked = state["options"]["micro_batch_size"], state["asked_micro_batch_size"]
        check(changed_options(config, state["options"]))
        if state["processes"] == world.size:
            torch.set_num_threads(state["threads"])  # sums are split by thread: another number, other bits
    kept = state and config.precision == state["options"]["precision"]
    precision = choose_precision(state["precision"] if kept else config.precision, device)
    if state and precision != state["precision"]:
        print(f"the run goes on in {precision}, it was in {state['precision']}: its numbers will not be those of one that stays")
    check(["--shard --precision fp16: needed is bf16 or fp32"] if config.shard and precision == "fp16" else [])
    parts.check_processes(config, world)
    torch.manual_seed(config.seed)
    tokenizer, text, added = prepare_tokenizer(config, checkpoint, world)
    vocabulary, masking = tokenizers.describe(tokenizer), parts.make_masking(config, tokenizer)
    model = parts.make_model(config, checkpoint, tokenizer, vocabulary, added)
    similar_words = config.similar and sha256_of(Path(config.similar))
    if state and similar_words != state.get("similar_words"):
        raise UserError(f"--similar {config.similar}: has changed since the run was started; restore it, or start another run")
    training, held_out_text = open_text(config, tokenizer, vocabulary, text, state, world)
    occurrences = parts.report_added(training, added, tokenizer)

    attention = model.attention = choose_attention(device, precision)
    compiled = config.compile == "on" or (config.compile == "auto" and attention == VARLEN and not config.shard)
    if config.compile == "auto" and compiled:
        torch._dynamo.config.suppress_errors = True  # what it cannot compile runs as it is written
    model.set_objective(config.objective, config.nsp_weight)
    if config.gradient_checkpointing:
        # The newer name of the two, where this transformers has it.
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    datasets = [PretrainingDataset(training, parts.make_task(config, number)) for number in range(max(1, len(config.phases)))]
    planned = [] if state else [parts.check_plan(dataset, config) for dataset in datasets]
    steps_per_epoch = state["steps_per_epoch"] if state else planned[0]  # tokens of a step are the same in all phases
    total_steps = parts.count_steps(config, state, steps_per_epoch)
    phases.phase_ends(config, total_steps)  # which refuses too few
    if config.masking == "entity":
        parts.tell_unfit_entities(min(datasets, key=lambda dataset: dataset.task.max_length), vocabulary, config)
    made = [parts.make_phase(config, number, dataset, held_out_text, vocabulary, masking, fill=attention == VARLEN)
            for number, dataset in enumerate(datasets)]
    return Run(config, world, device, precision, output, tokenizer, place(model, device, config.shard), made,
              {name: str(corpus.folder.absolute()) for name, corpus in (("train", training), ("valid", held_out_text)) if corpus},
              steps_per_epoch, total_steps, compiled, asked, checkpoint, state, similar_words, occurrences)


def open_output(run: Run) -> None:
    """Make the run folder; called once everything is checked. `--overwrite` moves an old run aside."""
    if run.world.is_main:
        try:
            run.replaced = ckpt.make_output(run.output, run.config.overwrite, bool(ckpt.checkpoints(run.output)))
            if run.checkpoint:
                ckpt.set_aside_after(run.output, run.state["progress"]["step"])
            options = saved_options(run.config)
            for name in ("output", "resume", "overwrite"):  # of this start, not of a run like it
                del options[name]
            write_json(run.output / "config.json", options)
            if run.added_tokens:
                write_text(run.output / "added_tokens.tsv", "".join(f"{token}\t{count}\n" for token, count in run.added_tokens.items()))
        except OSError as error:
            raise UserError(f"--output {run.output}: cannot be written ({error.strerror}); needed is a folder with room and the "
                            "right to write") from error
    wait_for_all()


def find_checkpoint(output: Path, config: Config) -> Path | None:
    """Checkpoint to resume from; UserError where the folder holds a run and neither --resume nor --overwrite is given."""
    ckpt.check_output(output, config.overwrite, None if config.resume else "--resume to go on with its run, ")
    if config.resume:
        for previous in output.glob(".*.previous"):  # what a save interrupted between two renames had moved aside
            ckpt.put_back(previous.with_name(previous.name[1:].removesuffix(".previous")))
        return ckpt.newest_good(output)
    return None


def saved_options(config: Config | FinetuneOptions) -> dict:
    """The options as a run keeps them, with paths that hold in any working directory."""
    def absolute(path: str) -> str:
        return path if path.startswith("hub:") else os.path.abspath(os.path.expanduser(path))

    options = asdict(config)
    for name in options.keys() & {"train", "valid", "test", "lexicon", "similar", "add_tokens", "cache"}:
        value = options[name]
        options[name] = [absolute(path) for path in value] if isinstance(value, list) else value and absolute(value)
    for name in options.keys() & {"model", "tokenizer"}:  # a folder, else a size or a name of the hub
        if options[name] not in MODEL_SIZES and Path(options[name] or "", "").exists():
            options[name] = options[name] and absolute(options[name])
    return options


def changed_options(config: Config, saved: dict) -> list[str]:
    """Problems: options that a resumed run may not change, with both values."""
    problems, options = [], saved_options(config)
    for name, new in options.items():
        if name not in MAY_CHANGE and name in saved and saved[name] != new:
            problems.append(f"--{name.replace('_', '-')} {new}: the run was started with {saved[name]}, and a change would make it "
                            "another run; leave the option away, or start a run in another --output")
    return problems


def describe_run(run: Run, phase: parts.Phase) -> dict:
    """Facts of a run, for its model card and for scripts/evaluate.py; `phase` is the one that was evaluated."""
    config = run.config
    return {"objective": config.objective, "max_length": phase.max_length, **({"phases": config.phases} if config.phases else {}),
            "masking": config.masking, "mask_rate": config.mask_rate, "started_from": config.model,
            "eval_tokens": config.eval_tokens, "eval_batch_size": phase.eval_batch_size,
            "batch_size": config.batch_size, "total_steps": run.total_steps,
            "learning_rate": config.learning_rate, "precision": run.precision, "corpus": run.dataset.source.fingerprint}


def print_plan(run: Run) -> None:
    """Every derived number, before training starts."""
    config, model, world = run.config, run.model, run.world
    weights = sum(weight.numel() for weight in model.parameters())
    accumulation = config.batch_size // config.micro_batch_size // world.size
    settings, length, tokens = model.config, run.phases[0].max_length, run.collator.task.token_limit
    print(f"model: {settings.num_hidden_layers}x{settings.hidden_size}, {weights / 1e6:.1f} M weights, vocabulary "
          f"{settings.vocab_size:,}, on {run.device} in {run.precision}, attention by {model.attention}"
          f"{', compiled' * run.compile}")
    print(f"step: {config.batch_size} x {length} = {config.batch_size * length:,} tokens, in {accumulation} "
          f"micro-batches of {config.micro_batch_size} x {length} on each of {world.size} process{'es' * (world.size > 1)}")
    print(f"run: {run.total_steps:,} steps, {run.total_steps / run.steps_per_epoch:.1f} epochs of {run.steps_per_epoch:,} steps; "
          f"evaluation every {run.every(config.eval_every):,}, checkpoint every {run.every(config.save_every):,}; {run.output}")
    for phase, begin, end in zip(run.phases if config.phases else [], [0, *run.phase_ends], run.phase_ends):
        print(f"phase {phase.number + 1}: steps {begin + 1:,} to {end:,}, sequences of {phase.max_length} tokens, "
              f"{tokens / phase.max_length:.4g} of them fill a micro-batch")
