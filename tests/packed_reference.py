"""References for the tests: small models with noise on all weights, and packed batches as padded
ones for stock classes."""

from __future__ import annotations

from itertools import accumulate

import torch
import transformers
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import BertConfig, PreTrainedConfig, PreTrainedModel

from pretrain.batch import IGNORED, Batch, Loss
from pretrain.config import OBJECTIVES
from pretrain.data.collate import Collator, Examples
from pretrain.data.loader import DataPosition, PretrainingDataset
from pretrain.data.masking import Masking
from pretrain.data.pairs import Task
from pretrain.model.bert import BertForPreTraining
from pretrain.model.loading import FAMILIES as LOADED_FAMILIES
from pretrain.model.packed import PackedModel

MAX_LENGTH = 64
ROBERTAS = {"roberta": "Roberta", "xlm-roberta": "XLMRoberta", "camembert": "Camembert"}
# By config.model_type, how the stock classes are named.
FAMILIES = {"bert": "Bert", **ROBERTAS, "distilbert": "DistilBert", "modernbert": "ModernBert"}
SMALL = {  # two narrow layers without dropout
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
OWN_NAMES = {  # of fields that BERT calls otherwise; None: there is no such field
    "distilbert": {
        "intermediate_size": "hidden_dim",
        "hidden_dropout_prob": "dropout",
        "attention_probs_dropout_prob": "attention_dropout",
        "classifier_dropout": "seq_classif_dropout",
        "type_vocab_size": None,
    },
    "modernbert": {
        "hidden_dropout_prob": "mlp_dropout",
        "attention_probs_dropout_prob": None,
        "type_vocab_size": None,
    },
}
WINDOW = 8  # tokens to either side in half of the small ModernBERT's layers


def small_config(vocab_size: int, **settings) -> BertConfig:
    """A BERT of SMALL, unless `settings` say otherwise."""
    return small_config_of("bert", vocab_size, **settings)


def stock_class(family: str, head: str) -> type[PreTrainedModel]:
    """transformers' class of a family; `head` is the second half of its name."""
    return getattr(transformers, FAMILIES[family] + head)


def small_config_of(family: str, vocab_size: int, **settings) -> PreTrainedConfig:
    """A config of SMALL, in the family's own names, for texts of MAX_LENGTH tokens."""
    own = {"max_position_embeddings": MAX_LENGTH}
    if family in ROBERTAS:  # as fairseq has it: positions start after that of padding
        own = {"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3, "type_vocab_size": 1}
        pad_id = settings.get("pad_token_id", own["pad_token_id"])
        own["max_position_embeddings"] = MAX_LENGTH + pad_id + 1
    if family == "distilbert":
        own["classifier_dropout"] = 0.0  # 0.2 by default
    if family == "modernbert":
        own["local_attention"] = 2 * WINDOW
        own |= dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"))
        own["pad_token_id"] = 0
    fields = {**SMALL, "vocab_size": vocab_size, **own, **settings}
    names = OWN_NAMES.get(family, {})
    fields = {names.get(name, name): value for name, value in fields.items()}
    fields.pop(None, None)
    return stock_class(family, "ForMaskedLM").config_class(**fields)


def small_stock(family: str, head: str, vocab_size: int, **settings) -> PreTrainedModel:
    """A stock model of `small_config_of` with noise on every weight."""
    torch.manual_seed(5)
    return roughen(stock_class(family, head)(small_config_of(family, vocab_size, **settings)))


def small_packed(family: str, vocab_size: int, objective: str = "mlm", **settings) -> PackedModel:
    """Our model of `small_config_of`, in training mode, with the same noise."""
    torch.manual_seed(5)
    model = LOADED_FAMILIES[family](small_config_of(family, vocab_size, **settings))
    model.use_pairs(1.0 if OBJECTIVES[objective] else None)
    return roughen(model).train()


def small_model(vocab_size: int, objective: str = "mlm+nsp", **settings) -> BertForPreTraining:
    """Our BERT, in training mode."""
    return small_packed("bert", vocab_size, objective, **settings)


def roughen(model: torch.nn.Module, seed: int = 11) -> torch.nn.Module:
    """The model with noise on every weight: with fresh biases of 0 and LayerNorms of 1, a missing
    one would not show."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.1 * torch.randn(weight.shape, generator=generator)
    return model


def make_batches(
    corpus,
    vocabulary,
    objective: str = "mlm+nsp",
    micro_batch_size: int = 8,
    count: int = 1,
    *,
    fill: bool = False,
    max_length: int = MAX_LENGTH,
) -> list[Batch]:
    """The first `count` micro-batches of a run."""
    task = Task(OBJECTIVES[objective], max_length, micro_batch_size, mask_rate=0.15, seed=3)
    dataset = PretrainingDataset(corpus, task)
    collator = Collator(task, vocabulary, Masking(), fill)
    return [collator(dataset[DataPosition(0, 0, number)]) for number in range(count)]


def cut(corpus, vocabulary, sizes: list[int]) -> list[Batch]:
    """The first sequences of a plan as micro-batches of `sizes` sequences, on which pairs and masks
    do not depend."""
    task = Task("random", MAX_LENGTH, micro_batch_size=sum(sizes), mask_rate=0.15, seed=3)
    plan = PretrainingDataset(corpus, task).plan(0, 0)
    collator, shard = Collator(task, vocabulary, Masking()), corpus.shard(0)
    bounds = [0, *accumulate(sizes)]
    return [
        collator(Examples(shard, plan.take(slice(start, end))))
        for start, end in zip(bounds, bounds[1:])
    ]


def pad(batch: Batch, pad_id: int = 0) -> dict[str, Tensor]:
    """Arguments of a stock model for the real sequences of a batch: one padded row each."""
    packed = {
        "input_ids": (batch.input_ids, pad_id),
        "token_type_ids": (batch.token_type_ids, 0),
        "attention_mask": (torch.ones_like(batch.input_ids), 0),
    }
    others = {}
    if batch.masked_positions is None:
        others["labels"] = batch.labels["label"][: batch.num_sequences]
    else:
        name = "label" if "label" in batch.labels else "mlm"
        labels, number = torch.full(batch.input_ids.shape, IGNORED), int(batch.counts[name])
        labels[batch.masked_positions[:number]] = batch.labels[name][:number]
        packed["labels"] = (labels, IGNORED)
    for name in batch.labels.keys() & {"nsp", "sop"}:
        others["next_sentence_label"] = batch.labels[name][: batch.num_sequences]
    rows = list(zip(batch.cu_seqlens, batch.cu_seqlens[1:]))[: batch.num_sequences]
    padded = {
        name: pad_sequence([values[start:end] for start, end in rows], True, filler)
        for name, (values, filler) in packed.items()
    }
    return padded | others


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    """Name -> gradient of the weights that have one."""
    named = model.named_parameters()
    return {name: weight.grad.clone() for name, weight in named if weight.grad is not None}


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor], atol, rtol=1e-5) -> None:
    """Both hold the same names and nearly the same numbers."""
    torch.testing.assert_close(ours, theirs, atol=atol, rtol=rtol)


def assert_same_training(model, batch, stock, theirs) -> dict[str, Loss]:
    """The loss of a packed batch and its gradients equal those of the stock model, whose output for
    the same examples, padded, is `theirs`; each weight that is trained has one. Returns our terms
    of the loss."""
    terms = model(batch)
    loss = sum(term.sum / batch.counts[name] for name, term in terms.items())
    torch.testing.assert_close(loss, theirs.loss, atol=1e-5, rtol=1e-5)
    loss.backward()
    theirs.loss.backward()
    assert_close(gradients(model), gradients(stock), atol=1e-5, rtol=1e-4)
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert gradients(model).keys() == trained
    return terms


def dense_attention(qkv: Tensor, cu_seqlens: Tensor, window: int | None = None) -> Tensor:
    """The slow form of packed attention: softmax(QK' / sqrt(D)) V over the whole pack [T, 3, H, D],
    -inf between tokens of different sequences, or with more than `window` places in between. Tensor
    operations only: this compiles."""
    query, key, value = qkv.permute(1, 2, 0, 3)  # [H, T, D] each
    place = torch.arange(len(qkv), device=qkv.device)
    sequence = (place[:, None] >= cu_seqlens[None, 1:]).sum(1)
    scores = query @ key.transpose(1, 2) * query.shape[-1] ** -0.5
    scores = scores.masked_fill(sequence[:, None] != sequence[None, :], float("-inf"))
    if window is not None:
        scores = scores.masked_fill((place[:, None] - place).abs() > window, float("-inf"))
    return (scores.softmax(-1) @ value).transpose(0, 1)


def offsets(lengths) -> Tensor:
    """int32 [N + 1]: bounds of sequences of `lengths`."""
    return torch.tensor([0, *lengths]).cumsum(0).int()
