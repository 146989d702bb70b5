"""What stages cost and hold, from shapes and hardware rows."""

from __future__ import annotations

import pytest

from llm_engine.core.cost_model import StepShape
from llm_engine.core.errors import CapacityError
from llm_engine.simulation.hardware import GIB, HARDWARE
from llm_engine.simulation.model_shapes import SHAPES
from llm_engine.simulation.roofline import num_blocks_in_memory, roofline_costs, stage_memory

EVEN_13B = (10, 10, 10, 10)
GEFORCE = HARDWARE["rtx-4070"]


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("llama-2-7b", 6.74),
        ("llama-2-13b", 13.02),
        ("llama-2-70b", 68.98),
        ("llama-3-8b", 8.03),
        ("llama-3-70b", 70.55),
        ("llama-3.1-405b", 405.85),
        ("mistral-7b", 7.25),
        ("mixtral-8x7b", 46.70),
        ("qwen2.5-7b", 7.61),
        ("qwen2.5-72b", 72.7),
        ("qwen3-8b", 8.19),
        ("qwen3-32b", 32.76),
    ],
)
def test_shapes_weigh_what_the_models_are_known_to_weigh(name: str, billions: float) -> None:
    spec = SHAPES[name]
    tables = 1 if spec.tie_embeddings else 2
    total = sum(spec.num_weights(layer) for layer in spec.layers) + tables * spec.vocab_size * spec.hidden_size
    assert total / 1e9 == pytest.approx(billions, rel=2e-3)


def test_every_weight_is_on_one_stage() -> None:
    for spec in SHAPES.values():
        whole = stage_memory(spec, (spec.num_layers,), GEFORCE, 2, 2048, 0.9)[0]
        parts = stage_memory(spec, (1, spec.num_layers - 3, 2), GEFORCE, 2, 2048, 0.9)
        assert sum(part.weights for part in parts) == whole.weights
        assert sum(part.kv_per_token for part in parts) == whole.kv_per_token


def test_13b_leaves_about_21k_tokens_on_four_cards_of_12_gb() -> None:
    memory = stage_memory(SHAPES["llama-2-13b"], EVEN_13B, GEFORCE, 2, 2048, 0.9)
    assert 20_500 <= num_blocks_in_memory(memory, GEFORCE, 16) * 16 <= 21_500


def test_a_larger_budget_reserves_no_more_than_2048_tokens_do() -> None:
    spec = SHAPES["llama-2-13b"]
    small, usual, huge = (stage_memory(spec, EVEN_13B, GEFORCE, 2, n, 0.9)[1].activations for n in (512, 2048, 65536))
    assert small < usual == huge


def test_13b_does_not_fit_on_two_cards_of_12_gb_and_the_message_has_the_numbers() -> None:
    memory = stage_memory(SHAPES["llama-2-13b"], (20, 20), GEFORCE, 2, 2048, 0.9)
    with pytest.raises(CapacityError) as refused:
        num_blocks_in_memory(memory, GEFORCE, 16)
    message = str(refused.value)
    assert "2 such devices cannot hold the model: its weights take 24.2 GiB" in message
    assert "stage 0 would need 12.12 GiB" in message
    assert "of 10.80 usable of its 12 GiB" in message


def test_a_decode_reads_the_weights_and_a_prompt_computes() -> None:
    spec, speed = SHAPES["llama-2-13b"], GEFORCE.speed
    cost = roofline_costs(spec, EVEN_13B, GEFORCE, 2)[1]
    fixed = GEFORCE.step_overhead + 10 * speed.layer_seconds
    weights = 10 * spec.num_weights(spec.layers[0])
    decode = cost.seconds(StepShape(1, 100, 1, 1, 100)) - fixed
    assert decode == pytest.approx(2 * weights / speed.weight_bytes, rel=0.02)
    prompt = cost.seconds(StepShape(2048, 2048 * 1024, 0, 1, 2048)) - fixed
    linears = 2 * weights * 2048 / speed.flops
    attention = 10 * 4 * 2048 * 1024 * 5120 / speed.attention_flops
    assert prompt == pytest.approx(linears + attention, rel=0.05)


def test_more_work_never_costs_less() -> None:
    for name in ("llama-2-13b", "mixtral-8x7b"):
        spec = SHAPES[name]
        for hardware in HARDWARE.values():
            for cost in roofline_costs(spec, (1, spec.num_layers - 1), hardware, 2):
                times = [cost.seconds(StepShape(n, 300 * n, n, n, 300 * n)) for n in (1, 2, 8, 64, 512, 4096)]
                assert times == sorted(times)


def test_the_head_costs_the_last_stage_and_only_where_something_is_sampled() -> None:
    costs = roofline_costs(SHAPES["llama-3-8b"], (8, 8, 8, 8), GEFORCE, 2)
    assert costs[1] is costs[2]
    sampled, silent = StepShape(64, 6400, 64, 64, 6400), StepShape(64, 6400, 0, 1, 6400)
    head = 2 * 128256 * 4096 / GEFORCE.speed.weight_bytes
    assert costs[3].seconds(sampled) - costs[1].seconds(sampled) == pytest.approx(head, rel=0.05)
    assert costs[3].seconds(silent) == pytest.approx(costs[1].seconds(silent))


def test_memory_of_hardware_rows() -> None:
    assert HARDWARE["rtx-4070"].memory == 12 * GIB
    assert HARDWARE["h200"].speed.weight_bytes == pytest.approx(0.8 * 4.8e12)
