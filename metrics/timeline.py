"""A picture of a pipeline's timeline: what each stage computed when, and where it stood still.

Called by ``llm-engine trace`` and ``llm-engine simulate``. matplotlib is imported when a picture is drawn, not before.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Sequence
from typing import Any

from ..core.errors import ConfigError
from ..core.trace import StepStats
from .figures import new_figure
from .pipeline_load import split_loads
from .pipeline_report import report

READABLE_STEPS = 40
"""Micro-batches per picture that can still be told apart."""
MOST_NAMED = 32
"""Stages that are named one by one."""
DECODE, PREFILL, BUBBLE, HOST = "#4C78A8", "#F2A541", "#F7D4D4", "#8C8C8C"
_LABEL_SHARE = 0.015
"""Share of the width that a bar needs for its label."""


def plot_timeline(
    records: Iterable[StepStats],
    path: str,
    *,
    title: str = "",
    begin: float | None = None,
    end: float | None = None,
) -> None:
    """Draw the stretch from ``begin`` to ``end`` (on the records' clock) into a file; its suffix names the format.

        plot_timeline(trace.records, "timeline.png", title="13B, 4 stages, balanced")

    A lane per stage: a bar for each micro-batch, blue for decodes and orange for prompt chunks, in proportion to their
    tokens; pink where the stage stood still although the engine had requests; white where it had none. Below them the
    two threads' work (up to 32 stages), and the micro-batches in flight. The title gets each stage's busy ratio in that
    stretch. Without a stretch, ``readable_stretch`` chooses one. Raises ``ConfigError`` without matplotlib, for an
    unknown suffix and where there is nothing to draw; ``OSError`` where the file cannot be written.
    """
    records = list(records)
    if begin is None or end is None:
        chosen = readable_stretch(records)
        begin, end = chosen[0] if begin is None else begin, chosen[1] if end is None else end
    shown = [r for r in records if r.retired_at > begin and r.began_at < end]
    num_stages = max((len(r.busy) for r in shown), default=0)
    if not num_stages:
        raise ConfigError("plot", path, "steps with stage times in the stretch that is drawn")
    figure = new_figure(path, 14.0, min(1.9 + 0.46 * max(num_stages, 2), 12.0))
    lanes, flights = figure.subplots(
        2, 1, sharex=True, height_ratios=[max(num_stages, 2) + 0.9, 1.0 + 0.03 * num_stages]
    )
    scale, unit = (1e3, "ms") if end - begin < 10 else (1.0, "s")
    origin = records[0].began_at
    _draw_lanes(lanes, shown, num_stages, begin, end, lambda t: (t - origin) * scale)
    _draw_flights(flights, shown, lambda t: (t - origin) * scale)
    flights.set_xlim((begin - origin) * scale, (end - origin) * scale)
    flights.set_xlabel(f"{unit} since the first step")
    lanes.set_title("\n".join(filter(None, [title, _busy_words(records, begin, end)])), fontsize=10, loc="left")
    figure.savefig(path, dpi=130)


def readable_stretch(records: Sequence[StepStats], steps: int = READABLE_STEPS) -> tuple[float, float]:
    """(begin, end) around the middle of the longest load, so many micro-batches of it; all of it where it has fewer."""
    load = max(split_loads(records), key=len, default=[])
    if not load:
        return 0.0, 1.0
    if len(load) <= steps:
        return load[0].began_at, load[-1].retired_at
    first = (len(load) - steps) // 2
    chosen = load[first : first + steps]
    return _first_begin(chosen[0]), chosen[-1].busy[0][1] if chosen[-1].busy else chosen[-1].retired_at


def _draw_lanes(axes: Any, shown: list[StepStats], num_stages: int, begin: float, end: float, x: Any) -> None:
    """Lane 0 on top; thinner ones for the two threads at the bottom."""
    for load in split_loads(shown):
        left, right = x(max(load[0].began_at, begin)), x(min(load[-1].retired_at, end))
        lanes = [(left, stage - 0.4, right - left, 0.8) for stage in range(num_stages)]
        _add_bars(axes, lanes, BUBBLE, {"linewidth": 0})
    few = len(shown) <= 4 * READABLE_STEPS and num_stages <= MOST_NAMED
    edge = {"edgecolor": "white", "linewidth": 0.5} if few else {"linewidth": 0}
    for stage in range(num_stages):
        decodes, chunks = [], []
        for record in shown:
            if stage < len(record.busy):
                left, right = map(x, record.busy[stage])
                share = record.num_decodes / max(record.num_tokens, 1)
                decodes.append((left, stage + 0.4 - 0.8 * share, right - left, 0.8 * share))
                chunks.append((left, stage - 0.4, right - left, 0.8 * (1.0 - share)))
                if few and right - left > _LABEL_SHARE * (x(end) - x(begin)) and right <= x(end) and left >= x(begin):
                    label = {"ha": "center", "va": "center", "fontsize": 7, "color": "white"}
                    axes.text((left + right) / 2, stage, str(record.num_tokens), **label, clip_on=True)
        _add_bars(axes, decodes, DECODE, edge)
        _add_bars(axes, chunks, PREFILL, edge)
    ticks = {float(stage): f"stage {stage}" for stage in range(0, num_stages, -(-num_stages // MOST_NAMED))}
    if num_stages <= MOST_NAMED:
        threads = {"schedule": [(r.began_at, r.booked_at) for r in shown]}
        threads["update"] = [(r.update_at, r.retired_at) for r in shown]
        for height, (name, spans) in zip((num_stages - 0.25, num_stages + 0.1), threads.items(), strict=True):
            _add_bars(
                axes, [(x(b), height, x(e) - x(b), 0.25) for b, e in spans], HOST, {"edgecolor": HOST, "linewidth": 0.7}
            )
            ticks[height + 0.125] = name
    axes.set_yticks(list(ticks), list(ticks.values()), fontsize=8)
    axes.set_ylim(num_stages + 0.5, -0.55)
    axes.tick_params(axis="y", length=0)
    _add_legend(axes)


def _add_bars(axes: Any, bars: list[tuple[float, float, float, float]], color: str, edge: dict[str, Any]) -> None:
    """(left, top, width, height) of each."""
    from matplotlib.collections import PolyCollection

    corners = [[(a, b), (a, b + h), (a + w, b + h), (a + w, b)] for a, b, w, h in bars if w > 0 and h > 0]
    axes.add_collection(PolyCollection(corners, facecolors=color, **edge), autolim=False)


def _add_legend(axes: Any) -> None:
    from matplotlib.patches import Patch

    colors = {"decode": DECODE, "prefill": PREFILL, "bubble": BUBBLE}
    axes.legend(
        handles=[Patch(color=color, label=name) for name, color in colors.items()],
        loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=3, fontsize=8, frameon=False,
    )  # fmt: skip
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def _draw_flights(axes: Any, shown: list[StepStats], x: Any) -> None:
    booked, retired = sorted(r.booked_at for r in shown), sorted(r.retired_at for r in shown)
    times = sorted([*booked, *retired])
    counts = [bisect.bisect_right(booked, t) - bisect.bisect_right(retired, t) for t in times]
    axes.fill_between([x(t) for t in times], counts, step="post", color="#B8C9DB", linewidth=0)
    axes.set_ylim(0, max(counts) * 1.15)
    axes.locator_params(axis="y", integer=True, nbins=3)
    axes.set_ylabel("in flight", fontsize=8)
    axes.tick_params(labelsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _busy_words(records: list[StepStats], begin: float, end: float) -> str:
    ratios = [r for r in report(records, begin=begin, end=end).stage_busy if r is not None]
    if not ratios:
        return ""
    if len(ratios) > 8:
        return f"busy {100 * min(ratios):.0f} to {100 * max(ratios):.0f} % over {len(ratios)} stages"
    return "busy " + ", ".join(f"{100 * ratio:.1f} %" for ratio in ratios)


def _first_begin(record: StepStats) -> float:
    return record.busy[0][0] if record.busy else record.began_at
