"""Plots: each title says what is shown, and curves stay distinct in grayscale."""

from pathlib import Path

import numpy as np

from pretrain.data.tokenizer import is_unspaced
from pretrain.errors import require
from pretrain.files import write_aside

# Okabe and Ito's palette, safe for color-blind readers, from dark to light.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")
MARKERS, LINES = ("o", "s", "^", "D", "v"), ("-", "--", "-.", ":", "-")
CHINESE_FONTS = (
    "Noto Sans CJK SC, Noto Sans CJK JP, Source Han Sans SC, WenQuanYi Zen Hei, "
    "WenQuanYi Micro Hei, SimHei, Microsoft YaHei, PingFang SC, Arial Unicode MS"
)
MAX_NUMBERED, MAX_NAMED = 30, 60  # classes up to which a matrix shows numbers, and all names
MAX_MARKED = 30  # points up to which a curve has markers


def chinese_fonts() -> list[str]:
    """The installed fonts that have Chinese characters."""
    from matplotlib.font_manager import get_font_names

    installed = set(get_font_names())
    return [name for name in CHINESE_FONTS.split(", ") if name in installed]


def _save(figure, path: Path) -> None:
    """Write the picture, whole or not at all, in the format that the name ends in."""
    kind = path.suffix.removeprefix(".")
    write_aside(path, lambda partial: figure.savefig(partial, format=kind))


def _figure(width: float, height: float, columns: int = 1):
    """(figure, axes) without a window; sizes in inches."""
    require("matplotlib", "plots")
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    rcParams["font.family"] = ["DejaVu Sans", *chinese_fonts()]
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def _heat_maps(title: str, panels: dict[str, tuple], names: list[str], label: str):
    """Figure of matrices side by side, by name: (shares in 0..1, text of each cell)."""
    shown = names
    if any(map(is_unspaced, "".join(names))) and not chinese_fonts():
        print("no font with Chinese characters, such as Noto Sans CJK: plots number Chinese names")
        shown = [str(n) if any(map(is_unspaced, name)) else name for n, name in enumerate(names, 1)]
    is_wide = max(map(len, shown)) * len(shown) > 30
    tilt = {"rotation": 45, "ha": "right"} if is_wide else {}
    step = -(-len(shown) // MAX_NAMED)
    ticks = range(0, len(shown), step)
    side = 3.0 + 0.55 * min(len(shown), MAX_NUMBERED)
    figure, axes = _figure(side * len(panels) + 1.2, side, len(panels))
    figure.suptitle(title, fontsize=11)
    for axis, (name, (shares, cells)) in zip(axes, panels.items()):
        image = axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        axis.set_title(name, fontsize=10)
        axis.set_xticks(ticks, shown[::step], parse_math=False, **tilt)
        axis.set_yticks(ticks, shown[::step], parse_math=False)
        for (row, column), text in np.ndenumerate(cells if len(shown) <= MAX_NUMBERED else []):
            color = "white" if shares[row, column] > 0.55 else "black"
            size = 10 if len(shown) < 8 else 6
            axis.text(column, row, text, ha="center", va="center", color=color, fontsize=size)
    figure.colorbar(image, ax=list(axes), label=label, shrink=0.8, format="{x:.0%}")
    return figure


def confusion(path: Path, title: str, matrices: dict[str, list[list[int]]], classes: list[str]):
    """Confusion matrices side by side, as shares of the true class and rows; returns the figure."""
    panels = {}
    for name, matrix in matrices.items():
        counts = np.array(matrix)
        shares = counts / np.maximum(1, counts.sum(1, keepdims=True))
        panels[name] = shares, np.vectorize("{:.0%}\n{:,}".format)(shares, counts)
    figure = _heat_maps(title, panels, classes, "share of rows of the true class")
    figure.supxlabel("predicted class", fontsize=10)
    figure.supylabel("true class", fontsize=10)
    _save(figure, path)
    return figure


def overlap(path: Path, names: list[str], shares: np.ndarray, num_words: int) -> None:
    """Heat map of the shares of words in common, float [texts, texts] in 0..1."""
    title = f"Share of the {num_words:,} most frequent words\nthat two texts have in common"
    panels = {"without stop words": (shares, np.vectorize("{:.0%}".format)(shares))}
    _save(_heat_maps(title, panels, names, "shared words"), path)


def curves(
    path: Path, title: str, labels: tuple[str, str], series: dict, levels: dict, log_axis: str = ""
):
    """Curves, each (x, y, deviation of y or None), and horizontal lines, all by name; returns the
    figure. x is whole numbers.

    `labels` name the axes; `log_axis` is "x", "y" or ""."""
    figure, (axis,) = _figure(7, 4.4)
    axis.set_prop_cycle(color=COLORS, marker=MARKERS, linestyle=LINES)
    for number, (name, (x, y, deviation)) in enumerate(series.items()):
        plain = {"marker": ""} if len(x) > MAX_MARKED else {}
        if deviation is not None:  # error bars at the same x would overlap
            x = np.array(x) * (1 + 0.015 * number)
        axis.errorbar(x, y, deviation, label=name, capsize=3, **plain)
    for name, level in levels.items():
        axis.axhline(level, color="0.4", marker="", linestyle=(0, (1, 1)), label=name)
    numbers = "{x:,.10g}"  # no powers of ten
    places = sorted({place for x, _, _ in series.values() for place in x})
    axis.xaxis.get_major_locator().set_params(integer=True)  # steps or rows
    if len(places) == 1:
        margin = max(1, 0.1 * abs(places[0]))
        axis.set_xlim(places[0] - margin, places[0] + margin)
        axis.set_xticks(places)
        axis.xaxis.set_major_formatter(numbers)
    elif log_axis == "x":
        axis.set_xscale("log")
        axis.set_xticks(places)
        axis.set_xticks([], minor=True)
        axis.xaxis.set_major_formatter(numbers)
    if log_axis == "y":
        axis.set_yscale("log", subs=(2, 5))
        axis.yaxis.set(major_formatter=numbers, minor_formatter=numbers)
    axis.set(xlabel=labels[0], ylabel=labels[1])
    axis.set_title(title, fontsize=11)
    axis.grid(alpha=0.3)
    axis.legend()
    _save(figure, path)
    return figure
