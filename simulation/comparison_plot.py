"""A page that shows how schedulers differ on one workload."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from typing import Any

import numpy as np

from ..metrics.figures import new_figure
from .comparison import Compared, largest_group

COLORS = (
    "#4C78A8", "#F2A541", "#59A14F", "#E15759", "#9C6ADE", "#8C6D4F",
    "#D37295", "#76B7B2", "#8C8C8C", "#B6992D", "#2F4B7C",
)  # fmt: skip


def plot_comparison(compared: Sequence[Compared], path: str, *, title: str = "") -> None:
    """Draw the page into a file; its suffix names the format.

    Bars for what is one number a scheduler, curves for the share of requests (of tokens) that had to wait no longer.
    Raises ``ConfigError`` without matplotlib and for an unknown suffix, ``OSError`` where the file cannot be written.
    """
    figure = new_figure(path, 15.0, 3.6 + 2 * (1.5 + 0.24 * len(compared)))
    panels = iter(figure.subplots(2, 4).flat)
    names = [one.name for one in compared]
    colors = [color for color, _ in zip(cycle(COLORS), compared, strict=False)]

    def of(key: str) -> list[float]:
        return [one.figures[key] or 0.0 for one in compared]

    _bars(next(panels), "output tokens a second", names, colors, of("output_throughput"), "{:.0f}")
    _bars(next(panels), "good requests, %", names, colors, [100 * share for share in of("good_share")], "{:.0f}")
    _curves(next(panels), "time to first token, s", compared, colors, [one.run.ttfts for one in compared])
    _curves(next(panels), "between tokens, s", compared, colors, [one.run.itls for one in compared])
    groups = compared[0].figures["tenants"] or compared[0].figures["priorities"]
    if groups:
        _groups(next(panels), compared, names, colors)
    else:
        hits = [100 * rate for rate in of("prefix_hit_rate")]
        _bars(next(panels), "prompt tokens found in the cache, %", names, colors, hits, "{:.0f}")
    if compared[0].figures["fairness"] is not None:
        _bars(next(panels), "fairness (Jain's index)", names, colors, of("fairness"), "{:.2f}")
    else:
        whole = [value["p99"] for value in (one.figures["e2e_s"] for one in compared)]
        _bars(next(panels), "whole answer, p99, s", names, colors, whole, "{:.1f}")
    _bars(next(panels), "KV use, mean, %", names, colors, [100 * use for use in of("kv_usage_mean")], "{:.0f}")
    tokens = [one.figures["recomputed_tokens"] for one in compared]
    pauses = [f"{one.figures['preemptions']} pauses" for one in compared]
    _bars(next(panels), "tokens computed once more", names, colors, tokens, pauses)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=110)


def _bars(
    axes: Any, title: str, names: Sequence[str], colors: Sequence[str], values: Sequence[float], label: Any
) -> None:
    """One bar a scheduler, the first on top; ``label`` is a format, or a text for each."""
    rows = range(len(names))
    axes.barh(rows, values, color=colors, height=0.7)
    texts = [label.format(value) for value in values] if isinstance(label, str) else label
    for row, value, text in zip(rows, values, texts, strict=True):
        axes.text(value, row, f" {text}", va="center", fontsize=7)
    axes.set_xlim(0, max([*values, 1e-9]) * 1.25)
    _finish(axes, title, names)


def _groups(axes: Any, compared: Sequence[Compared], names: Sequence[str], colors: Sequence[str]) -> None:
    """Of the largest tenant, pale, and of the others; or of the lowest priority number, and of the others."""
    key = "tenants" if compared[0].figures["tenants"] else "priorities"
    groups = compared[0].figures[key]
    one = largest_group(groups) if key == "tenants" else min(groups, key=int)
    for row, (each, color) in enumerate(zip(compared, colors, strict=True)):
        found = each.figures[key]
        rest = max(found[name]["ttft_s"]["p99"] for name in found if name != one)
        for at, value, alpha in ((row - 0.19, rest, 1.0), (row + 0.19, found[one]["ttft_s"]["p99"], 0.45)):
            axes.barh(at, value, color=color, alpha=alpha, height=0.34)
            axes.text(value, at, f" {value:.2f}", va="center", fontsize=7)
    axes.set_xlim(0, axes.get_xlim()[1] * 1.15)
    _finish(axes, f"TTFT p99, s: worst of the others; pale: {key[:-3]}y {one}" if key == "priorities" else
            f"TTFT p99, s: worst of the others; pale: {one}", names)  # fmt: skip


def _curves(
    axes: Any, title: str, compared: Sequence[Compared], colors: Sequence[str], samples: Sequence[Sequence[float]]
) -> None:
    """The share of the values that each value is not exceeded by."""
    for one, color, values in zip(compared, colors, samples, strict=True):
        ranked = np.sort(np.asarray(values, dtype=np.float64))
        if len(ranked) > 2000:
            ranked = ranked[np.linspace(0, len(ranked) - 1, 2000).astype(int)]
        axes.step(
            ranked, np.arange(1, len(ranked) + 1) / max(len(ranked), 1), color=color, linewidth=1.3, label=one.name
        )
    if any(len(values) for values in samples):
        axes.set_xscale("log")
    axes.set_ylim(0, 1.02)
    axes.grid(alpha=0.25)
    axes.tick_params(labelsize=7)
    axes.set_title(title, fontsize=9, loc="left")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _finish(axes: Any, title: str, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="x", labelsize=7)
    axes.tick_params(axis="y", length=0)
    axes.set_title(title, fontsize=9, loc="left")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
