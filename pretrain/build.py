"""From options to a `PretrainingRun`, with every check that is possible before step 1.

Order: values, device, run folder, text files, tokenizer and model (their configs first), corpus,
plan. Cheap checks that often fail come first; text is tokenized once everything else fits.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from pretrain import plan, recipe
from pretrain.config import (
    MODEL_SIZES,
    OBJECTIVES,
    Config,
    length_option,
    longest,
    phase_ends,
    typed,
)
from pretrain.corpora import Text, make_dataset, open_text, report_added, text_facts
from pretrain.data import masking
from pretrain.data import tokenizer as tokenizers
from pretrain.data.collate import Collator, pack
from pretrain.data.loader import PretrainingDataset, TrainData
from pretrain.data.mixture import Mixture
from pretrain.data.sources import read_lines
from pretrain.data.tokenizer import Vocabulary
from pretrain.errors import UserError, check, counted, option_named
from pretrain.evaluate import ValidationSet, make_validation_set
from pretrain.files import lock, sha256_of
from pretrain.inputs import prepare_tokenizer
from pretrain.model.attention import VARLEN, choose_attention
from pretrain.model.loading import from_checkpoint, from_size, load_config, override
from pretrain.model.packed import MLM_HEAD, PackedModel
from pretrain.preflight import validate
from pretrain.pretraining import PRETRAINING_FORM, Phase, PretrainingRun
from pretrain.resume import resume_point, run_folder
from pretrain.runtime.distributed import World, any_rank, start
from pretrain.runtime.memory import explained, trial_seconds
from pretrain.runtime.optim import autocast, choose_precision
from pretrain.runtime.sharding import place
from pretrain.schema import AUTO

MIN_FITTING_SHARE = 0.8  # of the entities; below this, a warning is printed
MIN_SIMILAR_SHARE = 0.5  # of the words, likewise
SAMPLED_MICRO_BATCHES = 20  # to count entities and words in
SHAPE_MULTIPLE = 32  # tokens; micro-batches without fixed shapes are filled up to this multiple


@dataclass(frozen=True)
class Inputs:
    """What is read from files: tokenizer, model, text."""

    tokenizer: PreTrainedTokenizerBase
    vocabulary: Vocabulary
    masks: masking.Masking  # their rate is chosen later
    model: PackedModel
    fresh: list[str]  # parts of the model that start fresh
    texts: list[Text]  # several for a mixture
    facts: dict[str, object]  # to check on resume that they are the same
    added_tokens: dict[str, int]  # their occurrences in the texts


@explained("--micro-batch-size", "--workers")
def build(asked: Config) -> PretrainingRun:
    """Check everything, prepare tokenizer and corpus, make the model, try a full micro-batch.

    UserError for whatever does not fit."""
    check(validate(asked))
    with option_named("--device"):
        world, device = start(asked.device)
    output = run_folder(asked.output)
    if asked.output and world.is_main:
        with option_named("--output"):
            lock(output)
    checkpoint, saved = resume_point(output, asked, PRETRAINING_FORM, world)
    asked = plan.drop_old_end(asked, saved)
    precision = decide_precision(asked, saved, device)
    if asked.shard and precision == "fp16":
        raise UserError("--shard: does not work with --precision fp16; expected bf16 or fp32")
    if asked.batch_size != AUTO:  # auto: chosen once the text is read
        plan.check_sizes(asked, saved, world)

    torch.manual_seed(asked.seed)
    inputs = read_inputs(asked, checkpoint, saved, world)
    situation = _situation(asked, inputs)
    config = recipe.resolve(asked, saved, situation)
    inputs = replace(inputs, masks=replace(inputs.masks, mask_rate=config.mask_rate))
    set_up_model(inputs.model, config, device, precision)
    model = place(inputs.model, device, config.shard)
    phases, epoch, seconds = fit_phases(config, saved, inputs, precision, world)
    size = phases[0].dataset.task.micro_batch_size
    total_steps = plan.count_steps(config, asked, saved, epoch.steps)
    passes = tuple(count * total_steps / epoch.steps for count in epoch.passes)
    plan.check_passes(config, passes)
    ends = phase_ends(config, total_steps)
    if config.masking == "entity":
        _report_long_entities(config, phases, inputs.vocabulary)
    if inputs.masks.similar and not saved:
        _report_similar(config, phases[0], inputs.masks.similar, inputs.vocabulary)
    has_validation = inputs.texts[0].validation is not None
    plan.report_ineffective(config, total_steps, world, has_validation, asked)
    torch.manual_seed(config.seed + world.rank)  # dropout differs between processes
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)  # so that the log shows the peak of training
    data = TrainData(
        [(phase.dataset, phase.collator) for phase in phases],
        ends,
        config.batch_size // size,
        world.rank,
        world.size,
        total_steps=total_steps,
        workers=plan.count_workers(config, device),
        pin_memory=device.type == "cuda",
    )
    facts = {"steps_per_epoch": epoch.steps, "recipe": recipe.values_of(config)}
    # In steps. Most checkpoints follow an evaluation.
    eval_every = max(10, min(1000, total_steps // 20))
    save_every = eval_every if eval_every > 500 else 2 * eval_every
    return PretrainingRun(
        asked=asked,
        config=config,
        world=world,
        device=device,
        precision=precision,
        output=output,
        tokenizer=inputs.tokenizer,
        model=model,
        data=data,
        phase_ends=ends,
        eval_every=plan.steps_between(config.eval_every, epoch.steps, auto=eval_every),
        save_every=plan.steps_between(config.save_every, epoch.steps, auto=save_every),
        compile=_should_compile(config, model),
        checkpoint=checkpoint,
        saved=saved,
        phases=phases,
        micro_batch_size=size,
        data_facts=facts | inputs.facts,
        passes=passes,
        added_tokens=inputs.added_tokens,
        situation=situation,
        trial_seconds=seconds,
    )


def read_inputs(config: Config, checkpoint: Path | None, saved: dict, world: World) -> Inputs:
    """Tokenizer and model (their configs first), then the text, which takes longest.

    UserError if one does not fit the others or the resumed run."""
    tokenizer, text, added = prepare_tokenizer(config, checkpoint, world)
    vocabulary = tokenizers.describe(tokenizer)
    masks = make_masking(config, tokenizer, vocabulary)
    model, fresh = make_model(config, checkpoint, tokenizer, vocabulary, added)
    digest = sha256_of(Path(config.similar)) if config.similar else None
    if saved and digest != saved.get("similar_words"):
        problem = f"{typed(config, 'similar')}: has changed since the run started"
        raise UserError(f"{problem}; restore the file, or start a new run")
    texts = open_text(config, tokenizer, vocabulary, text, world, saved)
    corpora = [text.training for text in texts]
    occurrences = report_added(corpora, added, tokenizer)
    if MLM_HEAD in fresh:
        of_texts = [corpus.unigram_shares(model.config.vocab_size) for corpus in corpora]
        model.start_at_frequencies(np.average(of_texts, axis=0, weights=config.mix or None))
    facts = {"similar_words": digest, **text_facts(config, texts, saved)}
    return Inputs(tokenizer, vocabulary, masks, model, fresh, texts, facts, occurrences)


def _situation(config: Config, inputs: Inputs) -> recipe.Situation:
    """What the recipe depends on. A mixture counts as a text of as many tokens as it gives in one
    epoch, a pass over its first text."""
    held_out = 0.0 if config.valid else config.valid_fraction
    share = config.mix[0] / sum(config.mix) if config.mix else 1.0
    start = recipe.CONTINUED
    if config.model in MODEL_SIZES:
        start = recipe.SCRATCH
    elif MLM_HEAD in inputs.fresh:
        start = recipe.FRESH_HEAD
    model = inputs.model
    in_first = inputs.texts[0].training.info["tokens"] * (1 - held_out)
    tokens = max(1, round(in_first / share))
    dropout = (model.config_dropout, model.dropout_fields)
    return recipe.Situation(tokens, model.config.hidden_size, start, *dropout)


def fit_phases(
    config: Config,
    saved: dict,
    inputs: Inputs,
    precision: str,
    world: World,
) -> tuple[list[Phase], plan.Epoch, float | None]:
    """(phases whose micro-batches fit in memory, an epoch, seconds per micro-batch).

    A resumed run skips the trial."""
    model, device = inputs.model, inputs.model.device
    size = plan.first_micro_batch_size(config, saved, device, world)
    while True:
        tasks = plan.make_tasks(config, size)
        datasets = [make_dataset(config, inputs.texts, task) for task in tasks]
        if saved:
            epoch = plan.Epoch(saved["steps_per_epoch"])
        else:  # the first length counts, but every phase is checked
            epoch = [plan.count_epoch(dataset, config) for dataset in datasets][0]
        fill = model.attention == VARLEN
        phases = []
        for dataset in datasets:
            collator = Collator(dataset.task, inputs.vocabulary, inputs.masks, fill, SHAPE_MULTIPLE)
            phases.append(_make_phase(config, dataset, collator, inputs.texts))
        if saved:
            return phases, epoch, None
        seconds = _trial_seconds(model, phases, autocast(device, precision), config.shard)
        if seconds is not None:
            return phases, epoch, seconds
        size = plan.smaller_micro_batch_size(config, size, device, world)


def decide_precision(config, saved: dict, device: torch.device) -> str:
    """The precision of the run; a resumed run keeps its own unless the option changed."""
    before = saved.get("precision")
    is_same = saved and config.precision == saved["options"]["precision"]
    with option_named("--precision"):
        precision = choose_precision(before if is_same else config.precision, device)
    if saved and precision != before:
        print(
            f"the run resumes in {precision} instead of {before}, so its numbers will differ from "
            "those of an uninterrupted run"
        )
    return precision


def _should_compile(config, model: PackedModel) -> bool:
    if config.compile != "auto":
        return config.compile == "on"
    is_compiled = model.attention == VARLEN and not config.shard
    if is_compiled:  # what cannot be compiled runs in eager mode
        torch._dynamo.config.suppress_errors = True
    return is_compiled


def set_up_model(model: PackedModel, config: Config, device: torch.device, precision: str) -> None:
    """Choose attention, losses, dropout and gradient checkpointing."""
    model.attention = choose_attention(device, precision)
    if config.dropout != model.config_dropout:  # else each module keeps its own rate
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = config.dropout
    model.use_pairs(config.nsp_weight if OBJECTIVES[config.objective] else None)
    if config.gradient_checkpointing:
        enable_gradient_checkpointing(model)


def enable_gradient_checkpointing(model: PackedModel) -> None:
    """Call transformers' method, which was renamed."""
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)()


def _make_phase(
    config: Config,
    dataset: PretrainingDataset | Mixture,
    collator: Collator,
    texts: Sequence[Text],
) -> Phase:
    task = dataset.task
    # As many tokens as a micro-batch in training, but at least one sequence.
    size = config.eval_batch_size or task.micro_batch_size
    size = max(1, size * task.counted_length // task.max_length)
    shape = (task.pairs, task.max_length, size, collator.vocabulary, config.eval_tokens)
    sets: list[ValidationSet | None] = []
    for text in texts:
        held_out = text.validation
        if held_out is not None:
            held_out = make_validation_set(held_out, *shape, collator.fill, text.training)
        sets.append(held_out)
    others = {text.name: found for text, found in zip(texts[1:], sets[1:]) if found}
    return Phase(dataset, collator, sets[0], size, others)


def _trial_seconds(
    model: PackedModel, phases: list[Phase], context: torch.autocast, shard: bool
) -> float | None:
    """The time of the slowest phase's fullest micro-batch; None if one does not fit in memory."""
    batches = (phase.fullest_batch().to(model.device) for phase in phases)
    times = []
    for batch in batches:
        times.append(trial_seconds(model, batch, context, shard))
        if times[-1] is None:
            break
    fits = times[-1] is not None
    # The trial exchanges sharded weights: if one process runs out of memory, the others wait for
    # it and end when it does.
    all_fit = fits if shard else not any_rank(not fits)
    return max(times) if all_fit else None


def make_masking(
    config: Config, tokenizer: PreTrainedTokenizerBase, vocabulary: Vocabulary
) -> masking.Masking:
    """The masking that the options describe; UserError if no similar word is usable."""
    names = [entry.name for entry in fields(masking.Masking) if hasattr(config, entry.name)]
    options = {name: getattr(config, name) for name in names}
    if config.replace != "similar":
        return masking.Masking(**options | {"similar": None})
    backend = tokenizers.without_limits(tokenizer)
    space = " " if vocabulary.needs_space else ""

    def encode(word: str) -> list[int]:
        """Ids of a word in running text; [] if the tokenizer does not know it."""
        ids = backend.encode(space + word, add_special_tokens=False).ids
        return [] if vocabulary.is_special[ids].any() else ids

    with option_named("--similar"):
        similar = masking.read_similar(read_lines(config.similar), encode)
    shown = typed(config, "similar")
    if similar is None:
        problem = "no word has a similar word with the same number of tokens"
        expected = "expected one word per line, then its similar words, separated by tabs"
        raise UserError(f"{shown}: {problem}; {expected}")
    pairs = counted(similar.counts.sum(), "similar word")
    found = f"{counted(len(similar.counts), 'word')} with {pairs}"
    print(f"{shown}: {found} of the same number of tokens")
    return masking.Masking(**options | {"similar": similar})


def _report_similar(
    config: Config, phase: Phase, table: masking.SimilarWords, vocabulary: Vocabulary
) -> None:
    """Print which share of the words of a sample has a similar word, with a warning if it is small:
    all others become random tokens."""
    dataset = phase.dataset
    positions = islice(dataset.positions(dataset.start, end_epoch=1), SAMPLED_MICRO_BATCHES)
    packs = (pack(dataset[position], vocabulary) for position in positions)
    share = np.concatenate([masking.has_similar(packed, table) for packed in packs]).mean()
    found = f"{typed(config, 'similar')}: has a similar word for {share:.1%} of the words"
    if share < MIN_SIMILAR_SHARE:
        found += "; the others become random tokens: expected a table that covers the text"
    print(found)


def _report_long_entities(config: Config, phases: list[Phase], vocabulary: Vocabulary) -> None:
    """Warn if many entities exceed the budget of their sequence, as in short documents."""
    dataset = min(phases, key=lambda phase: phase.max_length).dataset.parts[0]
    num_entities = num_fitting = 0
    positions = dataset.positions(dataset.start, end_epoch=1)
    for position in islice(positions, SAMPLED_MICRO_BATCHES):
        packed = pack(dataset[position], vocabulary)
        entities = packed.maskable & packed.in_entity
        unit = np.cumsum(packed.entities) - 1
        sizes = np.bincount(unit[entities], minlength=int(packed.entities.sum()))
        allowed = config.entity_budget * packed.count(packed.maskable)
        fits = sizes <= allowed[packed.sequence[packed.entities]]
        num_entities += int((sizes > 0).sum())
        num_fitting += int(((sizes > 0) & fits).sum())
    if num_fitting < MIN_FITTING_SHARE * num_entities or not num_entities:
        entities = counted(num_entities, "entity")
        found = f"{num_fitting:,} of {entities} fit in that share of a sequence"
        advice = "the others are never masked whole; use a higher budget or longer documents"
        print(f"{typed(config, 'entity_budget')}: {found}; {advice}")


def make_model(
    config: Config,
    checkpoint: Path | None,
    tokenizer: PreTrainedTokenizerBase,
    vocabulary: Vocabulary,
    added: dict[int, list[int]],
) -> tuple[PackedModel, list[str]]:
    """(model, names of its parts that start fresh): from scratch, pretrained, or of the checkpoint
    to resume.

    UserError if it does not fit the tokenizer, the objective or the lengths."""
    if checkpoint:
        return from_checkpoint(str(checkpoint))
    from_scratch = config.model in MODEL_SIZES
    overrides, length = config.config_override, longest(config)
    if from_scratch:
        with option_named("--config-override"):
            sizes = (vocabulary.size, length, vocabulary.pad_id)
            model = from_size(config.model, *sizes, overrides, config.architecture)
        fresh = list(model.parts.values())
    else:
        with option_named("--model"):
            settings = load_config(config.model)
        with option_named("--config-override"):
            override(settings, overrides)
        with option_named("--model"):
            model, fresh = from_checkpoint(config.model, settings)
    problems = task_problems(model, config)
    size, rows = vocabulary.size - len(added), model.config.vocab_size
    # Tables are often padded to a round number of rows.
    if size > rows or (size + 128 <= rows and not from_scratch):
        problem = f"has {size:,} entries, but the model {config.model} has {rows:,}"
        option = f"--tokenizer {config.tokenizer or config.model}"
        problems.append(f"{option}: {problem}; expected the model's own tokenizer")
    elif config.tokenizer and not from_scratch:
        problems += _vocabulary_problems(config, tokenizer)
    check(problems)
    if added and not from_scratch:
        model.add_vectors(vocabulary.size, added, config.new_vectors == "mean")
    for name in ("bos_token_id", "eos_token_id"):
        if getattr(tokenizer, name) in added:
            setattr(model.config, name, getattr(tokenizer, name))
    if fresh and not from_scratch:
        missing = f"{config.model} has no {', no '.join(fresh)}"
        print(f"{missing}: initialized randomly, so the first validation numbers mean little")
    return model, fresh


def task_problems(model: PackedModel, config: Config) -> list[str]:
    """Problems of the model with the lengths and the objective, or that it is a decoder."""
    option = length_option(config)
    problems = [f"{option} {problem}" for problem in model.length_problems(longest(config))]
    if OBJECTIVES[config.objective]:
        problems += [f"--objective {text}" for text in model.pair_problems(config.objective)]
    if getattr(model.config, "is_decoder", False):
        problems.append(f"--model {config.model}: is a decoder; expected an encoder")
    return problems


def _vocabulary_problems(config: Config, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """A problem if the model has a tokenizer of its own, and --tokenizer differs from it."""
    try:
        own = tokenizers.load(config.model, config.lowercase == "on")
    except UserError:
        return []
    if own.get_vocab().items() <= tokenizer.get_vocab().items():
        return []
    problem = f"its vocabulary differs from that of the model {config.model}"
    return [f"{typed(config, 'tokenizer')}: {problem}; omit --tokenizer"]
