"""Plots as PNG files, each a function of plain data.

Drawn through matplotlib's objects without pyplot: no global state, so a training in a notebook does not disturb the user's own figures.
Texts are ASCII: matplotlib's own font has no Chinese, and a label that it cannot draw is replaced by its number in the per-class table.
matplotlib is imported inside the functions because that takes a second.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from groundup.core import files

Row = dict[str, Any]

# Okabe and Ito's colours: told apart by colour-blind readers and in grey print.
BLUE, ORANGE, GREEN, GREY = "#0072b2", "#d55e00", "#009e73", "#8a8f98"
NAMED_CLASSES = 30  # more than this many names on an axis cannot be read
COUNTED_CLASSES = 20  # nor more than this many numbers in a row of the confusion matrix


def _figure(width: float, height: float, *, plain: bool = False) -> Any:
    """A figure in inches. `plain`: numbers on both axes and nothing else; its margins are known, and fitting them would take as long as drawing."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout=None if plain else "constrained", facecolor="white")
    if plain:
        figure.subplots_adjust(left=0.75 / width, right=1 - 0.12 / width, bottom=0.5 / height, top=1 - 0.32 / height, hspace=0.15)
    FigureCanvasAgg(figure)
    return figure


def _axes(place: Any, *, title: str = "", x: str = "step", y: str = "") -> Any:
    """Styles axes that exist: quiet lines, the title at the left."""
    place.set_title(title, loc="left", fontsize=10, fontweight="bold", color="#22262e", parse_math=False)
    place.set_xlabel(x, fontsize=8.5, color="#555b66")
    place.set_ylabel(y, fontsize=8.5, color="#555b66", parse_math=False)
    place.tick_params(labelsize=8, colors="#555b66", length=3)
    for side in ("top", "right"):
        place.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        place.spines[side].set_color("#c3c8d0")
    if x == "step":
        place.xaxis.get_major_locator().set_params(integer=True)  # there is no step 2.5
    place.set_axisbelow(True)
    place.grid(axis="y", color="#e6e8ec", linewidth=0.7)
    return place


def _save(figure: Any, path: Path) -> Path:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    files.write_bytes(path, buffer.getvalue())
    return path


def series(rows: Sequence[Row], key: str) -> tuple[list[float], list[float]]:
    """Steps and values of one column. A step that was trained twice (after a resume) counts once, with its last value."""
    last = {r["step"]: r[key] for r in rows if isinstance(r.get(key), int | float)}
    steps = sorted(last)
    return [float(s) for s in steps], [float(last[s]) for s in steps]


def smoothed(values: Sequence[float], window: int) -> list[float]:
    """The exponential average of a noisy curve, corrected for its start (as Adam's moments are)."""
    average, weight, out = 0.0, 0.0, []
    decay = 1 - 2 / (window + 1)
    for value in values:
        if math.isfinite(value):
            average, weight = decay * average + (1 - decay) * value, decay * weight + 1 - decay
        out.append(average / weight if weight else math.nan)
    return out


def _wide_range(values: Sequence[float]) -> bool:
    """Whether a logarithmic axis shows more."""
    finite = [v for v in values if math.isfinite(v)]
    return len(finite) > 2 and min(finite) > 0 and max(finite) > 30 * min(finite)


def _mark_best(axes: Any, steps: Sequence[float], values: Sequence[float], best_step: int | None) -> None:
    if best_step is None or best_step not in steps:
        return
    value = values[list(steps).index(best_step)]
    axes.axvline(best_step, color=GREEN, linewidth=0.9, linestyle=(0, (3, 3)), zorder=1)
    axes.plot([best_step], [value], "o", color=GREEN, markersize=6, zorder=5, label=f"kept: step {best_step}, {value:.4g}")


def _legend(axes: Any) -> None:
    axes.legend(fontsize=8, frameon=False, labelcolor="#22262e")


def _curve(axes: Any, rows: Sequence[Row], key: str, *, color: str, label: str) -> list[float]:
    """A line; with many points the raw values pale and their average over it."""
    steps, values = series(rows, key)
    if not steps:
        return []
    few = len(steps) <= 60
    axes.plot(steps, values, color=color, linewidth=1.6 if few else 0.8, alpha=1.0 if few else 0.3, label=label if few else None,
              marker="o" if len(steps) == 1 else None, markersize=4)  # fmt: skip
    if not few:
        axes.plot(steps, smoothed(values, max(3, len(steps) // 40)), color=color, linewidth=1.6, label=f"{label} (smoothed)")
    return values


def loss_curve(path: Path, train: Sequence[Row], evaluation: Sequence[Row], best_step: int | None = None) -> Path:
    """Training and validation loss over steps, the step of the kept weights marked."""
    figure = _figure(5.2, 3.1, plain=True)
    axes = _axes(figure.subplots(), title="Loss")
    values = _curve(axes, train, "loss", color=BLUE, label="training")
    steps, checked = series(evaluation, "loss")
    if steps:
        axes.plot(steps, checked, color=ORANGE, linewidth=1.6, marker="o", markersize=3 if len(steps) <= 40 else 0, label="validation")
        _mark_best(axes, steps, checked, best_step)
    if _wide_range([*values, *checked]):
        axes.set_yscale("log")
    _legend(axes)
    return _save(figure, path)


def metric_curve(path: Path, evaluation: Sequence[Row], metric: str, best_step: int | None = None) -> Path:
    """The chosen metric on the validation split over steps."""
    figure = _figure(5.2, 3.1, plain=True)
    axes = _axes(figure.subplots(), title=f"Validation {_plain(metric) or 'metric'}")
    steps, values = series(evaluation, metric)
    axes.plot(steps, values, color=ORANGE, linewidth=1.6, marker="o", markersize=3.5 if len(steps) <= 40 else 0)
    _mark_best(axes, steps, values, best_step)
    if _wide_range(values):
        axes.set_yscale("log")
    if axes.get_legend_handles_labels()[1]:
        _legend(axes)
    return _save(figure, path)


def reliability(path: Path, calibration: dict[str, Any]) -> Path:
    """Share of right answers over confidence; the diagonal is perfect calibration, the bars below show where the records are."""
    figure = _figure(4.2, 3.9, plain=True)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    bins = len(calibration["records"])
    used = [i for i in range(bins) if calibration["records"][i]]
    middle = [(i + 0.5) / bins for i in range(bins)]
    _axes(above, title="Calibration", x="", y="share right")
    above.plot([0, 1], [0, 1], color=GREY, linewidth=0.9, linestyle=(0, (3, 3)))
    above.bar([middle[i] for i in used], [calibration["accuracy"][i] for i in used], width=0.9 / bins, color=BLUE, alpha=0.35)
    above.plot(
        [calibration["confidence"][i] for i in used],
        [calibration["accuracy"][i] for i in used],
        "o-",
        color=BLUE,
        markersize=3.5,
        linewidth=1.2,
    )
    above.set_xlim(0, 1)
    above.set_ylim(0, 1.02)
    _axes(below, x="confidence", y="records")
    below.bar(middle, calibration["records"], width=0.9 / bins, color=GREY)
    return _save(figure, path)


def learning_rate(path: Path, train: Sequence[Row]) -> Path:
    """The schedule as it was; never smoothed."""
    figure = _figure(5.2, 2.5, plain=True)
    axes = _axes(figure.subplots(), title="Learning rate")
    steps, values = series(train, "lr")
    axes.plot(steps, values, color=GREEN, linewidth=1.6, marker="o" if len(steps) == 1 else None)
    axes.set_ylim(bottom=0)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useMathText=False)
    axes.yaxis.get_offset_text().set_fontsize(7.5)
    return _save(figure, path)


def gradient_norm(path: Path, train: Sequence[Row]) -> Path:
    """The norm of the whole gradient before clipping."""
    figure = _figure(5.2, 2.5, plain=True)
    axes = _axes(figure.subplots(), title="Gradient norm")
    if _wide_range(_curve(axes, train, "grad_norm", color=BLUE, label="")):
        axes.set_yscale("log")
    return _save(figure, path)


def _plain(text: str, length: int = 16) -> str | None:
    """The text if it can be drawn on an axis, cut to a readable length; None where it cannot."""
    text = str(text)
    if not (text.isascii() and text.isprintable() and text.strip()):
        return None
    return text if len(text) <= length else text[: length - 2] + ".."


def _class_ticks(classes: Sequence[str]) -> tuple[list[str], bool]:
    """Names for an axis, and whether they are the classes' own; else numbers from 1, as in the per-class table."""
    names = [_plain(c) for c in classes]
    shown = [n for n in names if n is not None]
    if len(classes) <= NAMED_CLASSES and len(set(shown)) == len(classes):
        return shown, True
    return [str(i + 1) for i in range(len(classes))], False


def confusion_matrix(path: Path, classes: Sequence[str], matrix: Sequence[Sequence[int]]) -> Path:
    """Rows are true classes; the colour is the share of its row. Counts are written for up to 20 classes."""
    from matplotlib.colors import PowerNorm

    n = len(classes)
    names, own = _class_ticks(classes)
    share = [[v / max(sum(row), 1) for v in row] for row in matrix]
    longest = max(len(t) for t in names)
    size = min(10.0, max(3.6, 2.2 + 0.33 * n)) if n <= NAMED_CLASSES else 8.6
    figure = _figure(size + 0.8 + 0.05 * longest, size + 0.05 * longest)
    axes = figure.subplots()
    # The root lifts small shares: one error in a hundred is what one looks for, and on a linear scale it is white.
    image = axes.imshow(share, cmap="Blues", norm=PowerNorm(0.5, 0, 1), interpolation="nearest")
    _axes(axes, title="Confusion matrix", x="predicted" + ("" if own else " (class number)"), y="true" + ("" if own else " (class number)"))
    axes.grid(False)
    every = 1 if n <= NAMED_CLASSES else 5
    ticks = [i for i in range(n) if every == 1 or i == 0 or (i + 1) % every == 0]
    turned = 0 if max(len(t) for t in names) <= 3 else 45
    axes.set_xticks(
        ticks, [names[i] for i in ticks], rotation=turned, ha="right" if turned else "center", rotation_mode="anchor", parse_math=False
    )
    axes.set_yticks(ticks, [names[i] for i in ticks], parse_math=False)
    if turned == 0:
        axes.tick_params(axis="x", rotation=0)
        for label in axes.get_xticklabels():
            label.set_va("top")
    if n <= COUNTED_CLASSES:
        for i, row in enumerate(matrix):
            for j, count in enumerate(row):
                if count:
                    axes.text(
                        j,
                        i,
                        _short(count),
                        ha="center",
                        va="center",
                        fontsize=9 if n <= 12 else 7,
                        color="white" if share[i][j] > 0.4 else "#22262e",
                    ).set_in_layout(False)  # it lies inside the axes: measuring a hundred of them takes half a second
    bar = figure.colorbar(image, ax=axes, shrink=0.75, pad=0.02, ticks=[0, 0.01, 0.1, 0.25, 0.5, 1])
    bar.ax.set_yticklabels(["0", "1 %", "10 %", "25 %", "50 %", "100 %"])
    bar.ax.tick_params(labelsize=7.5, colors="#555b66", length=2)
    bar.outline.set_visible(False)
    return _save(figure, path)


def _short(count: int) -> str:
    return str(count) if count < 10_000 else f"{count / 1000:.0f}k" if count < 1_000_000 else f"{count / 1e6:.1f}M"


def class_bars(path: Path, per_class: dict[str, dict[str, float]]) -> Path:
    """Precision, recall and F1 of each class; many classes are sorted by F1, so that the weak ones stand together at the left."""
    n = len(per_class)
    names, own = _class_ticks(list(per_class))
    rows = list(zip(names, per_class.values()))
    many = n > COUNTED_CLASSES
    if many:
        rows.sort(key=lambda r: r[1]["f1"])
    figure = _figure(max(5.2, min(11.0, 1.5 + (0.125 if many else 0.38) * n)), 3.1 if not own or n <= 12 else 3.5)
    axes = _axes(figure.subplots(), title="By class" + (", lowest F1 first" if many else ""), x="class" if own else "class number")
    at = range(n)
    if many:
        axes.bar(at, [r["f1"] for _, r in rows], width=0.8, color="#9cc3dc", label="F1")
        axes.plot(at, [r["precision"] for _, r in rows], "^", color=ORANGE, markersize=3, label="precision")
        axes.plot(at, [r["recall"] for _, r in rows], "v", color=GREEN, markersize=3, label="recall")
    else:
        for k, (key, color) in enumerate((("precision", ORANGE), ("recall", GREEN), ("f1", BLUE))):
            axes.bar(
                [i + (k - 1) * 0.27 for i in at], [r[key] for _, r in rows], width=0.25, color=color, label="F1" if key == "f1" else key
            )
    turned = 90 if many else 0 if max(len(t) for t in names) <= (4 if n > 8 else 9) else 35
    axes.set_xticks(list(at), [t for t, _ in rows], rotation=turned, ha="right" if turned == 35 else "center", fontsize=5.5 if many and n > 50 else 7.5,
                    parse_math=False)  # fmt: skip
    axes.set_xlim(-0.6, n - 0.4)
    axes.set_ylim(0, 1.0)
    axes.legend(fontsize=8, frameon=False, ncols=3, loc="lower right", bbox_to_anchor=(1, 1.0), borderaxespad=0.1, labelcolor="#22262e")
    return _save(figure, path)


def before_after(path: Path, rows: Sequence[Row]) -> Path:
    """One panel for each row: the base and the tuned model with the whiskers of their 95 % intervals."""
    figure = _figure(max(3.4, 2.6 * len(rows)), 2.9)
    panels = figure.subplots(1, len(rows), squeeze=False)[0]
    for axes, row in zip(panels, rows):
        _axes(axes, title=_plain(row.get("what", ""), 24) or "", x="", y=_plain(row.get("metric", "")) or "")
        values = [row.get("before"), row.get("after")]
        pairs = [row.get("before_interval"), row.get("after_interval")]
        for i, (value, pair, color) in enumerate(zip(values, pairs, (GREY, BLUE))):
            if value is None or not math.isfinite(value):
                axes.text(i, 0.02, "n/a", transform=axes.get_xaxis_transform(), ha="center", fontsize=9, color="#555b66")
                continue
            axes.bar(i, value, width=0.62, color=color)
            top = value
            if pair and all(p is not None and math.isfinite(p) for p in pair):
                top = max(value, pair[1])
                axes.errorbar(
                    i, value, yerr=[[max(0.0, value - pair[0])], [max(0.0, pair[1] - value)]], color="#22262e", capsize=5, linewidth=1.2
                )
            axes.annotate(
                f"{value:.4g}", (i, max(top, 0)), xytext=(0, 4), textcoords="offset points", ha="center", fontsize=9, color="#22262e"
            )
        axes.set_xticks([0, 1], ["before", "after"])
        axes.set_xlim(-0.6, 1.6)
        axes.margins(y=0.18)
        axes.axhline(0, color="#c3c8d0", linewidth=0.8)
    return _save(figure, path)
