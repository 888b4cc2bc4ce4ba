"""A trial micro-batch: its time, or none if memory is full; the model is left as it was."""

import pytest
import torch
from packed_reference import make_batches, small_model

from pretrain.runtime.memory import trial_seconds
from pretrain.runtime.optim import autocast

FULL = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    MemoryError(),
    RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
]


@pytest.fixture
def trial(corpus, vocabulary):
    """A function that tries a micro-batch on a model that raises `error`; the model."""
    model, (batch,) = small_model(vocabulary.size).eval(), make_batches(corpus, vocabulary)

    def run(error=None):
        def fail(*_):
            raise error

        if error:
            model.layers[1].register_forward_hook(fail)
        return trial_seconds(model, batch, autocast(torch.device("cpu"), "fp32"))

    return run, model


def assert_untouched(model):
    assert not model.training and all(weight.grad is None for weight in model.parameters())


def test_a_micro_batch_that_fits_has_a_time(trial):
    run, model = trial
    before = [weight.detach().clone() for weight in model.parameters()]
    assert run() > 0
    assert_untouched(model)
    assert all(map(torch.equal, before, model.parameters()))


@pytest.mark.parametrize("error", FULL, ids=lambda error: type(error).__name__)
def test_a_micro_batch_that_fills_memory_has_none(error, trial):
    run, model = trial
    assert run(error) is None
    assert_untouched(model)


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), ValueError("another")], ids=str)
def test_another_error_is_not_taken_for_full_memory(error, trial):
    """Else a bug in an edited model would only make micro-batches smaller."""
    with pytest.raises(type(error), match=str(error)):
        trial[0](error)
