"""Checkpoints whole, sharded, broken and foreign: what is read, and what is said of what cannot be."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llm_engine.core.errors import ConfigError, ModelLoadError
from llm_engine.workers.torch_model_engine import TorchModelEngine
from tests.models import tiny_models
from tests.models.stage_runs import Stages

Edit = Callable[[dict[str, Any]], None]


@pytest.fixture
def copy(checkpoint: Callable[[str], Path], tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """A copy of a checkpoint with its config, and its weights, changed."""

    def make(name: str = "llama", config: Edit | None = None, weights: Edit | None = None) -> Path:
        folder = tmp_path / "copy"
        shutil.copytree(checkpoint(name), folder)
        if config is not None:
            values = json.loads((folder / "config.json").read_text())
            config(values)
            (folder / "config.json").write_text(json.dumps(values))
        if weights is not None:
            tensors = load_file(folder / "model.safetensors")
            weights(tensors)
            save_file(tensors, folder / "model.safetensors")
        return folder

    return make


def load(folder: Path, **options: Any) -> Any:
    return TorchModelEngine(str(folder), device="cpu", **options).load()


def update(**values: Any) -> Edit:
    return lambda config: config.update(values)


LAYER = "model.layers.2.mlp.down_proj.weight"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": update(architectures=["FooForCausalLM"])}, "'FooForCausalLM' is not supported; known: Gemma2For"),
        ({"config": update(architectures=None)}, "names no architecture"),
        ({"config": lambda c: c.pop("hidden_size")}, "has no 'hidden_size'"),
        ({"config": update(num_hidden_layers="four")}, "does not describe a LlamaForCausalLM"),
        ({"config": update(num_key_value_heads=3)}, "4 query heads cannot share 3 key heads"),
        ({"config": update(hidden_act="relu6")}, "hidden_act 'relu6' is not supported; known: silu"),
        ({"config": update(rope_parameters={"rope_type": "su"})}, "rope type 'su' is not supported"),
        ({"config": update(quantization_config={"quant_method": "gptq"})}, "quantization_config asks for 'gptq'"),
        ({"config": update(intermediate_size=80)}, r"gate_proj.weight has shape \[96, 64\]; expected \[80, 64\]"),
        ({"config": update(num_hidden_layers=5)}, r"no weight model.layers.4.input_layernorm.weight \(expected shape"),
        ({"weights": lambda w: w.pop(LAYER)}, rf"has no weight {LAYER} \(expected shape \[64, 96\]\)"),
        ({"weights": lambda w: w.update({LAYER: torch.zeros(64, 95)})}, rf"{LAYER} has shape \[64, 95\]; expected"),
        ({"weights": lambda w: w.update({LAYER: torch.zeros(64, 96, dtype=torch.int8)})}, f"{LAYER} is of type I8"),
        (
            {"weights": lambda w: w.update({"model.layers.1.self_attn.q_proj.bias": torch.zeros(64)})},
            "weight model.layers.1.self_attn.q_proj.bias has no place in this architecture",
        ),
        ({"name": "qwen2-window", "config": update(layer_types=["chunked_attention"] * 4)}, "'chunked_attention'"),
        ({"name": "qwen2-window", "config": update(layer_types=["full_attention"])}, "names 1 layers of 4"),
        ({"name": "gemma3", "config": update(use_bidirectional_attention=True)}, "only causal models"),
    ],
)
def test_what_is_wrong_is_named(copy: Callable[..., Path], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelLoadError, match=message):
        load(copy(**changes))


def test_nothing_is_read_of_a_wrong_checkpoint(copy: Callable[..., Path]) -> None:
    folder, seen = copy(weights=lambda w: w.pop("lm_head.weight")), []
    with pytest.raises(ModelLoadError, match=r"lm_head\.weight"):
        TorchModelEngine(str(folder), device="cpu").load(lambda done, total: seen.append(done))
    assert not seen


def test_weights_outside_the_layers_are_left_alone(copy: Callable[..., Path]) -> None:
    extra = {"vision_tower.x": torch.zeros(3), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)}
    load(copy(weights=lambda w: w.update(extra)))


def test_a_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"it has no config\.json"):
        load(tmp_path)


def test_broken_files(copy: Callable[..., Path]) -> None:
    folder = copy()
    (folder / "model.safetensors").write_bytes(b"\x10\x00\x00")
    with pytest.raises(ModelLoadError, match=r"model\.safetensors is not a readable safetensors file"):
        load(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelLoadError, match=r"config\.json cannot be read"):
        load(folder)


class Bomb:
    def __reduce__(self) -> Any:
        return os.abort, ()


def test_a_pickle_is_never_opened(copy: Callable[..., Path]) -> None:
    folder = copy()
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ModelLoadError, match=r"pytorch_model\.bin is a pickle, which is never read"):
        load(folder)


def test_shards_are_one_checkpoint(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    sharded = tiny_models.build("qwen3", tmp_path / "sharded", max_shard_size="200KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    text = tiny_models.prompt(30)
    runs = [Stages(folder, 2) for folder in (checkpoint("qwen3"), sharded)]
    one, many = (run.run((run.sequence(text), 30))[0] for run in runs)
    assert torch.equal(one, many)


@pytest.mark.parametrize(
    ("shard", "message"),
    [("model-00009.safetensors", r"lacks model-00009\.safetensors"), ("../x.safetensors", "is not a file beside it")],
)
def test_an_index_that_leads_nowhere(copy: Callable[..., Path], shard: str, message: str) -> None:
    folder = copy()
    index = {"weight_map": {"lm_head.weight": shard}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelLoadError, match=message):
        load(folder)


def test_a_stage_reads_its_own_layers_alone(checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint("llama")
    tensors = load_file(folder / "model.safetensors")

    def of(*beginnings: str) -> int:
        return sum(tensor.nbytes for name, tensor in tensors.items() if name.startswith(beginnings))

    layers = [f"model.layers.{index}." for index in range(4)]
    expected = [
        of("model.embed_tokens", *layers[:2]),
        of(layers[2]),
        of(layers[3], "model.norm", "lm_head"),
    ]
    for stage, size in enumerate(expected):
        seen: list[tuple[int, int]] = []
        engine = TorchModelEngine(str(folder), stage=stage, num_stages=3, layer_split=[2, 1, 1], device="cpu")
        info = engine.load(lambda done, total, seen=seen: seen.append((done, total)))
        assert seen[-1] == (size, size)
        assert [done for done, _ in seen] == sorted({done for done, _ in seen})
        assert info.weight_bytes == size
        assert info.num_layers == [2, 1, 1][stage]
        assert info.kv_bytes_per_token == info.num_layers * 2 * 2 * 16 * 4
        assert info.num_parameters == sum(tensor.numel() for tensor in tensors.values())


def test_a_tied_head_is_read_once_on_one_stage(checkpoint: Callable[[str], Path]) -> None:
    one = load(checkpoint("qwen2")).weight_bytes
    two = [load(checkpoint("qwen2"), stage=stage, num_stages=2).weight_bytes for stage in range(2)]
    assert sum(two) - one == 320 * 64 * 4


def test_model_info(checkpoint: Callable[[str], Path], copy: Callable[..., Path]) -> None:
    info = load(checkpoint("mistral"), max_model_len=100)
    assert (info.architecture, info.vocab_size, info.max_model_len) == ("MistralForCausalLM", 320, 100)
    assert (info.dtype, info.eos_token_ids, info.sliding_window) == ("float32", [2], 24)
    assert info.free_memory_bytes > 1 << 20
    assert load(checkpoint("gemma3")).sliding_window is None
    assert load(copy("llama", update(dtype="bfloat16"))).dtype == "bfloat16"


def test_dtype(checkpoint: Callable[[str], Path], copy: Callable[..., Path], caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ConfigError, match="float16"):
        load(checkpoint("llama"), dtype="float16")
    with pytest.raises(ConfigError, match="auto, float32"):
        load(checkpoint("llama"), dtype="int8")
    assert load(copy(config=update(dtype="float16"))).dtype == "bfloat16"
    assert "computed in bfloat16" in caplog.text


@pytest.mark.parametrize(
    ("name", "wanted", "length"),
    [("llama", None, 256), ("llama", 99, 99), ("llama-linear", None, 512), ("llama-dynamic", None, 256),
     ("llama-dynamic", 1024, 1024)],
)  # fmt: skip
def test_context_length(checkpoint: Callable[[str], Path], name: str, wanted: int | None, length: int) -> None:
    assert load(checkpoint(name), max_model_len=wanted).max_model_len == length


def test_settings_that_do_not_fit(checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint("llama")
    with pytest.raises(ConfigError, match="max_model_len is 257; allowed: 1 to 256"):
        load(folder, max_model_len=257)
    with pytest.raises(ConfigError, match="pipeline_parallel_size is 5; allowed: at most the model's 4 layers"):
        load(folder, num_stages=5)
    for split in ([4], [2, 3], [4, 0], [5, -1]):
        with pytest.raises(ConfigError, match="pipeline_layer_partition is"):
            load(folder, num_stages=2, layer_split=split)
    with pytest.raises(ConfigError, match="device"):
        TorchModelEngine(str(folder), device="tpu")


def test_threads_and_release(checkpoint: Callable[[str], Path]) -> None:
    before = torch.get_num_threads()
    engine = TorchModelEngine(str(checkpoint("llama")), device="cpu", num_threads=2)
    try:
        engine.load()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    engine.release()
    engine.release()
