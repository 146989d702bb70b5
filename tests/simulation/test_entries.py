"""What ``--compare`` names."""

from __future__ import annotations

from typing import Any

import pytest

from llm_engine.core.config import SchedulerConfig
from llm_engine.core.errors import ConfigError
from llm_engine.simulation.entries import parse_entries, resolved_names

PARTS = ("scheduler", "ordering", "capacity", "micro_batch")


@pytest.mark.parametrize(
    ("entry", "names"),
    [
        ("default", ("balanced", "fcfs", "max-utilization", "balanced")),
        ("fcfs", ("balanced", "fcfs", "max-utilization", "balanced")),
        ("greedy", ("balanced", "fcfs", "max-utilization", "greedy")),
        ("fair", ("balanced", "fair", "max-utilization", "balanced")),
        ("guaranteed-no-evict", ("balanced", "fcfs", "guaranteed-no-evict", "balanced")),
        ("fair+guaranteed-no-evict+greedy", ("balanced", "fair", "guaranteed-no-evict", "greedy")),
        ("greedy + deadline", ("balanced", "deadline", "max-utilization", "greedy")),
        ("ordering=some.module:Mine", ("balanced", "some.module:Mine", "max-utilization", "balanced")),
        ("scheduler=fair+micro-batch=greedy", ("fair", "fair", "max-utilization", "greedy")),
        ("some.module:Whole", ("some.module:Whole", None, None, None)),
    ],
)
def test_an_entry_stands_for_a_triple(entry: str, names: tuple[str | None, ...]) -> None:
    (config,) = parse_entries(entry, SchedulerConfig()).values()
    assert tuple(resolved_names(config, 4)[part] for part in PARTS) == names


def test_with_one_stage_the_usual_micro_batch_is_greedy() -> None:
    (config,) = parse_entries("fair", SchedulerConfig()).values()
    assert resolved_names(config, 1)["micro_batch"] == "greedy"


def test_parts_that_the_settings_name_are_everybodys() -> None:
    found = parse_entries("fair,greedy", SchedulerConfig(capacity="static-batch", max_num_seqs=9))
    assert [config.capacity for config in found.values()] == ["static-batch"] * 2
    assert [config.max_num_seqs for config in found.values()] == [9, 9]
    assert list(found) == ["fair", "greedy"]


def test_settings_and_options_are_of_one_entry() -> None:
    found = parse_entries("fcfs+max-num-seqs=7+schedule_ahead=false,priority+aging_s=5", SchedulerConfig())
    first, second = found.values()
    assert (first.max_num_seqs, first.schedule_ahead, first.scheduler_options) == (7, False, None)
    assert (second.max_num_seqs, second.scheduler_options) == (256, {"aging_s": "5"})


@pytest.mark.parametrize(
    ("entries", "settings", "said"),
    [
        ("farr", {}, "'farr' is none"),
        ("", {}, "'' is none"),
        ("fair,,greedy", {}, "'' is none"),
        ("fair+priority", {}, "one ordering; it names fair and priority"),
        ("fair,greedy,fair", {}, "each entry once; fair is there twice"),
        ("fair+max_num_seqs=0", {}, "max_num_seqs is 0"),
        ("fair+max_num_seqs=many", {}, "max_num_seqs is 'many'"),
        ("fair", {"scheduler": "greedy"}, "nothing beside compare"),
    ],
)
def test_what_cannot_be_is_refused(entries: str, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_entries(entries, SchedulerConfig(**settings))
