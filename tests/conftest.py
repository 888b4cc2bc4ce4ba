"""Shared fixtures: a small text, a tokenizer and a corpus made of it; everything offline and on one thread."""
import os
import random
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pytest  # noqa: E402
import torch  # noqa: E402

from pretrain.data import reading, tokenizer  # noqa: E402
from pretrain.data.preparing import prepare  # noqa: E402

torch.set_num_threads(1)  # the tensors are small, and bit-equality is promised per thread count
ROOT = Path(__file__).resolve().parent.parent


def make_documents(count: int = 60, seed: int = 7) -> list[list[str]]:
    """Documents of 1 to 30 sentences of 1 to 24 words; long words fall into several pieces."""
    source = random.Random(seed)
    stems = ["bank", "river", "money", "water", "teach", "learn", "train", "model", "token", "mask", "sentence", "quick", "slow"]
    endings = ["", "s", "ed", "ing", "er", "ation", "ization", "ally"]
    words = [stem + ending for stem in stems for ending in endings]
    return [[" ".join(source.choices(words, k=source.randint(1, 24))) + " ." for _ in range(source.randint(1, 30))]
            for _ in range(count)]


@pytest.fixture(scope="session")
def documents() -> list[list[str]]:
    return make_documents()


@pytest.fixture(scope="session")
def text_file(documents, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join("\n".join(document) for document in documents) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tiny_tokenizer(documents):
    return tokenizer.train(lambda: (sentence for document in documents for sentence in document), 120)


@pytest.fixture(scope="session")
def vocabulary(tiny_tokenizer):
    return tokenizer.describe(tiny_tokenizer)


@pytest.fixture(scope="session")
def corpus(text_file, tiny_tokenizer, tmp_path_factory):
    sources = reading.check_files([text_file], "--train")
    return prepare(sources, "sentences", tiny_tokenizer, tmp_path_factory.mktemp("corpus") / "corpus")
