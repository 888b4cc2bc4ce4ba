"""Pictures made for reading: titles that say what is seen, units, colours and markers that survive a black-and-white print."""
from __future__ import annotations

from pathlib import Path

import numpy as np

from pretrain.command import require

# Dark to light, so that they differ in grey, too (Okabe and Ito's palette, safe for the colour-blind), each with a marker and a line.
STYLES = [("#0072B2", "o", "-"), ("#D55E00", "s", "--"), ("#009E73", "^", "-."), ("#CC79A7", "D", ":"), ("#E69F00", "v", "-")]
CHINESE_FONTS = ("Noto Sans CJK SC", "Noto Sans CJK JP", "Source Han Sans SC", "WenQuanYi Zen Hei", "WenQuanYi Micro Hei", "SimHei",
                 "Microsoft YaHei", "PingFang SC", "Arial Unicode MS")
MAX_NUMBERED = 30  # classes up to which the cells of a matrix hold numbers


def _figure(width: float, height: float, columns: int = 1):
    """(figure, axes) without a window, with a font that has Chinese characters where one is installed."""
    require("matplotlib", "pictures")
    from matplotlib import font_manager, rcParams
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    installed = {font.name for font in font_manager.fontManager.ttflist}
    rcParams["font.family"] = ["DejaVu Sans", *(name for name in CHINESE_FONTS if name in installed)]
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def _matrix(axis, values: np.ndarray, shown: np.ndarray, rows: list[str], columns: list[str]):
    """A table in shades of blue; `values` within 0..1 give the shade, `shown` is written into the cells."""
    image = axis.imshow(values, cmap="Blues", vmin=0, vmax=1)
    axis.set_xticks(range(len(columns)), columns, rotation=45 if max(map(len, columns)) * len(columns) > 24 else 0,
                    ha="right" if max(map(len, columns)) * len(columns) > 24 else "center")
    axis.set_yticks(range(len(rows)), rows)
    if len(rows) <= MAX_NUMBERED:
        for (row, column), text in np.ndenumerate(shown):
            axis.text(column, row, text, ha="center", va="center", color="white" if values[row, column] > 0.55 else "black",
                      fontsize=10 if len(rows) < 8 else 6)
    return image


def confusion(path: Path, matrices: dict[str, list[list[int]]], classes: list[str]) -> None:
    """Confusion matrices side by side, by title: shares of each true class, and how many rows that is."""
    side = 2.6 + 0.55 * min(len(classes), MAX_NUMBERED)
    figure, axes = _figure(side * len(matrices) + 1.2, side, len(matrices))
    for axis, (title, matrix) in zip(axes, matrices.items()):
        counts = np.array(matrix)
        shares = counts / np.maximum(1, counts.sum(1, keepdims=True))
        shown = np.array([[f"{share:.0%}\n{count:,}" for share, count in zip(*row)] for row in zip(shares, counts)])
        image = _matrix(axis, shares, shown, classes, classes)
        axis.set(xlabel="predicted class", ylabel="true class")
        axis.set_title(title, fontsize=11, wrap=True)
    figure.colorbar(image, ax=list(axes), label="share of the true class's rows", shrink=0.8, format="{x:.0%}")
    figure.savefig(path)


def overlap(path: Path, names: list[str], shares: np.ndarray, num_words: int) -> None:
    """Heat map of the vocabulary overlap; `shares` float [texts, texts] within 0..1."""
    side = 3.2 + 0.6 * len(names)
    figure, (axis,) = _figure(side + 1.2, side)
    image = _matrix(axis, shares, np.array([[f"{share:.0%}" for share in row] for row in shares]), names, names)
    axis.set_title(f"How many of their {num_words:,} most frequent words\ntwo texts share (stop words left out)", fontsize=11)
    figure.colorbar(image, ax=axis, label="shared words", shrink=0.8, format="{x:.0%}")
    figure.savefig(path)


def curves(path: Path, title: str, x_label: str, y_label: str, series: dict[str, tuple[list[float], list[float], list[float] | None]],
           logarithmic: str = "", flat: dict[str, float] | None = None) -> None:
    """Curves in one chart: name -> (x, y, deviation of y or None); `flat` draws levels; `logarithmic` names axes, "x", "y" or "xy"."""
    figure, (axis,) = _figure(7, 4.4)
    for (name, (x, y, deviation)), (colour, marker, line) in zip(series.items(), STYLES):
        axis.errorbar(x, y, deviation, label=name, color=colour, marker=marker if len(x) <= 30 else None, linestyle=line, capsize=3)
    for name, level in (flat or {}).items():
        axis.axhline(level, color="0.4", linestyle=(0, (1, 1)), label=name)
    for letter in logarithmic:
        getattr(axis, f"set_{letter}scale")("log")
        from matplotlib.ticker import FuncFormatter, NullFormatter
        of = getattr(axis, f"{letter}axis")
        of.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
        if letter == "x":
            of.set_ticks(sorted({place for x, _, _ in series.values() for place in x}))
            of.set_minor_formatter(NullFormatter())
    axis.set(xlabel=x_label, ylabel=y_label)
    axis.set_title(title, fontsize=11)
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path)
