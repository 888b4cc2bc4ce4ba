"""Did further pretraining make the encoder worse at general text?

The original encoder and the adapted one predict the same masks of the same general text, and the
difference of their log-perplexities gets an interval. An encoder that came without an MLM head
cannot predict anything yet. Then both get the same fresh head, which is trained on part of the
general text while the encoder stays frozen, and the rest is predicted.
"""

from dataclasses import asdict

import torch

from pretrain.compare import compare
from pretrain.config import OptimizationOptions
from pretrain.data.collate import Collator
from pretrain.data.corpus import Corpus
from pretrain.data.loader import PretrainingDataset, TrainData
from pretrain.data.masking import Masking
from pretrain.data.pairs import Task
from pretrain.data.tokenizer import describe
from pretrain.evaluate import MASK_RATE, SEED, evaluation_mode, make_validation_set
from pretrain.model.packed import PackedModel
from pretrain.pretraining import PretrainingRun
from pretrain.runtime.optim import make_optimizers, make_schedule
from pretrain.train import train_step

MARGIN = 0.05  # nats: a rise in log-perplexity that counts as forgetting, about 5% of perplexity
HEAD_STEPS, HEAD_RATE, HEAD_WARMUP = 300, 1e-3, 0.1  # of a head on a frozen encoder
HEAD_HELD_OUT = 0.2  # of the documents: the head is not trained on these


def measure(
    run: PretrainingRun,
    adapted: PackedModel,
    training: Corpus,
    corpus: Corpus,
    has_head: bool,
) -> dict:
    """The fields of the `Change` on `corpus` from the model of `run`, which has not been trained,
    to `adapted`, at the length of the last phase; with `trains_head`, and `unigram`, the perplexity
    of guessing by the frequencies in `training`. Without `has_head`, both models first get the same
    fresh head, trained on `training`."""
    phase, before = run.phases[-1], run.model
    vocabulary = describe(run.tokenizer)
    task = Task(None, phase.max_length, phase.eval_batch_size, MASK_RATE, SEED)
    if not has_head:
        adapted.load_state_dict(head_of(before), strict=False)
        for model in (before, adapted):
            data = (PretrainingDataset(training, task), Collator(task, vocabulary, Masking()))
            _train_head(model, TrainData([data], (), 1), run)
    shape = (None, task.max_length, task.micro_batch_size, vocabulary, run.config.eval_tokens)
    validation = make_validation_set(corpus, *shape, training=training)
    change = asdict(compare(before, adapted, validation, run.autocast()))
    change["unigram"] = validation.unigram_perplexity
    return change | {"trains_head": not has_head}


def head_of(model: PackedModel) -> dict[str, torch.nn.Parameter]:
    """The weights outside the encoder, by name; a decoder that shares the embeddings is inside."""
    prefix = f"{model.base_model_prefix}."
    weights = model.named_parameters()  # each once
    return {name: weight for name, weight in weights if not name.startswith(prefix)}


def _train_head(model: PackedModel, data: TrainData, run: PretrainingRun) -> None:
    """Train the MLM head while the encoder is frozen, without dropout, as `run` computes."""
    model.use_pairs(None)
    model.base_model.requires_grad_(False)
    options = OptimizationOptions(weight_decay=0.0)
    optimizers, device = make_optimizers(model, options), run.device
    learning_rate = make_schedule("linear", HEAD_RATE, HEAD_WARMUP, HEAD_STEPS)
    scaler = torch.amp.GradScaler(device.type, enabled=run.precision == "fp16")
    autocast, max_norm = run.autocast(), options.max_grad_norm
    with evaluation_mode(model):
        for step in range(1, HEAD_STEPS + 1):
            rate, batches = learning_rate(step), next(data)
            train_step(model, batches, optimizers, scaler, autocast, rate, max_norm, device)
