"""The picture: its stretch, its files, its colours where they belong."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread
from numpy.typing import NDArray

from llm_engine.core.errors import ConfigError
from llm_engine.core.trace import StepStats
from llm_engine.metrics.timeline import BUBBLE, DECODE, PREFILL, READABLE_STEPS, plot_timeline, readable_stretch
from tests.metrics.records import step


def steps(count: int, *, busy: float = 10.0, chunk: int = 0, num_stages: int = 2) -> list[StepStats]:
    """A step every 10, busy for as long as said on each stage, one behind the other."""
    return [
        step(n + 1, *((10.0 * (n + s), 10.0 * (n + s) + busy) for s in range(num_stages)), tokens=8, chunk=chunk)
        for n in range(count)
    ]


def share(path: Path, color: str) -> float:
    """Of the picture's pixels, those in this colour."""
    pixels: NDArray[np.float32] = imread(path)[..., :3]
    return float((np.abs(pixels - np.array(to_rgb(color))).max(axis=-1) < 0.02).mean())


def test_a_readable_stretch_is_the_middle_of_the_longest_load() -> None:
    first, second = steps(10), steps(1001)
    second = [replace(record, after_idle=record.step == 1) for record in second]
    begin, end = readable_stretch([*first, *second])
    assert (begin, end) == (4800.0, 4800.0 + 10.0 * READABLE_STEPS)
    assert readable_stretch(first) == (first[0].began_at, first[-1].retired_at)


def test_full_stages_show_no_bubble_and_half_empty_ones_do(tmp_path: Path) -> None:
    full, half = tmp_path / "full.png", tmp_path / "half.png"
    plot_timeline(steps(20), str(full), begin=20.0, end=180.0)
    plot_timeline(steps(20, busy=5.0), str(half), begin=20.0, end=180.0)
    assert share(full, DECODE) > 0.2
    assert share(full, BUBBLE) < 0.02
    assert share(half, BUBBLE) == pytest.approx(share(half, DECODE), rel=0.15)
    assert share(half, DECODE) == pytest.approx(share(full, DECODE) / 2, rel=0.1)


def test_decodes_and_prompt_chunks_share_a_bar_in_proportion(tmp_path: Path) -> None:
    path = tmp_path / "mixed.png"
    plot_timeline(steps(20, chunk=6), str(path), begin=20.0, end=180.0)
    assert share(path, PREFILL) == pytest.approx(3 * share(path, DECODE), rel=0.2)


def test_an_idle_engine_is_no_bubble(tmp_path: Path) -> None:
    records = [steps(1)[0], replace(steps(1)[0], step=2, after_idle=True, began_at=1000.0, retired_at=1030.0)]
    path = tmp_path / "idle.png"
    plot_timeline(records, str(path), begin=100.0, end=1030.0)
    assert 0.0 < share(path, BUBBLE) < 0.03


@pytest.mark.parametrize(("num_stages", "count"), [(1, 1), (2, 500), (100, 300)])
def test_any_number_of_stages_and_steps_is_drawn(tmp_path: Path, num_stages: int, count: int) -> None:
    path = tmp_path / "many.png"
    records = steps(count, num_stages=num_stages)
    plot_timeline(records, str(path), title="many", begin=records[0].began_at, end=records[-1].retired_at)
    assert share(path, DECODE) > 0.005


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_the_suffix_names_the_format(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    plot_timeline(steps(5), str(path))
    assert path.read_bytes()[:5].strip(b"\x89").startswith({"png": b"PNG", "svg": b"<?xml", "pdf": b"%PDF"}[suffix])


@pytest.mark.parametrize("name", ["picture.txt", "picture"])
def test_an_unknown_suffix_is_refused_with_the_known_ones(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"plot is .*; allowed: a file name that ends in one of .*pdf, .*png"):
        plot_timeline(steps(5), str(tmp_path / name))


def test_nothing_to_draw_is_refused(tmp_path: Path) -> None:
    for records in ([], [step(1, began=0.0)]):
        with pytest.raises(ConfigError, match="plot is"):
            plot_timeline(records, str(tmp_path / "a.png"))
    with pytest.raises(ConfigError, match="plot is"):
        plot_timeline(steps(5), str(tmp_path / "a.png"), begin=1e6, end=2e6)
