"""Prints the report of a benchmark as a table, and the summary of the GPU check."""

import json
import sys
from pathlib import Path

COLUMNS = ("ours", "peer", "ratio", "goal")


def add_ratios(report: dict) -> None:
    """Add to each figure its ratio to the peer, or to the goal if there is no peer."""
    for part in report.values():
        for sides in part.values():
            if isinstance(sides, dict) and isinstance(sides.get("ours"), (int, float)):
                limit = sides.get("peer", sides.get("goal"))
                if limit:
                    sides["ratio"] = sides["ours"] / limit


def print_report(report: dict, brief: bool = False) -> None:
    """Print every part; if `brief`, without the machine and without lists other than rows."""
    for part, found in report.items():
        if part != "options" and not (brief and part == "machine"):
            _print_part(part, found, brief)


def _print_part(part: str, found: dict, brief: bool) -> None:
    values = []
    for name, value in found.items():
        label = name.replace("_", " ")
        if isinstance(value, list):
            for row in [] if brief and name != "rows" else value:
                cells = [f"{key} {_short(cell)}" for key, cell in row.items()]
                print(f"    {', '.join(cells)}")
        elif not isinstance(value, dict):
            values.append(f"{label} {_short(value)}")
        elif name != "failed" and {"ours", "peer"} & value.keys():
            title = f"{part}, {label}"
            cells = [f"{name} {_short(value[name])}" for name in COLUMNS if name in value]
            print(f"{title:32}" + "".join(f"{cell:20}" for cell in cells))
    if values:
        print(f"{part}: {', '.join(values)}")
    for name, reason in found.get("failed", {}).items():
        print(f"{part} FAILED, {name}: {reason}")


def _short(value: object) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def print_summary(folder: Path) -> None:
    """Print the results of the GPU check in `folder`; stdin has name, exit code and seconds."""
    for line in sys.stdin:
        name, code, seconds = line.split()
        print(f"== {name}: exit code {code}, {seconds} s")
        report, log = folder / f"{name}.json", folder / f"{name}.txt"
        if report.is_file():
            print_report(json.loads(report.read_text(encoding="utf-8")), brief=True)
        else:
            text = log.read_text(encoding="utf-8") if log.is_file() else "left no result"
            print(text.rstrip().rpartition("\n")[2])


if __name__ == "__main__":
    print_summary(Path(sys.argv[1]))
