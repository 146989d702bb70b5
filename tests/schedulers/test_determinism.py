"""The same events give the same plans, whatever the process: nothing hangs on the order of a set or on a clock."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.schedulers.triples import TRIPLES

ROOT = Path(__file__).parents[2]
HASH_SEEDS = ("0", "1", "20201")


def plans_under(hash_seeds: tuple[str, ...], log_seed: int) -> list[bytes]:
    """What processes with these hash seeds print of one event log."""
    command = [sys.executable, "-m", "tests.schedulers.event_log", str(log_seed)]
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT, env={**os.environ, "PYTHONHASHSEED": hash_seed})
        for hash_seed in hash_seeds
    ]
    try:
        printed = [process.communicate(timeout=160)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * len(processes)
    return printed


@pytest.mark.parametrize("log_seed", [1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 8))])
def test_processes_with_other_hash_seeds_make_the_same_plans(log_seed: int) -> None:
    printed = plans_under(HASH_SEEDS, log_seed)
    plans = [json.loads(text) for text in printed]
    for other in plans[1:]:
        different = [name for name in plans[0] if plans[0][name] != other[name]]
        assert not different, "schedulers whose plans hang on the hash seed"
    assert len(set(printed)) == 1
    assert list(plans[0]) == [str(triple) for triple in TRIPLES]
    assert min(map(len, plans[0].values())) >= 40, "the log keeps every scheduler at work"
    # Else it would be one scheduler under many names.
    assert len({tuple(made) for made in plans[0].values()}) >= len(TRIPLES) // 2
