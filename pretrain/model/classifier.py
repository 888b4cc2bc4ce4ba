"""Text classification on packed batches: transformers' own classes under their own names, only `forward` is ours."""
from __future__ import annotations

import torch
import transformers
from torch import Tensor

from pretrain.batch import LabelledBatch
from pretrain.command import UserError
from pretrain.model.bert import load_config, load_weights
from pretrain.model.packed import PackedModel
from pretrain.model.roberta import RobertaPositions


class PackedClassifier(PackedModel):
    """LabelledBatch -> Output; the head reads the first token of each sequence."""

    loss_weights = {"label": 1.0}
    head_may_differ = True

    def label_logits(self, hidden: Tensor, batch: LabelledBatch) -> Tensor:
        """float32 [N, classes]."""
        first = self.first_tokens(hidden, batch)[:, None]  # [N, 1, width]: pooler and head take token 0
        pooler = getattr(self.base_model, "pooler", None)
        return self.classifier(first if pooler is None else self.dropout(pooler(first))).float()

    def score(self, hidden: Tensor, batch: LabelledBatch) -> dict[str, tuple[Tensor, Tensor]]:
        """(logits, labels) of the one loss."""
        return {"label": (self.label_logits(hidden, batch), batch.label)}


class BertForSequenceClassification(PackedClassifier, transformers.BertForSequenceClassification):
    """LabelledBatch -> Output."""


class RobertaForSequenceClassification(PackedClassifier, RobertaPositions, transformers.RobertaForSequenceClassification):
    """LabelledBatch -> Output."""


class XLMRobertaForSequenceClassification(PackedClassifier, RobertaPositions, transformers.XLMRobertaForSequenceClassification):
    """LabelledBatch -> Output."""


class CamembertForSequenceClassification(PackedClassifier, RobertaPositions, transformers.CamembertForSequenceClassification):
    """LabelledBatch -> Output."""


CLASSIFIERS = {"bert": BertForSequenceClassification, "roberta": RobertaForSequenceClassification,
               "xlm-roberta": XLMRobertaForSequenceClassification, "camembert": CamembertForSequenceClassification}


def load_classifier(name: str, classes: list[str] | None = None, keep_head: bool = True) -> PackedClassifier:
    """The classifier in a checkpoint, or, with `classes`, one of those labels over its encoder; its head is kept where it has them.

    UserError where there is no such checkpoint, or, without `classes`, no head in it that chooses one class. A fresh head is drawn
    from the global random numbers, the last thing that is."""
    config = load_config(name)
    chooses_one = config.num_labels > 1 and config.problem_type in (None, "single_label_classification")
    keep_head &= chooses_one and classes in (None, list(config.id2label.values()))
    if classes is not None:
        config.id2label, config.label2id = dict(enumerate(classes)), {label: number for number, label in enumerate(classes)}
        config.problem_type = "single_label_classification"
    model, missing = load_weights(CLASSIFIERS[config.model_type], name, config)
    has_head = not any(key.startswith("classifier") for key in missing)
    if classes is None and not (has_head and chooses_one):
        raise UserError(f"--model {name}: has no head that chooses one of several classes; needed is a classifier, such as "
                        "finetune.py makes")
    if not (keep_head and has_head):  # also where the sizes happen to agree
        torch.manual_seed(torch.initial_seed())  # whatever else was missing and has drawn
        for weight in model.classifier.parameters():
            weight._is_hf_initialized = False  # what came from the checkpoint would be passed over
        model.classifier.apply(model._init_weights)
    return model


def check_tokenizer(model: PackedClassifier, name: str, num_ids: int, num_types: int) -> None:
    """UserError where a tokenizer of `num_ids` ids, which tells `num_types` texts apart, is not the model's."""
    config = model.config
    if num_ids > config.vocab_size:
        raise UserError(f"--model {name}: its tokenizer has {num_ids:,} ids, the model {config.vocab_size:,} vectors; needed is the "
                        "model's own tokenizer")
    if num_types > config.type_vocab_size:
        raise UserError(f"--text-pair-field: the model {name} has {config.type_vocab_size} token types, two texts need {num_types}")
