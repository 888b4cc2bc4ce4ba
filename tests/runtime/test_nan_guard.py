"""Non-finite steps are counted and reported one step later, and a run that only skips steps has no
result. test_faults.py has the run that is stopped and shows its data."""

import pytest
import torch

from pretrain.errors import UserError
from pretrain.runtime.nan_guard import MAX_SKIPPED_IN_A_ROW, NanGuard

GOOD, BAD = torch.tensor(True), torch.tensor(False)


def test_a_non_finite_step_is_reported_one_step_later():
    lines = []
    guard = NanGuard(lines.append)
    expected = []
    for step, finite in enumerate([GOOD, BAD, GOOD, BAD], start=1):
        guard.observe(finite, step, position=(0, step))
        if step == 3:  # the flag of step 2 may not be there before
            expected = ["step 2, data position (0, 2)"]
        assert [line.partition(":")[0] for line in lines] == expected
    assert guard.state_dict() == {"skipped": 2, "skipped_in_a_row": 1}  # with that of step 4
    assert lines[-1].startswith("step 4") and len(lines) == 2
    guard.state_dict()
    assert len(lines) == 2, "nothing is reported twice"


def test_the_counts_continue_from_a_checkpoint():
    guard, resumed = NanGuard(lambda line: None), NanGuard(lambda line: None)
    for step in range(1, MAX_SKIPPED_IN_A_ROW):
        guard.observe(BAD, step)
    resumed.load_state_dict(guard.state_dict())
    resumed.observe(BAD, MAX_SKIPPED_IN_A_ROW)
    with pytest.raises(UserError, match=f"step {MAX_SKIPPED_IN_A_ROW}"):
        resumed.state_dict()


def test_a_short_run_that_nearly_only_skips_has_no_result():
    guard = NanGuard(lambda line: None)
    guard.check_enough(0)  # a run without steps skips none
    for step in range(1, 11):
        guard.observe(GOOD if step == 10 else BAD, step)
    with pytest.raises(UserError, match="9 of the 10 steps"):
        guard.check_enough(10)
    guard.observe(GOOD, 11)
    guard.check_enough(11)
