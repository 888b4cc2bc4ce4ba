"""Models from scratch and from checkpoints: every size, config field and override is used as
given, or refused before anything is created."""

import json
import math
import shutil

import pytest
import torch
from conftest import change_json, change_weights, refused
from packed_reference import small_config_of, small_model
from transformers import BertConfig

from pretrain.config import MODEL_SIZES
from pretrain.model.attention import SDPA
from pretrain.model.loading import FAMILIES, from_checkpoint, from_size, load_config, override
from pretrain.runtime.checkpoint import write_folder


@pytest.fixture(scope="module")
def saved(vocabulary, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    small_model(vocabulary.size).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of a model folder with the name of another family."""
    return shutil.copytree(saved, tmp_path / "chinese-roberta-wwm-ext")


# Sizes.


@pytest.mark.parametrize("size", ["tiny", "large"])
def test_sizes_have_the_layers_and_widths_of_the_table(size):
    with torch.device("meta"):  # no memory for the large ones
        model = from_size(size, vocab_size=1000, max_length=64, pad_id=3)
    layers, width = MODEL_SIZES[size]
    first = model.layers[0]
    assert len(model.layers) == layers
    assert first.attention.self.query.weight.shape == (width, width)
    assert width // model.config.num_attention_heads == 64
    assert first.intermediate.dense.weight.shape == (4 * width, width)
    assert model.cls.predictions.decoder.weight.shape == (1000, width)
    assert model.bert.embeddings.word_embeddings.padding_idx == model.config.pad_token_id == 3
    assert model.config.max_position_embeddings == 512 and model.attention == SDPA


# Overrides.


TYPED = {"num_hidden_layers": 3, "hidden_dropout_prob": 0.0, "layer_norm_eps": 1e-7}
TYPED |= {"hidden_act": "relu", "tie_word_embeddings": False, "use_cache": True}


def test_override_keeps_the_type_of_the_field():
    config = BertConfig(hidden_dropout_prob=0)  # as some published configs have it
    override(config, ["hidden_dropout_prob=0.1"])
    assert config.hidden_dropout_prob == 0.1
    override(config, [f"{name}={value}".lower() for name, value in TYPED.items()])
    for name, value in TYPED.items():
        assert getattr(config, name) == value and type(getattr(config, name)) is type(value)


BAD = {
    "bert": """no_such_field=1 model_type=roberta num_hidden_layers=two num_hidden_layers=1000000000
    num_attention_heads=7 hidden_dropout_prob=1.5 hidden_dropout_prob=nan hidden_act=nothing""",
    "modernbert": """hidden_dropout_prob=0 local_attention=0 classifier_pooling=max norm_eps=-1
    num_hidden_layers=1000000000 hidden_size=30 initializer_cutoff_factor=0""",
}


@pytest.mark.parametrize(("family", "entry"), [(of, e) for of in BAD for e in BAD[of].split()])
def test_overrides_that_make_no_model_are_refused(family, entry):
    refused(override, small_config_of(family, 90), [entry], begins=f"{entry}: ")
    if family == "bert":
        refused(from_size, "tiny", 120, 64, 0, ["num_hidden_layers=1", entry], names=entry)


# Checkpoints.


@pytest.mark.parametrize("family", ["electra", "xlm-roberta-xl", "somebodys-own"])
def test_another_family_is_refused_with_those_that_work(family, folder):
    (folder / "config.json").write_text(json.dumps({"model_type": family}))
    told = refused(from_checkpoint, str(folder), begins=f"{folder}: ")
    assert all(name in told for name in (family, *FAMILIES))


def test_a_name_that_is_unavailable_offline():
    """No size is suggested: this can only be a name on the hub."""
    told = refused(load_config, "nobody/nothing", begins="nobody/nothing: ")
    assert not any(size in told for size in MODEL_SIZES)


def set_fields(folder, **fields):
    change_json(folder / "config.json", lambda config: config | fields)


def test_an_encoder_that_is_not_all_of_the_files_is_reported(folder, capsys):
    refused(override, load_config(str(folder)), ["output_attentions=true"])
    set_fields(folder, num_hidden_layers=1)
    from_checkpoint(str(folder))
    assert "bert.encoder.layer.1." in capsys.readouterr().out
    set_fields(folder, position_embedding_type="relative_key")  # in no version of transformers 5
    refused(from_checkpoint, str(folder), names="position_embedding_type")


INNER = "bert.encoder.layer.1.output.dense.weight"


@pytest.mark.parametrize("name, value", [(INNER, math.nan), ("cls.predictions.bias", -math.inf)])
def test_weights_that_are_not_finite_are_refused_by_name(name, value, folder):
    change_weights(folder, lambda weights: weights[name].view(-1)[-1].fill_(value))
    refused(from_checkpoint, str(folder), begins=f"{folder}: ", names=name)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.unlink(),
        lambda path: path.write_bytes(path.read_bytes()[:-100]),
        lambda path: change_weights(path.parent, lambda weights: weights.pop(INNER)),
    ],
    ids=["missing", "cut short", "without a weight of the encoder"],
)
def test_weights_that_are_missing_or_cannot_be_read_are_refused(damage, folder):
    damage(folder / "model.safetensors")
    refused(from_checkpoint, str(folder), begins=f"{folder}: ")


FLIPPED = {"model.safetensors": -3, "config.json": 20, "checksums.json": 0}  # file -> byte


@pytest.mark.parametrize(("name", "place"), FLIPPED.items())
def test_a_flipped_bit_in_a_model_that_a_run_wrote_is_reported(
    name, place, saved, tmp_path, capsys
):
    folder = tmp_path / "final"
    write_folder(folder, lambda partial: shutil.copytree(saved, partial, dirs_exist_ok=True))
    (folder / "README.md").write_text("edited by the user")
    from_checkpoint(str(folder))
    assert not capsys.readouterr().out
    content = bytearray((folder / name).read_bytes())
    content[place] ^= 1
    (folder / name).write_bytes(content)
    from_checkpoint(str(folder))
    assert name in capsys.readouterr().out


def test_overrides_reach_the_model_and_must_fit_the_weights(folder):
    config = load_config(str(folder))
    override(config, ["hidden_dropout_prob=0.3"])
    assert from_checkpoint(str(folder), config)[0].bert.embeddings.dropout.p == 0.3
    override(config, ["intermediate_size=96"])
    refused(from_checkpoint, str(folder), config, begins=f"{folder}: ")
