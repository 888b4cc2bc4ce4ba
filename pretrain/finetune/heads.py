"""Heads for fine-tuning on packed batches: the classes of transformers, under the same names."""

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING

from pretrain.batch import Batch, Loss
from pretrain.errors import UserError
from pretrain.model.distilbert import PackedDistilBert
from pretrain.model.loading import load_config, load_weights
from pretrain.model.losses import cross_entropy, squared_error
from pretrain.model.modernbert import PackedModernBert
from pretrain.model.packed import PackedModel
from pretrain.model.roberta import PackedRoberta

ONE_CLASS, A_NUMBER = "single_label_classification", "regression"  # config.problem_type


class PackedClassifier(PackedModel):
    """Batch -> losses by name; the head reads `classifier_input`."""

    class_weights: Tensor | None = None  # float32 [classes]; None: equal weights
    head_may_differ = True

    def label_logits(self, hidden: Tensor, batch: Batch) -> Tensor:
        """float32 [N, classes]; [N, 1] in regression."""
        return self.classify(self.classifier_input(hidden, batch))

    def classify(self, features: Tensor) -> Tensor:
        """`classifier` in float32: autocast would round its outputs to 8 bits, so that many rows
        would have the same number."""
        with torch.autocast(features.device.type, enabled=False):
            return self.classifier(features.float())

    def losses(self, hidden: Tensor, batch: Batch) -> dict[str, Loss]:
        """The terms of the training loss, by name. Add your own here."""
        logits, labels = self.label_logits(hidden, batch), batch.labels["label"]
        if self.config.problem_type == A_NUMBER:
            return {"label": squared_error(logits[:, 0], labels)}
        return {"label": cross_entropy(logits, labels, class_weights=self.class_weights)}

    def outputs(self, logits: Tensor) -> Tensor:
        """Probabilities [N, classes]; numbers [N] in regression."""
        return logits[:, 0] if self.config.problem_type == A_NUMBER else logits.softmax(-1)


class PackedTagger(PackedClassifier):
    """Batch -> losses by name; the head reads the tagged tokens: the first of each word."""

    head_layers = ("head", "drop", "dropout")  # before `classifier`; a family has some of them

    def label_logits(self, hidden: Tensor, batch: Batch) -> Tensor:
        """float32 [M, tags]."""
        tagged = hidden[batch.masked_positions]
        for name in self.head_layers:
            if hasattr(self, name):
                tagged = self.get_submodule(name)(tagged)
        return self.classify(tagged)


def _packed(
    stock: type,
    family: type[PackedModel] = PackedModel,
    head: type[PackedClassifier] = PackedClassifier,
) -> type[PackedClassifier]:
    """`stock` on packed batches, under the same name, which `save_pretrained` writes."""
    return type(stock.__name__, (head, family, stock), {"family": family})


CLASSIFIERS = {
    "bert": _packed(transformers.BertForSequenceClassification),
    "roberta": _packed(transformers.RobertaForSequenceClassification, PackedRoberta),
    "xlm-roberta": _packed(transformers.XLMRobertaForSequenceClassification, PackedRoberta),
    "camembert": _packed(transformers.CamembertForSequenceClassification, PackedRoberta),
    "distilbert": _packed(transformers.DistilBertForSequenceClassification, PackedDistilBert),
    "modernbert": _packed(transformers.ModernBertForSequenceClassification, PackedModernBert),
}  # by config.model_type
TAGGERS = {
    name: _packed(
        MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING[kind.config_class], kind.family, PackedTagger
    )
    for name, kind in CLASSIFIERS.items()
}


def task_of(config: PreTrainedConfig) -> str | None:
    """The task that a head with this config is for; None if finetune.py has no such task. An
    encoder without a head counts as a classifier."""
    architecture = (config.architectures or [""])[0]
    if architecture.endswith("ForTokenClassification"):
        return "ner" if config.num_labels > 1 else None
    if config.num_labels == 1 and config.problem_type in (None, A_NUMBER):
        return "regression"
    chooses_one = config.num_labels > 1 and config.problem_type in (None, ONE_CLASS)
    return "classification" if chooses_one else None


def load_classifier(
    name: str, classes: list[str] | None = None, keep_head: bool = True, task: str | None = None
) -> PackedClassifier:
    """The model in a checkpoint for `task` (None: whichever it has) or, given `classes`, a model
    for them on its encoder: classes, tags, or [] in regression.

    A head for the same task and labels is kept; a fresh head is drawn with the global seed."""
    config = load_config(name)
    found = task_of(config)
    task = task or (found if classes is None else "classification")
    is_same = task is not None and task == found
    keep_head &= is_same and classes in (None, [], list(config.id2label.values()))
    if classes is not None:
        config.id2label = dict(enumerate(classes or ["LABEL_0"]))
        config.label2id = {label: number for number, label in config.id2label.items()}
        problem_types = {"classification": ONE_CLASS, "regression": A_NUMBER, "ner": None}
        config.problem_type = problem_types[task]
    elif task == "regression":
        config.problem_type = A_NUMBER
    if config.model_type not in CLASSIFIERS:
        families = ", ".join(CLASSIFIERS)
        raise UserError(f"{name}: is a {config.model_type} model; expected one of {families}")
    heads = TAGGERS if task == "ner" else CLASSIFIERS
    model, missing = load_weights(heads[config.model_type], name, config)
    has_head = not any(key.startswith("classifier") for key in missing)
    if classes is None and not (has_head and is_same):
        expected = "a fine-tuned model, such as one from finetune.py"
        raise UserError(f"{name}: no head that fits; expected {expected}")
    if not (keep_head and has_head):  # even if the sizes happen to match
        torch.manual_seed(torch.initial_seed())  # other missing weights may have drawn numbers
        for weight in model.classifier.parameters():
            weight._is_hf_initialized = False  # transformers skips loaded weights
        model.classifier.apply(model._init_weights)
        model._init_weights(model)  # ModernBERT has a rule of its own, for the model as a whole
    return model
