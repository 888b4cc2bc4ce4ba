"""Work whose parts save their results, so that an interrupted command resumes where it stopped."""

import time
from collections.abc import Callable
from pathlib import Path

from pretrain.files import locks_released, read_json, write_json


class Parts:
    """Results of work in the folder `output`, by name."""

    def __init__(self, output: Path):
        self.output = output
        self.seconds: dict[str, float] = {}  # by part
        self.took: dict[str, str] = {}  # by part, for this process

    def result(self, name: str, work: Callable[..., dict], *arguments: object) -> dict:
        """The saved result of a part, or else the result of `work(*arguments)`, timed."""
        path = self.output / "parts" / f"{name}.json"
        self.took[name] = "already done"
        if path.is_file():
            result = read_json(path, {}, "a result; remove the file to run the part again")
        else:
            begin = time.monotonic()
            with locks_released():  # this process holds the lock of `output`
                result = work(*arguments)
            # A run that was stopped and resumed counts its time before, too.
            result["wall_seconds"] = max(time.monotonic() - begin, result.get("seconds", 0.0))
            write_json(path, result)
            result = read_json(path)  # the same now and after an interruption
            self.took[name] = f"{result['wall_seconds']:.0f} s"
        self.seconds[name] = result["wall_seconds"]
        return result

    def print_score(self, name: str, shown: str, scores: dict, metric: str) -> None:
        """Print a score of a part, and how long that took."""
        score = f"{metric.replace('_', ' ')} {scores[metric]:.3f}"
        print(f"{shown}: {score} ({self.took[name]})")
