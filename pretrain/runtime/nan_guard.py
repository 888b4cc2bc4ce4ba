"""Steps with gradients that are not finite: counted, reported, and an error if there are too many.

The optimizer skips them, see `optim.step_if`."""

from collections.abc import Callable

import torch
from torch import Tensor

from pretrain.errors import UserError, counted
from pretrain.schema import integer

MAX_SKIPPED_IN_A_ROW = 20
MAX_SKIPPED_SHARE = 0.9  # of the steps: with so few others, a run has learned nothing
ADVICE = "start a new run with a lower learning rate, in fp32, or with another model"
Report = Callable[[str], None]
Rebuild = Callable[[int, object], str]


class NanGuard:
    """Reads the finite flag of a step one step later, when the device has long computed it.
    `report` prints a line per skipped step. `rebuild(step, data position)` returns the command that
    shows the data of a step, or ""."""

    state_form = {"skipped": integer(), "skipped_in_a_row": integer()}

    def __init__(self, report: Report = print, rebuild: Rebuild = lambda *_: ""):
        self.report, self.rebuild = report, rebuild
        self.skipped = self.skipped_in_a_row = 0
        self._pending: tuple[Tensor, torch.cuda.Event | None, int, object] | None = None

    def observe(self, finite: Tensor, step: int, position: object = None) -> None:
        """Keep the flag (bool scalar) of this step and check that of the step before. UserError
        after MAX_SKIPPED_IN_A_ROW skipped steps in a row."""
        copied = None
        if finite.is_cuda:  # copied now, so that reading it waits for this step only
            finite, copied = finite.to("cpu", non_blocking=True), torch.cuda.Event()
            copied.record()
        self._read_pending()
        self._pending = (finite, copied, step, position)

    def state_dict(self) -> dict[str, int]:
        """The counts, including the flag of the last step. Waits for the device."""
        self._read_pending()
        return {"skipped": self.skipped, "skipped_in_a_row": self.skipped_in_a_row}

    def check_enough(self, steps: int) -> None:
        """UserError if nearly all of the `steps` of a run were skipped."""
        skipped = self.state_dict()["skipped"]
        if skipped >= max(1, MAX_SKIPPED_SHARE * steps):
            shown = f"{skipped:,} of the {counted(steps, 'step')}"
            problem = f"the gradients of {shown} were not finite"
            raise UserError(f"{problem}, so there is no final model; {ADVICE}")

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.skipped, self.skipped_in_a_row = state["skipped"], state["skipped_in_a_row"]

    def _read_pending(self) -> None:
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
        command = self.rebuild(step, position)
        shown = f". To see its data: {command}" if command else ""
        raise UserError(f"{where}: {problem}; {ADVICE}{shown}")
