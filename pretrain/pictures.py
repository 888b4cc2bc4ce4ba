"""Pictures made for reading: titles that say what is seen, units, colours and markers that survive a black-and-white print."""
from __future__ import annotations

from pathlib import Path

import numpy as np

from pretrain.command import require
from pretrain.data.tokenizer import is_unspaced

# Dark to light, so that they differ in grey, too (Okabe and Ito's palette, safe for the colour-blind), each with a marker and a line.
STYLES = [("#0072B2", "o", "-"), ("#D55E00", "s", "--"), ("#009E73", "^", "-."), ("#CC79A7", "D", ":"), ("#E69F00", "v", "-")]
CHINESE_FONTS = ("Noto Sans CJK SC", "Noto Sans CJK JP", "Source Han Sans SC", "WenQuanYi Zen Hei", "WenQuanYi Micro Hei", "SimHei",
                 "Microsoft YaHei", "PingFang SC", "Arial Unicode MS")
MAX_NUMBERED, MAX_NAMED = 30, 60  # classes up to which the cells of a matrix hold numbers, and its sides all names


def _chinese_fonts() -> list[str]:
    from matplotlib import font_manager

    installed = {font.name for font in font_manager.fontManager.ttflist}
    return [name for name in CHINESE_FONTS if name in installed]


def _figure(width: float, height: float, columns: int = 1):
    """(figure, axes) without a window, with a font that has Chinese characters where one is installed."""
    require("matplotlib", "pictures")
    from matplotlib import rcParams
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rcParams["font.family"] = ["DejaVu Sans", *_chinese_fonts()]
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def _matrix(axis, values: np.ndarray, shown: np.ndarray, names: list[str]):
    """A table in shades of blue; `values` within 0..1 give the shade, `shown` is written into the cells."""
    image = axis.imshow(values, cmap="Blues", vmin=0, vmax=1)
    if any(map(is_unspaced, "".join(names))) and not _chinese_fonts():
        print("pictures number what has a Chinese name: no font with Chinese characters is installed, such as Noto Sans CJK")
        names = [f"{number}" if any(map(is_unspaced, name)) else name for number, name in enumerate(names, start=1)]
    is_wide = max(map(len, names)) * len(names) > 30
    step = -(-len(names) // MAX_NAMED)
    named, places = names[::step], range(0, len(names), step)
    axis.set_xticks(places, named, rotation=45 if is_wide else 0, ha="right" if is_wide else "center", parse_math=False)
    axis.set_yticks(places, named, parse_math=False)
    if len(names) <= MAX_NUMBERED:
        for (row, column), text in np.ndenumerate(shown):
            axis.text(column, row, text, ha="center", va="center", color="white" if values[row, column] > 0.55 else "black",
                      fontsize=10 if len(names) < 8 else 6)
    return image


def confusion(path: Path, title: str, matrices: dict[str, list[list[int]]], classes: list[str]) -> None:
    """Confusion matrices side by side, by name: shares of each true class, and how many rows that is."""
    side = 2.6 + 0.55 * min(len(classes), MAX_NUMBERED)
    figure, axes = _figure(side * len(matrices) + 1.2, side + 0.3, len(matrices))
    figure.suptitle(title, fontsize=11)
    for axis, (name, matrix) in zip(axes, matrices.items()):
        counts = np.array(matrix)
        shares = counts / np.maximum(1, counts.sum(1, keepdims=True))
        shown = np.array([[f"{share:.0%}\n{count:,}" for share, count in zip(*row)] for row in zip(shares, counts)])
        image = _matrix(axis, shares, shown, classes)
        axis.set(xlabel="predicted class", ylabel="true class")
        axis.set_title(name, fontsize=10)
    figure.colorbar(image, ax=list(axes), label="share of the true class's rows", shrink=0.8, format="{x:.0%}")
    figure.savefig(path)


def overlap(path: Path, names: list[str], shares: np.ndarray, num_words: int) -> None:
    """Heat map of the vocabulary overlap; `shares` float [texts, texts] within 0..1."""
    side = 3.2 + 0.6 * len(names)
    figure, (axis,) = _figure(side + 1.2, side)
    image = _matrix(axis, shares, np.array([[f"{share:.0%}" for share in row] for row in shares]), names)
    axis.set_title(f"How many of their {num_words:,} most frequent words\ntwo texts share (stop words left out)", fontsize=11)
    figure.colorbar(image, ax=axis, label="shared words", shrink=0.8, format="{x:.0%}")
    figure.savefig(path)


def curves(path: Path, title: str, x_label: str, y_label: str, series: dict[str, tuple[list[float], list[float], list[float] | None]],
           logarithmic: str = "", flat: dict[str, float] | None = None) -> None:
    """Curves in one chart: name -> (x, y, deviation of y or None); `flat` draws levels; `logarithmic` names axes, "x", "y" or "xy"."""
    figure, (axis,) = _figure(7, 4.4)
    for number, ((name, (x, y, deviation)), (colour, marker, line)) in enumerate(zip(series.items(), STYLES)):
        beside = np.array(x) * (1.0 if deviation is None else 1 + 0.015 * number)  # bars that would hide one another
        axis.errorbar(beside, y, deviation, label=name, color=colour, marker=marker if len(x) <= 30 else None, linestyle=line, capsize=3)
    for name, level in (flat or {}).items():
        axis.axhline(level, color="0.4", linestyle=(0, (1, 1)), label=name)
    for letter in logarithmic:
        from matplotlib.ticker import FuncFormatter, LogLocator

        getattr(axis, f"set_{letter}scale")("log")
        plain = FuncFormatter(lambda value, _: f"{value:,.10g}")
        getattr(axis, f"{letter}axis").set(major_formatter=plain, minor_formatter=plain, minor_locator=LogLocator(subs=(2, 5)))
        if letter == "x":
            axis.set_xticks(sorted({place for x, _, _ in series.values() for place in x}))
            axis.set_xticks([], minor=True)
    axis.set(xlabel=x_label, ylabel=y_label)
    axis.set_title(title, fontsize=11)
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path)
