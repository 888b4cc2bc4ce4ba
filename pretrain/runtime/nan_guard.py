"""Steps whose gradients are not finite: the optimizer skips them (`optim.step_if`); here they are
counted and reported, and a run that only skips is stopped."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from pretrain.errors import UserError
from pretrain.schema import integer

MAX_SKIPPED_IN_A_ROW = 20
Report = Callable[[str], None]
Rebuild = Callable[[int, object], str]


class NanGuard:
    """Reads the finite flag of a step one step later, when the device has long computed it.
    `report` gets a line for each skipped step. `rebuild` returns the command that shows the data of
    a step again, from the step and its data position; "" if there is none."""

    state_form = {"skipped": integer(), "skipped_in_a_row": integer()}

    def __init__(self, report: Report = print, rebuild: Rebuild = lambda *_: ""):
        self.report, self.rebuild = report, rebuild
        self.skipped = self.skipped_in_a_row = 0
        self._pending: tuple[Tensor, torch.cuda.Event | None, int, object] | None = None

    def observe(self, finite: Tensor, step: int, position: object = None) -> None:
        """Keep the flag (bool scalar) of this step, and act on that of the step before. UserError
        after MAX_SKIPPED_IN_A_ROW steps in a row that were not finite."""
        copied = None
        if finite.is_cuda:  # copied now, so that reading it waits for this step alone
            finite, copied = finite.to("cpu", non_blocking=True), torch.cuda.Event()
            copied.record()
        self._settle()
        self._pending = (finite, copied, step, position)

    def state_dict(self) -> dict[str, int]:
        """The counts, with the flag of the last step. Waits for the device."""
        self._settle()
        return {"skipped": self.skipped, "skipped_in_a_row": self.skipped_in_a_row}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.skipped, self.skipped_in_a_row = state["skipped"], state["skipped_in_a_row"]

    def _settle(self) -> None:
        if self._pending is None:
            return
        (finite, copied, step, position), self._pending = self._pending, None
        if copied is not None:
            copied.synchronize()
        if finite:
            self.skipped_in_a_row = 0
            return
        self.skipped += 1
        self.skipped_in_a_row += 1
        where = f"step {step}" if position is None else f"step {step}, data position {position}"
        if self.skipped_in_a_row < MAX_SKIPPED_IN_A_ROW:
            self.report(f"{where}: the gradients are not finite; the step changed nothing")
            return
        problem = f"the gradients of {self.skipped_in_a_row} steps in a row are not finite"
        advice = "start a new run with a lower learning rate, or in fp32"
        command = self.rebuild(step, position)
        shown = f". To see its data: {command}" if command else ""
        raise UserError(f"{where}: {problem}; {advice}{shown}")


class ScaleWatch:
    """Reports an fp16 gradient scale below 1: gradients overflow above it and vanish below it."""

    def __init__(self, scaler: torch.amp.GradScaler, report: Report = print):
        self.scaler, self.report, self._last = scaler, report, math.inf

    def logged(self) -> dict[str, float]:
        """The scale at a logged step, for the log. Waits for the device; {} without a scaler."""
        if not self.scaler.is_enabled():
            return {}
        before, self._last = self._last, self.scaler.get_scale()
        if self._last < 1 <= before:
            advice = "try bf16 or fp32, or a lower learning rate"
            self.report(f"the scale of the fp16 gradients fell to {self._last:g}; {advice}")
        return {"optim/loss_scale": self._last}
