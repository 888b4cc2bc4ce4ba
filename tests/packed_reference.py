"""References for the tests: small BERTs with weights that matter, and packed batches turned into padded ones for stock classes."""
from __future__ import annotations

import torch
from torch import Tensor
from transformers import BertConfig

from pretrain.batch import IGNORED, Batch
from pretrain.data.collate import Collator, Examples
from pretrain.data.dataset import DataPosition, PretrainingDataset
from pretrain.data.masking import Masking
from pretrain.data.planning import Task
from pretrain.model.bert import BertForPreTraining

MAX_LENGTH = 64


def small_config(vocab_size: int, **settings) -> BertConfig:
    """Two narrow layers without dropout, unless `settings` say otherwise."""
    return BertConfig(**{"vocab_size": vocab_size, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
                         "intermediate_size": 64, "max_position_embeddings": MAX_LENGTH, "hidden_dropout_prob": 0.0,
                         "attention_probs_dropout_prob": 0.0, **settings})


def roughen(model: torch.nn.Module, seed: int = 11) -> torch.nn.Module:
    """The model with noise on every weight: fresh biases of 0 and LayerNorms of 1 would hide one that is left out."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.1 * torch.randn(weight.shape, generator=generator)
    return model


def small_model(vocab_size: int, objective: str = "mlm+nsp", **settings) -> BertForPreTraining:
    """Our model, in training mode."""
    config = small_config(vocab_size, **settings)
    torch.manual_seed(5)
    model = roughen(BertForPreTraining(config)).train()
    model.set_objective(objective)
    return model


def make_batches(corpus, vocabulary, objective: str = "mlm+nsp", micro_batch_size: int = 8, count: int = 1, *, fill: bool = False,
                 max_length: int = MAX_LENGTH) -> list[Batch]:
    """The first `count` micro-batches of a run."""
    task = Task(objective, max_length, micro_batch_size, mask_rate=0.15, seed=3)
    dataset, collator = PretrainingDataset(corpus, task), Collator(task, vocabulary, Masking(), fill)
    return [collator(dataset.__getitems__([DataPosition(0, 0, number)])) for number in range(count)]


def cut(corpus, vocabulary, sizes: list[int]) -> list[Batch]:
    """The first sequences of a plan, as micro-batches of `sizes` sequences; pairs and masks do not depend on the sizes."""
    task = Task("mlm+nsp", MAX_LENGTH, micro_batch_size=sum(sizes), mask_rate=0.15, seed=3)
    plan, collator = PretrainingDataset(corpus, task).plan(0, 0), Collator(task, vocabulary, Masking())
    ends = torch.tensor(sizes).cumsum(0).tolist()
    return [collator(Examples(corpus.shard(0), plan.take(slice(end - size, end)))) for size, end in zip(sizes, ends)]


def pad(batch: Batch) -> dict[str, Tensor]:
    """The arguments of a stock BertForPreTraining for the real sequences of a batch: one row each, padded."""
    shape = (batch.num_sequences, max(batch.lengths))
    padded = {name: torch.zeros(shape, dtype=torch.int64) for name in ("input_ids", "attention_mask", "token_type_ids")}
    labels = torch.full(shape, IGNORED)
    wanted = dict(zip(batch.masked_positions.tolist()[:batch.counts["mlm"]], batch.masked_lm_labels.tolist()))
    start = 0
    for row, length in enumerate(batch.lengths[:batch.num_sequences]):
        padded["input_ids"][row, :length] = batch.input_ids[start:start + length]
        padded["token_type_ids"][row, :length] = batch.token_type_ids[start:start + length]
        padded["attention_mask"][row, :length] = 1
        for place in range(length):
            labels[row, place] = wanted.get(start + place, IGNORED)
        start += length
    return {**padded, "labels": labels, "next_sentence_label": batch.next_sentence_label[:batch.num_sequences]}


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    """Name -> gradient of the weights that have one."""
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor], atol: float, rtol: float = 1e-5) -> None:
    """Both hold the same names and nearly the same numbers."""
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], atol=atol, rtol=rtol, msg=lambda text, name=name: f"{name}: {text}")


def dense_attention(qkv: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The slow form of packed attention: softmax(QK' / sqrt(D)) V over the whole pack [T, 3, H, D], -inf where two tokens are of
    different sequences. Tensor operations only: this compiles."""
    query, key, value = qkv.permute(1, 2, 0, 3)  # [H, T, D] each
    place = torch.arange(len(qkv), device=qkv.device)
    sequence = (place[:, None] >= cu_seqlens[None, 1:]).sum(1)
    scores = query @ key.transpose(1, 2) * query.shape[-1] ** -0.5
    scores = scores.masked_fill(sequence[:, None] != sequence[None, :], float("-inf"))
    return (scores.softmax(-1) @ value).transpose(0, 1)


def offsets(lengths) -> Tensor:
    """int32 [N + 1]: where sequences of `lengths` begin and end."""
    return torch.tensor([0, *lengths]).cumsum(0).int()
