"""The example resource and KV manager do what their pages say, in an engine and in a simulation."""

from __future__ import annotations

from typing import Any

import pytest
from keep_shared import KeepShared
from licence_slots import LicenceSlots

from llm_engine import ConfigError, EngineConfig, SamplingParams
from llm_engine.kvcache.block_hash import hash_blocks
from llm_engine.kvcache.kv_cache_manager import KVCacheManager
from llm_engine.simulation.config import SimulationConfig
from llm_engine.simulation.setup import set_up
from tests.engine.engines import SECONDS, greedy, toy_llm
from tests.toy_model_engine import expected_tokens

SHARED_PREFIXES = SimulationConfig(
    stages=1, hardware="rtx-4070", model_shape="llama-2-7b", num_layers=8, link="none",
    requests=300, rate=6.0, input_len=320, output_len=16, shared_prefix=128, prefix_groups=8,
)  # fmt: skip


def simulated(**settings: Any) -> Any:
    config = EngineConfig.of(block_size=16, num_kv_blocks=150, **settings)
    simulator = set_up(SHARED_PREFIXES, config).simulator(keep_stats=10_000)
    run = simulator.run(set_up(SHARED_PREFIXES, config).arrivals)
    simulator.core.check_integrity()
    return simulator.core, run


def hit_rate(kv: KVCacheManager) -> float:
    return kv.prefix_hits / kv.prefix_queries


# -- keep_shared


def test_what_was_found_again_outlives_a_flood_of_what_comes_once() -> None:
    plain, _ = simulated()
    keeping, run = simulated(kv_cache_manager="keep_shared:KeepShared")
    assert type(keeping.kv).__name__ == KeepShared.__name__
    assert len(run.e2es) == 300
    best = 128 / 320
    assert hit_rate(plain.kv) < 0.7 * best
    assert hit_rate(keeping.kv) > 0.9 * best


def test_a_block_on_probation_goes_first_and_of_the_found_the_one_freed_longest_ago() -> None:
    kv = KeepShared(7, 4)
    for seq_id, first in enumerate((10, 20, 10, 30)):  # 10 is found again, 20 and 30 never
        hashes = hash_blocks([first, 1, 2, 3], 4)
        kv.add_sequence(seq_id, hashes, 5)
        kv.grow(seq_id, 5)
        kv.publish(seq_id, hashes, 4, step=seq_id)
        kv.free(seq_id)
        kv.check_integrity()
    found = [kv.cache.get(hash_blocks([first, 1, 2, 3], 4)[0]) for first in (20, 30, 10)]
    order = list(kv.pool.free_blocks())
    assert order[-3:] == found
    assert set(order[:-3]) == set(range(1, 7)) - set(found), "empty blocks before all of them"


def test_answers_are_the_same_under_any_manager() -> None:
    prompts = [[7, 7, 7, 7, 9, number, 3, 4, 5] for number in range(6)]
    with toy_llm(kv_cache_manager="keep_shared:KeepShared", num_kv_blocks=12) as llm:
        for prompt in prompts * 2:
            output = llm.generate(prompt, greedy(12), use_tqdm=False)[0]
            assert output.outputs[0].token_ids == expected_tokens(prompt, 12)
        assert type(llm.engine.kv).__name__ == KeepShared.__name__
        assert llm.engine.kv.prefix_hits > 0


# -- licence_slots


def test_no_more_requests_run_than_there_are_licences() -> None:
    _, free = simulated()
    core, run = simulated(resources=("licence_slots:LicenceSlots",))
    assert len(run.e2es) == 300
    assert max(record.num_running for record in run.stats) == 4
    assert max(record.num_running for record in free.stats) > 4
    (slots,) = core.resources.managers
    assert slots.available() == 4, "all were given back"


def test_an_engine_asks_resources_by_name_and_by_object() -> None:
    mine = LicenceSlots(2)
    mine.name = "mine"
    with toy_llm(resources=[mine, "licence_slots:LicenceSlots"]) as llm:
        futures = [llm.submit([number, 2, 3], SamplingParams(max_tokens=12, temperature=0.0)) for number in range(1, 9)]
        for number, future in enumerate(futures, start=1):
            assert future.result(SECONDS).outputs[0].token_ids == expected_tokens([number, 2, 3], 12)
        assert [manager.name for manager in llm.engine.state.core.resources.managers] == ["licence slots", "mine"]
        assert max(record.num_running for record in llm.get_stats()) == 2


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"resources": ["licence_slots:LicenceSlot"]}, "resources is 'licence_slots:LicenceSlot'; allowed: something"),
        ({"resources": ["keep_shared:KeepShared"]}, "a subclass of BaseResourceManager; KeepShared is none, and lacks"),
        ({"resources": "licence_slots:LicenceSlots"}, "a list of resource managers and their names"),
        ({"resources": [5]}, "resources is 5; allowed: a BaseResourceManager with a name, or the name of one"),
        ({"resources": [LicenceSlots]}, "allowed: a BaseResourceManager with a name"),
        ({"resources": ["licences"]}, "resources is 'licences'; allowed: "),
        ({"resources": ["licence_slots:LicenceSlots"] * 2}, "one of each name"),
        ({"kv_cache_manager": "licence_slots:LicenceSlots"}, "a subclass of KVCacheManager; LicenceSlots is none"),
        ({"kv_cache_manager": "lruu"}, "did you mean 'lru'"),
    ],
)
def test_what_is_none_is_refused_at_start(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        toy_llm(**settings)
