"""The report of a benchmark as a short table."""
from __future__ import annotations

NAMES = {
    "prepare": "prepare (peer: raw encode_batch_fast)", "data_token": "plan, pairs, pack, mask tokens, one core",
    **{f"data_{masking}": f"the same with {masking} masks (peer: tokens)" for masking in ("word", "span", "entity", "similar")},
    "train": "train (peer: Trainer, same pairs)", "blocks": "MLM alone (peer: Trainer on full blocks)", "start": "start (peer: Trainer)",
    "resume": "resume (peer: Trainer)", "memory": "memory alone (peer: Trainer)",
    "largest": "largest micro-batch, eager (on a CPU the search's bound)",
    "profile": "steady steps of ours", "numerics": "against fp32 on the CPU, relative"}
COLUMNS = ("ours", "peer", "ratio", "goal")


def add_ratios(report: dict) -> None:
    """Put beside each figure its ratio to the peer, or to the goal where there is no peer."""
    for value in [value for value in report.values() if isinstance(value, dict)]:
        limit = value.get("peer", value.get("goal"))
        if isinstance(value.get("ours"), (int, float)) and isinstance(limit, (int, float)) and limit:
            value["ratio"] = value["ours"] / limit
        add_ratios(value)


def print_report(report: dict) -> None:
    """A line for each figure, with its peer, its goal and its ratio; then what failed or was left out."""
    print("ratio: ours to the peer, or to the goal where there is no peer; more is better for tokens, less for seconds, memory and shares")
    machines = [cell["machine"] for cell in [report, *report.get("cells", {}).values()] if "machine" in cell]
    print(", ".join(f"{name} {value}" for machine in machines[:1] for name, value in machine.items()))
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
    for part in [part for part in report if isinstance(report[part], dict) and part not in ("options", "machine", "cells", "best")]:
        name = NAMES.get(part, part.replace("_", " "))
        for what, value in report[part].items():
            if isinstance(value, dict) and {"ours", "peer"} & value.keys() and what not in ("failed", "compiled"):
                print_line(f"{name}, {what.replace('_', ' ')}", value)
        for side, failure in report[part].get("failed", {}).items():
            print_failure(f"{name}, {side}", failure)
        for kernel, share in report[part].get("kernels", {}).items():
            print(f"    {share:6.1%} {kernel[:100]}")
        for who, made in report[part].get("compiled", {}).items():
            print(f"{name}, compiled by {who}: {made['graphs']} graphs, {made['graph_breaks']} graph breaks")
        if "waits_for_device" in report[part]:
            print(f"{name}, waits for the device in a step: {report[part]['waits_for_device']}")


def print_line(name: str, sides: dict[str, float]) -> None:
    """One figure."""
    cells = {column: f"{value:,.0f}" if value >= 100 else f"{value:.3g}" for column, value in sides.items()}
    print(f"{name:66}" + "".join(f"{cells.get(column, ''):>12}" for column in COLUMNS))


def print_failure(name: str, failure: str | None) -> None:
    """What went wrong, if something did."""
    if failure:
        print(f"{name or '  '} failed: {failure}")
