"""A trial micro-batch: its time, or none if memory is full; the model is left as it was."""

import pytest
import torch
from conftest import fail
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
    """A function that tries a micro-batch on a model that raises `error`."""

    def run(error=None):
        model, (batch,) = small_model(vocabulary.size).eval(), make_batches(corpus, vocabulary)
        before = [weight.detach().clone() for weight in model.parameters()]
        if error:
            model.layers[1].register_forward_hook(fail(error))
        seconds = trial_seconds(model, batch, autocast(torch.device("cpu"), "fp32"))
        assert not model.training and all(map(torch.equal, before, model.parameters()))
        assert all(weight.grad is None for weight in model.parameters())
        return seconds

    return run


@pytest.mark.parametrize("error", FULL, ids=lambda error: type(error).__name__)
def test_a_micro_batch_that_fills_memory_has_no_time(error, trial):
    assert trial() > 0 and trial(error) is None


def test_another_error_is_not_taken_for_full_memory(trial):
    """Else a bug in an edited model would only make micro-batches smaller."""
    with pytest.raises(RuntimeError, match="shapes differ"):
        trial(RuntimeError("shapes differ"))
