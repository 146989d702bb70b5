"""Who asks for what and when: drawn from settings, or read from a file."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest

from llm_engine.core.errors import ConfigError
from llm_engine.kvcache.block_hash import hash_blocks
from llm_engine.simulation.config import SimulationConfig
from llm_engine.simulation.workload import Arrival, describe, read_workload


def described(seed: int = 0, max_len: int = 4096, **settings: Any) -> list[Arrival]:
    return describe(SimulationConfig(**settings), seed, max_len)


def test_fixed_lengths_all_at_once() -> None:
    arrivals = described(requests=5, input_len=100, output_len=7)
    assert [(a.at, len(a.prompt_token_ids), a.output_len) for a in arrivals] == [(0.0, 100, 7)] * 5


def test_no_block_of_one_prompt_is_found_in_another() -> None:
    hashes = [hash_blocks(a.prompt_token_ids, 16) for a in described(requests=50, input_len=64)]
    assert len({block for blocks in hashes for block in blocks}) == 50 * 4


def test_poisson_arrivals_keep_their_rate() -> None:
    times = [a.at for a in described(requests=4000, rate=20.0, input_len=1)]
    assert times == sorted(times)
    gaps = [after - before for before, after in zip([0.0, *times], times, strict=False)]
    assert statistics.mean(gaps) == pytest.approx(1 / 20, rel=0.05)
    assert statistics.stdev(gaps) == pytest.approx(1 / 20, rel=0.1)


def test_lognormal_lengths_keep_their_means_and_the_context() -> None:
    arrivals = described(requests=4000, lengths="lognormal", length_sigma=0.7, input_len=300, output_len=100)
    assert statistics.mean(len(a.prompt_token_ids) for a in arrivals) == pytest.approx(300, rel=0.05)
    assert statistics.mean(a.output_len for a in arrivals) == pytest.approx(100, rel=0.05)
    logs = [math.log(a.output_len) for a in arrivals if a.output_len > 20]
    assert statistics.stdev(logs) == pytest.approx(0.7, rel=0.1)
    cut = described(requests=500, lengths="lognormal", length_sigma=1.5, input_len=300, output_len=300, max_len=400)
    assert max(a.num_tokens for a in cut) == 400
    assert min(a.output_len for a in cut) == 1


def test_the_seed_decides() -> None:
    drawn: dict[str, Any] = {"lengths": "lognormal", "rate": 3.0, "shared_prefix": 16, "prefix_groups": 4}
    assert described(seed=3, **drawn) == described(seed=3, **drawn)
    assert described(seed=3, **drawn) != described(seed=4, **drawn)


def test_prompts_of_a_group_share_their_prefix_and_nothing_else() -> None:
    arrivals = described(requests=60, input_len=64, shared_prefix=32, prefix_groups=3)
    blocks = [hash_blocks(a.prompt_token_ids, 16) for a in arrivals]
    assert len({tuple(found[:2]) for found in blocks}) == 3
    assert len({found[2] for found in blocks}) == 60


def lines(tmp_path: Path, *values: Any) -> str:
    path = tmp_path / "load.jsonl"
    spelled = [value if isinstance(value, str | bytes) else json.dumps(value) for value in values]
    path.write_bytes(b"\n".join(line.encode() if isinstance(line, str) else line for line in spelled))
    return str(path)


def test_a_file_of_requests_is_read_in_the_order_of_arrival(tmp_path: Path) -> None:
    path = lines(
        tmp_path,
        {"arrival_s": 2, "input_len": 3, "output_len": 4},
        "",
        {"prompt_token_ids": [5, 6], "output_len": 1},
    )
    first, second = described(workload=path)
    assert first == Arrival(0.0, [5, 6], 1)
    assert (second.at, len(second.prompt_token_ids), second.output_len) == (2.0, 3, 4)


GOOD = {"input_len": 3, "output_len": 4}


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ("{", "line 2"),
        ("[1]", "line 2: a list, not an object"),
        ({"input_len": 3}, "line 2: output_len is None"),
        ({"output_len": 3}, "line 2: either input_len or prompt_token_ids"),
        ({**GOOD, "prompt_token_ids": [1]}, "line 2: either input_len or prompt_token_ids"),
        ({**GOOD, "input_len": 0}, "line 2: input_len is 0"),
        ({**GOOD, "input_len": True}, "line 2: input_len is True"),
        ({**GOOD, "output_len": 2.5}, "line 2: output_len is 2.5"),
        ({**GOOD, "arrival_s": -1}, "line 2: arrival_s is -1"),
        ({**GOOD, "arrival_s": "now"}, "line 2: arrival_s is 'now'"),
        ('{"input_len": 3, "output_len": 4, "arrival_s": NaN}', "line 2: arrival_s is nan"),
        ({"prompt_token_ids": [], "output_len": 4}, "line 2: prompt_token_ids"),
        ({"prompt_token_ids": [-1], "output_len": 4}, "line 2: prompt_token_ids"),
        ({"prompt_token_ids": "abc", "output_len": 4}, "line 2: prompt_token_ids"),
        ({**GOOD, "arival_s": 1}, "line 2: unknown arival_s"),
        ({"input_len": 90, "output_len": 20}, "line 2: its 110 tokens exceed the context of 100"),
        ({"prompt_token_ids": [1] * 90, "output_len": 20}, "line 2: its 110 tokens exceed the context of 100"),
        ({"input_len": 10**12, "output_len": 1}, "line 2: its 1000000000001 tokens exceed the context of 100"),
        ({**GOOD, "arrival_s": 10**400}, "line 2: arrival_s is 1000"),
        ({**GOOD, "deadline_ms": 10**400}, "line 2: deadline_ms is 1000"),
        ("[" * 100_000, "line 2: nested too deeply"),
        (b'{"input_len": 3, "output_len": 4, "tenant": "\xff"}', "line 2: 'utf-8' codec can't decode byte 0xff"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, bad: Any, said: str) -> None:
    path = lines(tmp_path, GOOD, bad)
    with pytest.raises(ConfigError, match=said) as refused:
        read_workload(path, 100)
    assert str(refused.value).startswith(f"workload is {path!r}; allowed: objects with")


def test_a_file_without_requests_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at least one request"):
        read_workload(lines(tmp_path, ""), 100)
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(ConfigError, match="a file that can be read"):
            read_workload(str(path), 100)


@pytest.mark.parametrize(
    "settings",
    [
        {"requests": 0},
        {"input_len": 0},
        {"output_len": -1},
        {"stages": 0},
        {"num_layers": 0},
        {"rate": 0.0},
        {"rate": -1.0},
        {"rate": math.nan},
        {"length_sigma": -0.1},
        {"length_sigma": math.nan},
        {"lengths": "gaussian"},
        {"prefix_groups": 0},
        {"shared_prefix": 128},
        {"shared_prefix": -1},
        {"host_overhead_us": -1.0},
        {"host_overhead_us": math.inf},
        {"output_len": 4000, "input_len": 97},
        {"input_len": 4096},
    ],
)
def test_impossible_numbers_are_refused_by_name(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as refused:
        described(**settings)
    assert refused.value.field in settings
