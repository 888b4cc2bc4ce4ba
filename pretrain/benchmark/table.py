"""The report of a benchmark as a short table."""
from __future__ import annotations

NAMES = {
    "prepare": "prepare (peer: raw encode_batch_fast)", "data_token": "plan, pairs, pack, mask tokens, one core",
    **{f"data_{masking}": f"the same with {masking} masks (peer: tokens)" for masking in ("word", "span", "entity", "similar")},
    "train": "train (peer: Trainer, same pairs)", "blocks": "MLM alone (peer: Trainer on full blocks)", "start": "start (peer: Trainer)",
    "resume": "resume (peer: Trainer)", "memory": "memory alone (peer: Trainer)", "largest": "largest micro-batch, eager (peer: Trainer)",
    "profile": "steady steps of ours", "numerics": "against fp32 on the CPU, relative"}
COLUMNS = ("ours", "peer", "ratio", "goal")


def print_report(report: dict) -> None:
    """A line for each figure, with its peer, their ratio and the goal where there is one; then what failed or was left out."""
    machines = [cell["machine"] for cell in [report, *report.get("cells", {}).values()] if "machine" in cell]
    print(", ".join(f"{name} {value}" for machine in machines[:1] for name, value in machine.items()))
    print(f"{'':66}" + "".join(f"{column:>12}" for column in COLUMNS))
    print_parts(report)
    for name, cell in report.get("cells", {}).items():
        print(f"-- {name}\n   {cell['command']}")
        print_parts(cell)
        print_failure("", cell.get("failed"))
    for name, sides in report.get("best", {}).items():
        rates = {side: found["tokens_per_second"] for side, found in sides.items()}
        print_line(f"best of {name}, tokens per second", rates)
        print_line(f"best of {name}, MFU", {side: found["mfu"] for side, found in sides.items() if found["mfu"]})
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
    shown = dict(sides)
    if {"ours", "peer"} <= sides.keys() and sides["peer"]:
        shown["ratio"] = sides["ours"] / sides["peer"]
    cells = (f"{shown[column]:,.0f}" if shown[column] >= 100 else f"{shown[column]:.3g}" for column in COLUMNS if column in shown)
    widths = {column: next(cells) if column in shown else "" for column in COLUMNS}
    print(f"{name:66}" + "".join(f"{widths[column]:>12}" for column in COLUMNS))


def print_failure(name: str, failure: str | None) -> None:
    """What went wrong, if something did."""
    if failure:
        print(f"{name or '  '} failed: {failure}")
