"""Text classification on packed batches: the classes of transformers, under the same names."""

import torch
import transformers
from torch import Tensor

from pretrain.batch import Batch, Loss
from pretrain.errors import UserError
from pretrain.model.loading import load_config, load_weights
from pretrain.model.losses import cross_entropy
from pretrain.model.packed import PackedModel
from pretrain.model.roberta import PackedRoberta

ONE_CLASS = "single_label_classification"


class PackedClassifier(PackedModel):
    """Batch -> losses by name; the head reads the first token of each sequence."""

    class_weights: Tensor | None = None  # float32 [classes]; None: equal weights
    head_may_differ = True

    def label_logits(self, hidden: Tensor, batch: Batch) -> Tensor:
        """float32 [N, classes]."""
        # [N, 1, width]: a pooler, or a head without pooler, reads token 0.
        first = self.first_tokens(hidden, batch)[:, None]
        pooler = getattr(self.base_model, "pooler", None)
        if pooler is not None:
            first = self.dropout(pooler(first))
        return self.classifier(first).float()

    def losses(self, hidden: Tensor, batch: Batch) -> dict[str, Loss]:
        """The terms of the training loss, by name. Add your own here."""
        logits, labels = self.label_logits(hidden, batch), batch.labels["label"]
        return {"label": cross_entropy(logits, labels, class_weights=self.class_weights)}


def _packed(stock: type, family: type[PackedModel] = PackedModel) -> type[PackedClassifier]:
    """`stock` on packed batches, under the same name, which `save_pretrained` writes."""
    return type(stock.__name__, (PackedClassifier, family, stock), {})


CLASSIFIERS = {
    "bert": _packed(transformers.BertForSequenceClassification),
    "roberta": _packed(transformers.RobertaForSequenceClassification, PackedRoberta),
    "xlm-roberta": _packed(transformers.XLMRobertaForSequenceClassification, PackedRoberta),
    "camembert": _packed(transformers.CamembertForSequenceClassification, PackedRoberta),
}  # by config.model_type


def load_classifier(
    name: str, classes: list[str] | None = None, keep_head: bool = True
) -> PackedClassifier:
    """The classifier in a checkpoint or, given `classes`, a classifier for them on its encoder.

    A head for the same labels is kept; a fresh head is drawn with the global seed."""
    config = load_config(name)
    chooses_one = config.num_labels > 1 and config.problem_type in (None, ONE_CLASS)
    keep_head &= chooses_one and classes in (None, list(config.id2label.values()))
    if classes is not None:
        config.id2label = dict(enumerate(classes))
        config.label2id = {label: number for number, label in enumerate(classes)}
        config.problem_type = ONE_CLASS
    if config.model_type not in CLASSIFIERS:
        families = ", ".join(CLASSIFIERS)
        raise UserError(f"{name}: is a {config.model_type} model; expected one of {families}")
    model, missing = load_weights(CLASSIFIERS[config.model_type], name, config)
    has_head = not any(key.startswith("classifier") for key in missing)
    if classes is None and not (has_head and chooses_one):
        expected = "a classifier, such as one from finetune.py"
        raise UserError(f"{name}: no head that chooses one of several classes; expected {expected}")
    if not (keep_head and has_head):  # even if the sizes happen to match
        torch.manual_seed(torch.initial_seed())  # other missing weights may have drawn numbers
        for weight in model.classifier.parameters():
            weight._is_hf_initialized = False  # transformers skips loaded weights
        model.classifier.apply(model._init_weights)
    return model
