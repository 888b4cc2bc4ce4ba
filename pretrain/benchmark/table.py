"""The report of a benchmark as a short table."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

SUMMARIZED = (
    "tokens_per_second",
    "share_of_matrix_rate",
    "micro_batch_size",
    "smaller_because",
    "peak_gib",
    "first_step_seconds",
    "data_wait",
    "idle",
    "step_ms",
    "kernels_ms",
    "waits_for_device",
    "loss_difference",
    "grad_norm_difference",
    "largest_relative_difference",
    "resumed_from",
    "skipped_steps",
    "macro_f1",
    "summary",
)
ROW_FIGURES = ("variant", "tokens_per_second", "share_of_matrix_rate", "peak_gib", "error")
NAMES = {
    "prepare": "prepare (peer: raw encode_batch_fast)",
    "data_token": "plan, pairs, pack, mask tokens, one core",
    **{
        f"data_{masking}": f"the same with {masking} masks (peer: tokens)"
        for masking in ("word", "span", "entity", "similar")
    },
    "train": "train (peer: Trainer, same pairs)",
    "blocks": "MLM alone (peer: Trainer on full blocks)",
    "start": "start (peer: Trainer)",
    "resume": "resume (peer: Trainer)",
    "memory": "memory alone (peer: Trainer)",
    "largest": "largest micro-batch, eager (on a CPU the search's bound)",
    "profile": "steady steps of ours",
    "numerics": "against fp32 on the CPU, relative",
}
COLUMNS = ("ours", "peer", "ratio", "goal")


def add_ratios(report: dict) -> None:
    """Put beside each figure its ratio to the peer, or to the goal where there is no peer."""
    for value in [value for value in report.values() if isinstance(value, dict)]:
        limit = value.get("peer", value.get("goal"))
        if (
            isinstance(value.get("ours"), (int, float))
            and isinstance(limit, (int, float))
            and limit
        ):
            value["ratio"] = value["ours"] / limit
        add_ratios(value)


def print_report(report: dict) -> None:
    """A line for each figure, with its peer, its goal and its ratio; then what failed or was left out."""
    print(
        "ratio: ours to the peer, or to the goal where there is no peer; more is better for tokens, less for seconds, memory and shares"
    )
    machines = [
        cell["machine"] for cell in [report, *report.get("cells", {}).values()] if "machine" in cell
    ]
    print(
        ", ".join(f"{name} {value}" for machine in machines[:1] for name, value in machine.items())
    )
    print(f"{'':66}" + "".join(f"{column:>12}" for column in COLUMNS))
    print_parts(report)
    for name, cell in report.get("cells", {}).items():
        print(f"-- {name}\n   {cell['command']}")
        print_parts(cell)
        print_failure("", cell.get("failed"))
    for name, sides in report.get("best", {}).items():
        for what in ("tokens_per_second", "share_of_matrix_rate"):
            figures = {what: {side: found[what] for side, found in sides.items() if found[what]}}
            add_ratios(figures)
            print_line(f"best of {name}, {what.replace('_', ' ')}", figures[what])
    for name in report.get("left_out", []):
        print(f"left out, no time: {name}")


def print_parts(report: dict) -> None:
    """The figures of one model and length."""
    for part in [
        part
        for part in report
        if isinstance(report[part], dict) and part not in ("options", "machine", "cells", "best")
    ]:
        name = NAMES.get(part, part.replace("_", " "))
        for what, value in report[part].items():
            if (
                isinstance(value, dict)
                and {"ours", "peer"} & value.keys()
                and what not in ("failed", "compiled", "smaller_because")
            ):
                print_line(f"{name}, {what.replace('_', ' ')}", value)
        failed = report[part].get("failed", {})
        for side, failure in failed.items() if isinstance(failed, dict) else enumerate(failed, 1):
            print_failure(f"{name}, {side}", failure)
        for side, reason in report[part].get("smaller_because", {}).items():
            micro_batch_size = report[part]["micro_batch_size"]
            print(f"{name}, micro-batches of {micro_batch_size} for both sides: {side}: {reason}")
        for kernel in report[part].get("kernels", []):
            print(
                f"    {kernel['share']:6.1%} {kernel['ms']:8.3f} ms {kernel['count']:5} x {kernel['name'][:100]}"
            )
        for row in report[part].get("rows", []):
            print("    " + ", ".join(f"{column} {short(value)}" for column, value in row.items()))
        for who, made in report[part].get("compiled", {}).items():
            print(
                f"{name}, compiled by {who}: {made['graphs']} graphs, {made['graph_breaks']} graph breaks"
            )
        if "waits_for_device" in report[part]:
            print(f"{name}, waits for the device in a step: {report[part]['waits_for_device']}")


def short(value: object) -> str:
    """A figure of a row with few digits; anything else as it is."""
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def print_check(lines: Iterable[str], folder: Path) -> None:
    """A summary of the GPU check: of each part, given as a line of name, exit code and seconds, its key figures from its JSON."""
    print(f"{'part':16}{'exit code':>10}{'seconds':>9}  figures")
    for name, code, seconds in map(str.split, lines):
        path = folder / f"{name}.json"
        try:
            report = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            report = {}
        values = "; ".join(key_figures(report)) if report else f"no {path.name}"
        print(f"{name:16}{code:>10}{seconds:>9}  {values}")


def key_figures(report: dict) -> list[str]:
    """The few figures of a report that a summary shows."""
    figures = []
    for part, found in report.items():
        if not isinstance(found, dict) or part in ("options", "machine"):
            continue
        for what in SUMMARIZED:
            value = found.get(what)
            if isinstance(value, dict):
                value = " ".join(f"{side} {short(figure)}" for side, figure in value.items())
            if value not in (None, ""):
                figures.append(f"{what.replace('_', ' ')} {short(value)}")
        rows = found.get("rows", [])
        for row in rows if part in ("variants",) else ():
            kept = {column: row[column] for column in ROW_FIGURES if column in row}
            figures.append(" ".join(f"{column} {short(value)}" for column, value in kept.items()))
        failed = found.get("failed") or []
        reasons = (
            [f"{side}: {text}" for side, text in failed.items()]
            if isinstance(failed, dict)
            else failed
        )
        figures += [f"{part} FAILED: {reason}" for reason in reasons]
        figures += [f"{part} needs {found['needs']}"] if "needs" in found else []
        if part == "attention":
            figures += fastest(rows)
    return figures


def fastest(rows: list[dict]) -> list[str]:
    """For each length the attention that took least, forward and backward, and what failed."""
    figures = []
    for length in sorted({row["max_length"] for row in rows}):
        measured = [row for row in rows if row["max_length"] == length and "error" not in row]
        if measured:
            best = min(measured, key=lambda row: row["forward_and_backward_ms"])
            labels = ", ".join(str(best[name]) for name in ("kernel", "layout") if name in best)
            figures.append(f"{length}: {best['forward_and_backward_ms']:.3f} ms by {labels}")
    errors = sum("error" in row for row in rows)
    return figures + [f"{errors} of {len(rows)} variants failed"] * (errors > 0)


def print_line(name: str, sides: dict[str, float]) -> None:
    """One figure."""
    cells = {
        column: f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
        for column, value in sides.items()
    }
    print(f"{name:66}" + "".join(f"{cells.get(column, ''):>12}" for column in COLUMNS))


def print_failure(name: str, failure: str | None) -> None:
    """What went wrong, if something did."""
    if failure:
        print(f"{name or '  '} failed: {failure}")
