"""Where stages compute: cores shared out, and what is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_engine.core.config import ParallelConfig
from llm_engine.core.errors import ConfigError
from llm_engine.workers.placement import Core, StagePlacement, place_stages, read_cores, show_cpus, stage_device


def cores(*nodes: int, threads: int = 1) -> list[Core]:
    """So many cores on each node, numbered as systems do: all cores' first hardware threads, then all second ones."""
    total = sum(nodes)
    owners = [node for node, count in enumerate(nodes) for _ in range(count)]
    return [Core(frozenset(range(index, threads * total, total)), node) for index, node in enumerate(owners)]


def place(cores: Sequence[Core], num_stages: int, **settings: Any) -> list[tuple[int | None, set[int] | None]]:
    placed = place_stages(ParallelConfig(pipeline_parallel_size=num_stages, **settings), cores)
    return [(stage.num_threads, None if stage.cpus is None else set(stage.cpus)) for stage in placed]


def test_one_stage_is_left_alone() -> None:
    assert place(cores(8), 1) == [(None, None)]
    assert place(cores(8), 1, cpu_threads=3) == [(3, None)]


def test_cores_are_shared_out_evenly_neighbours_together() -> None:
    assert place(cores(2), 2) == [(1, {0}), (1, {1})]
    assert place(cores(8), 2) == [(4, {0, 1, 2, 3}), (4, {4, 5, 6, 7})]


def test_what_does_not_divide_is_left_to_the_engine() -> None:
    assert place(cores(5), 2) == [(2, {0, 1}), (2, {2, 3})]


def test_hardware_threads_of_a_core_stay_together_and_count_once() -> None:
    assert place(cores(4, threads=2), 2) == [(2, {0, 4, 1, 5}), (2, {2, 6, 3, 7})]


def test_stages_share_cores_only_where_there_are_too_few() -> None:
    assert place(cores(2, threads=2), 3) == [(1, {0}), (1, {1}), (1, {2})]


def test_fewer_cpus_than_stages_are_left_to_the_system() -> None:
    assert place(cores(2), 4) == [(1, None)] * 4


def test_stages_stay_within_a_node() -> None:
    assert place(cores(8, 8), 2) == [(8, set(range(8))), (8, set(range(8, 16)))]
    # An even share of 5 would leave the second stage on both nodes.
    assert place(cores(8, 8), 3) == [(4, {0, 1, 2, 3}), (4, {4, 5, 6, 7}), (4, {8, 9, 10, 11})]


def test_stages_cross_nodes_where_staying_would_cost_too_much() -> None:
    assert [len(cpus or ()) for _, cpus in place(cores(4, 4, 4), 2)] == [6, 6]


def test_nodes_are_told_apart_however_cpus_are_numbered() -> None:
    interleaved = [Core(frozenset([cpu]), cpu % 2) for cpu in range(8)]
    assert place(interleaved, 2) == [(4, {0, 2, 4, 6}), (4, {1, 3, 5, 7})]


def test_threads_that_are_set_are_taken() -> None:
    assert place(cores(8), 2, cpu_threads=2) == [(2, {0, 1, 2, 3}), (2, {4, 5, 6, 7})]
    assert place(cores(2, threads=2), 2, cpu_threads=2) == [(2, {0, 2}), (2, {1, 3})]


def test_more_threads_than_cpus_are_not_pinned() -> None:
    assert place(cores(2), 2, cpu_threads=2) == [(2, None)] * 2


def test_none_pins_nothing() -> None:
    assert place(cores(8), 2, stage_cpus="none") == [(4, None)] * 2
    assert place(cores(8), 2, stage_cpus="none", cpu_threads=1) == [(1, None)] * 2


def test_given_cpus_are_taken() -> None:
    assert place(cores(4, threads=2), 2, stage_cpus="0,4;1-3") == [(1, {0, 4}), (3, {1, 2, 3})]
    assert place(cores(4), 3, stage_cpus="0;0;1", cpu_threads=2) == [(2, {0}), (2, {0}), (2, {1})]
    assert place(cores(4), 1, stage_cpus="2-3") == [(2, {2, 3})]


def test_cpus_that_may_not_be_used_are_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        place(cores(4), 2, stage_cpus="0;4")
    error = caught.value
    assert (error.field, error.value, error.allowed) == ("stage_cpus", "0;4", "CPUs this process may use: 0-3")


@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(1, 3), st.integers(2, 12))
def test_shares_are_equal_disjoint_and_never_a_core_more_than_even(
    nodes: list[int], threads: int, num_stages: int
) -> None:
    machine = cores(*nodes, threads=threads)
    placed = place(machine, num_stages)
    groups = [cpus for _, cpus in placed if cpus is not None]
    assert len(placed) == num_stages
    assert len({num_threads for num_threads, _ in placed}) == 1
    if len(machine) * threads < num_stages:
        assert not groups
        return
    assert len(groups) == num_stages
    assert len({len(group) for group in groups}) == 1
    assert len(set().union(*groups)) == sum(map(len, groups))
    if len(machine) >= num_stages:
        assert placed[0][0] is not None
        assert 0.75 * (len(machine) // num_stages) <= placed[0][0] <= len(machine) // num_stages
        assert all(core.cpus <= group or not core.cpus & group for core in machine for group in groups)


def test_devices() -> None:
    parallel = ParallelConfig(pipeline_parallel_size=3)
    assert [stage_device(parallel, stage, 2) for stage in range(3)] == [0, 1, 0]
    parallel = ParallelConfig(pipeline_parallel_size=3, stage_devices="1,1,0")
    assert [stage_device(parallel, stage, 2) for stage in range(3)] == [1, 1, 0]
    with pytest.raises(ConfigError, match="stage_devices is '1,1,0'; allowed: 0, the only device there is"):
        stage_device(parallel, 2, 1)


def make_system(root: Path, siblings: dict[int, str], nodes: dict[int, str]) -> Path:
    for cpu, text in siblings.items():
        folder = root / f"cpu/cpu{cpu}/topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(text + "\n")
    for node, text in nodes.items():
        folder = root / f"node/node{node}"
        folder.mkdir(parents=True)
        (folder / "cpulist").write_text(text + "\n")
    return root


def test_cores_are_read_from_the_system(tmp_path: Path) -> None:
    pairs = {0: "0,2", 2: "0,2", 1: "1,3", 3: "1,3"}
    root = make_system(tmp_path, pairs, {0: "0,2", 1: "1,3", 7: ""})
    assert read_cores(range(4), root) == [Core(frozenset({0, 2}), 0), Core(frozenset({1, 3}), 1)]
    assert read_cores([3, 2, 1], root) == [Core(frozenset({1, 3}), 1), Core(frozenset({2}), 0)]


def test_a_system_that_says_nothing_has_plain_cores(tmp_path: Path) -> None:
    assert read_cores([1, 0], tmp_path) == [Core(frozenset({0})), Core(frozenset({1}))]


def test_this_machines_cores_are_the_cpus_of_this_process() -> None:
    found = read_cores()
    assert sorted(cpu for core in found for cpu in core.cpus) == sorted(os.sched_getaffinity(0))
    assert place_stages(ParallelConfig(), found) == [StagePlacement(None, None)]


def test_cpus_are_shown_as_they_are_given() -> None:
    assert show_cpus({3, 0, 1, 8, 2, 10}) == "0-3,8,10"


def test_torch_is_not_needed() -> None:
    code = "import sys, llm_engine.workers.placement as p; p.read_cores(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
