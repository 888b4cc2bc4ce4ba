"""From options to a `PretrainingRun`, with every check that is possible before step 1.

Order: values, device, run folder, text files, tokenizer and model (their configs first), corpus,
plan. Cheap checks that often fail come first; text is tokenized once everything else fits.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from pretrain import plan, recipe
from pretrain.config import MODEL_SIZES, Config, phase_ends, typed
from pretrain.corpora import Text, make_dataset, open_text, report_added
from pretrain.data.collate import Collator
from pretrain.data.loader import PretrainingDataset, TrainData
from pretrain.data.masking import Masking
from pretrain.data.mixture import Mixture
from pretrain.data.tokenizer import Vocabulary, describe
from pretrain.errors import UserError, check, option_named
from pretrain.evaluate import make_validation_set
from pretrain.files import lock, sha256_of
from pretrain.inputs import prepare_tokenizer
from pretrain.mask_setup import make_masking, report_long_entities, report_similar
from pretrain.model.attention import VARLEN
from pretrain.model.packed import MLM_HEAD, PackedModel
from pretrain.model_setup import decide_precision, make_model, set_up_model, should_compile
from pretrain.preflight import validate
from pretrain.pretraining import PRETRAINING_FORM, Phase, PretrainingRun
from pretrain.resume import resume_point, run_folder
from pretrain.runtime.distributed import World, any_rank, is_sharded, start
from pretrain.runtime.memory import explained, trial_seconds
from pretrain.runtime.optim import autocast
from pretrain.runtime.sharding import place
from pretrain.schema import AUTO


@dataclass(frozen=True)
class Inputs:
    """What is read from files: tokenizer, model, text."""

    tokenizer: PreTrainedTokenizerBase
    vocabulary: Vocabulary
    masks: Masking  # their rate is chosen later
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
    inputs = read_inputs(asked, checkpoint, saved)
    situation = _situation(asked, inputs)
    with option_named("--optimizer"):
        config = recipe.resolve(asked, saved, situation)
    inputs = replace(inputs, masks=replace(inputs.masks, mask_rate=config.mask_rate))
    set_up_model(inputs.model, asked, config, device, precision)
    model = place(inputs.model, device, config.shard)
    phases, epoch, seconds = fit_phases(config, saved, inputs, precision, world)
    total_steps = plan.count_steps(config, asked, saved, epoch.steps)
    passes = plan.count_passes(config, epoch, total_steps)
    ends = phase_ends(config, total_steps)
    eval_every, save_every = plan.intervals(config, total_steps, epoch.steps)

    if config.masking == "entity":
        shortest = min(phases, key=lambda phase: phase.max_length)
        report_long_entities(config, shortest.dataset.parts[0], inputs.vocabulary)
    if inputs.masks.similar and not saved:
        report_similar(config, phases[0].dataset, inputs.masks.similar, inputs.vocabulary)
    has_validation = inputs.texts[0].validation is not None
    plan.report_ineffective(config, total_steps, world, has_validation, asked)
    torch.manual_seed(config.seed + world.rank)  # dropout differs between processes
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)  # so that the log shows the peak of training
    facts = {"steps_per_epoch": epoch.steps, "recipe": recipe.values_of(config)}
    return PretrainingRun(
        asked=asked,
        config=config,
        world=world,
        device=device,
        precision=precision,
        output=output,
        tokenizer=inputs.tokenizer,
        model=model,
        data=_open_data(config, phases, ends, world, device),
        phase_ends=ends,
        eval_every=eval_every,
        save_every=save_every,
        compile=should_compile(config, model),
        checkpoint=checkpoint,
        saved=saved,
        phases=phases,
        micro_batch_size=phases[0].dataset.task.micro_batch_size,
        data_facts=facts | inputs.facts,
        passes=passes,
        added_tokens=inputs.added_tokens,
        situation=situation,
        trial_seconds=seconds,
    )


def read_inputs(config: Config, checkpoint: Path | None, saved: dict) -> Inputs:
    """Tokenizer and model (their configs first), then the text, which takes longest.

    UserError if one does not fit the others or the resumed run."""
    tokenizer, text, added = prepare_tokenizer(config, checkpoint)
    vocabulary = describe(tokenizer)
    masks = make_masking(config, tokenizer, vocabulary)
    model, fresh = make_model(config, checkpoint, tokenizer, vocabulary, added)
    digest = sha256_of(Path(config.similar)) if config.similar else None
    if saved and digest != saved.get("similar_words"):
        problem = f"{typed(config, 'similar')}: has changed since the run started"
        raise UserError(f"{problem}; restore the file, or start a new run")
    texts, facts = open_text(config, tokenizer, vocabulary, text, saved)
    corpora = [text.training for text in texts]
    occurrences = report_added(corpora, added, tokenizer)
    if MLM_HEAD in fresh:
        of_texts = [corpus.unigram_shares(model.config.vocab_size) for corpus in corpora]
        model.start_at_frequencies(np.average(of_texts, axis=0, weights=config.mix or None))
    facts["similar_words"] = digest
    return Inputs(tokenizer, vocabulary, masks, model, fresh, texts, facts, occurrences)


def _situation(config: Config, inputs: Inputs) -> recipe.Situation:
    """What the recipe depends on. A mixture counts as a text of as many tokens as it gives in one
    epoch, a pass over its first text."""
    share = config.mix[0] / sum(config.mix) if config.mix else 1.0
    start = recipe.CONTINUED
    if config.model in MODEL_SIZES:
        start = recipe.SCRATCH
    elif MLM_HEAD in inputs.fresh:
        start = recipe.FRESH_HEAD
    model = inputs.model
    tokens = max(1, round(inputs.texts[0].training.count_tokens() / share))
    dropout = (model.config_dropout, model.dropout_fields)
    return recipe.Situation(tokens, model.config.hidden_size, start, *dropout)


def fit_phases(
    config: Config, saved: dict, inputs: Inputs, precision: str, world: World
) -> tuple[list[Phase], plan.Epoch, float | None]:
    """(phases whose micro-batches fit in memory, an epoch, seconds per micro-batch).

    A resumed run skips the trial."""
    model, device = inputs.model, inputs.model.device
    plan.check_sizes(config, saved, world)
    size = saved.get("micro_batch_size") or config.micro_batch_size
    size = size or plan.default_micro_batch_size(config, device, world)
    while True:
        tasks = plan.make_tasks(config, size)
        datasets = [make_dataset(config, inputs.texts, task) for task in tasks]
        if saved:
            epoch = plan.Epoch(saved["steps_per_epoch"])
        else:  # the first length counts, but every phase is checked
            epoch = [plan.count_epoch(dataset, config) for dataset in datasets][0]
        phases = [_make_phase(config, dataset, inputs) for dataset in datasets]
        if saved:
            return phases, epoch, None
        seconds = _trial_seconds(model, phases, autocast(device, precision))
        if seconds is not None:
            return phases, epoch, seconds
        size = plan.smaller_micro_batch_size(config, size, device, world)


def _make_phase(config: Config, dataset: PretrainingDataset | Mixture, inputs: Inputs) -> Phase:
    task, vocabulary, fill = dataset.task, inputs.vocabulary, inputs.model.attention == VARLEN
    collator = Collator(task, vocabulary, inputs.masks, fill, plan.SHAPE_MULTIPLE)
    # As many tokens as a micro-batch in training, but at least one sequence.
    size = config.eval_batch_size or task.micro_batch_size
    size = max(1, size * task.counted_length // task.max_length)
    shape = (task.pairs, task.max_length, size, vocabulary, config.eval_tokens, fill)
    sets = {}
    for text in inputs.texts:
        if text.validation is not None:
            is_given = config.valid and text is inputs.texts[0]
            shown = typed(config, "valid") if is_given else text.shown
            with option_named(f"{shown}:"):
                sets[text.name] = make_validation_set(text.validation, *shape, text.training)
    validation = sets.pop(inputs.texts[0].name, None)
    return Phase(dataset, collator, validation, size, others=sets)


def _open_data(
    config: Config, phases: list[Phase], phase_ends: list[int], world: World, device: torch.device
) -> TrainData:
    on_gpu, workers = device.type == "cuda", config.workers
    if workers is None:
        workers = 2 if on_gpu else 0
    return TrainData(
        [(phase.dataset, phase.collator) for phase in phases],
        phase_ends,
        config.batch_size // phases[0].dataset.task.micro_batch_size,
        world.rank,
        world.size,
        total_steps=phase_ends[-1],
        workers=workers,
        pin_memory=on_gpu,
    )


def _trial_seconds(
    model: PackedModel, phases: list[Phase], context: torch.autocast
) -> float | None:
    """The time of the slowest phase's fullest micro-batch; None if one does not fit in memory."""
    times = []
    for phase in phases:
        batch = phase.fullest_batch().to(model.device)
        times.append(trial_seconds(model, batch, context))
        if times[-1] is None:
            break
    fits = times[-1] is not None
    # The trial exchanges sharded weights: if one process runs out of memory, the others wait for
    # it and end when it does.
    all_fit = fits if is_sharded(model) else not any_rank(not fits)
    return max(times) if all_fit else None
