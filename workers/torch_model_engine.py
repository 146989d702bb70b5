"""The model of one stage in torch: what the package runs unless another ``ModelEngine`` is given."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..core.errors import CapacityError, ConfigError
from ..models.architectures import model_spec
from ..models.attention import AttentionPlan
from ..models.config import CheckpointConfig, read_config, stretched_length
from ..models.decoder import Decoder, StageRange
from ..models.generation import read_generation_defaults
from ..models.native_ops import select_ops
from ..models.ops import Step
from ..models.rope import rope_table
from ..models.spec import ModelSpec
from ..models.stages import stage_range
from ..models.weights import Checkpoint, Survey, WeightReader
from .batch import StageBatch
from .memory import available_memory, return_freed_memory
from .model_engine import ModelInfo, Progress

logger = logging.getLogger(__name__)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class TorchModelEngine:
    """Implements ``ModelEngine``; see there for who may call what when.

    ``path`` is a local folder (``models.hub.resolve_model`` makes one of a hub name). ``layer_split`` gives the layers
    of each stage, or how to find them (``models.stages.choose_split``). ``device`` is a kind, or ``cuda:1``.
    ``memory_utilization`` is the share of a GPU's memory for weights and pool. ``prefault_pool``: on the CPU, have
    the system hand over the pool's memory at the start and not as it is written. ``num_threads`` is what torch computes
    with in the calling thread.
    """

    def __init__(
        self,
        path: str,
        *,
        stage: int = 0,
        num_stages: int = 1,
        layer_split: Sequence[int] | str | None = None,
        dtype: str = "auto",
        device: str = "auto",
        max_model_len: int | None = None,
        memory_utilization: float = 0.9,
        prefault_pool: bool = False,
        num_threads: int | None = None,
    ) -> None:
        if dtype != "auto" and dtype not in _DTYPES:
            raise ConfigError("dtype", dtype, f"auto, {', '.join(_DTYPES)}")
        self._path = Path(path)
        self._stage, self._num_stages, self._layer_split = stage, num_stages, layer_split
        self._device = pick_device(device)
        self._dtype_name = dtype
        self._max_model_len = max_model_len
        self._memory_utilization = memory_utilization
        self._prefault_pool = prefault_pool
        self._num_threads = num_threads
        self._decoder: Decoder | None = None
        self._dtype = torch.float32
        self._block_size = 0
        self._kv_bytes_per_token = 0

    def load(self, progress: Progress | None = None) -> ModelInfo:
        if self._num_threads is not None:
            torch.set_num_threads(self._num_threads)
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # of this thread: where kernels that are not torch's own are launched
        config = read_config(self._path)
        spec = model_spec(config)
        max_model_len = context_length(spec, self._max_model_len)
        checkpoint = Checkpoint(self._path)
        self._dtype = pick_dtype(self._dtype_name, config, checkpoint, self._device)
        kind, itemsize = self._device.type, self._dtype.itemsize
        stage = stage_range(spec, self._stage, self._num_stages, self._layer_split, device=kind, itemsize=itemsize)

        ops = select_ops(self._device, self._dtype)
        with torch.inference_mode():
            whole = Survey(checkpoint)
            Decoder(spec, StageRange(0, spec.num_layers, spec.num_layers), ops, {}, whole)
            survey = Survey(checkpoint)
            survey.check_nothing_left(Decoder(spec, stage, ops, {}, survey).weight_prefixes)
            used = {spec.layers[index].rope for index in range(stage.start, stage.end)}
            ropes = {
                name: rope_table(rope, max_model_len, self._device) for name, rope in spec.ropes.items() if name in used
            }
            reader = WeightReader(survey, ops, self._dtype, self._device, progress)
            self._decoder = Decoder(spec, stage, ops, ropes, reader)
        checkpoint.close()
        return_freed_memory()
        self._kv_bytes_per_token = 2 * spec.kv_size * self._dtype.itemsize * (stage.end - stage.start)
        return ModelInfo(
            architecture=spec.architecture,
            vocab_size=spec.vocab_size,
            max_model_len=max_model_len,
            dtype=str(self._dtype).removeprefix("torch."),
            eos_token_ids=read_generation_defaults(self._path, config).eos_token_ids,
            sliding_window=spec.sliding_window,
            num_layers=stage.end - stage.start,
            weight_bytes=reader.weight_bytes,
            kv_bytes_per_token=self._kv_bytes_per_token,
            free_memory_bytes=self._free_memory(),
            num_parameters=whole.num_parameters,
            hidden_size=spec.hidden_size,
            active_share=spec.active_share,
        )

    def allocate(self, num_blocks: int, block_size: int) -> None:
        assert self._decoder is not None, "load first"
        if self._prefault_pool and self._device.type == "cpu":
            needed, free = num_blocks * block_size * self._kv_bytes_per_token, available_memory()
            if needed > free:  # the system would promise it, and kill whom it pleases when it is written
                raise CapacityError(
                    f"the KV cache of stage {self._stage} takes {needed} bytes and {free} are free: "
                    "lower kv_cache_memory, or num_kv_blocks where that is set"
                )
        self._block_size = block_size
        with torch.inference_mode():
            self._decoder.allocate(num_blocks * block_size, self._dtype, self._device, prefault=self._prefault_pool)
        self._warm_up(self._decoder)

    @torch.inference_mode()
    def forward(self, batch: StageBatch, hidden: Any) -> torch.Tensor:
        decoder = self._decoder
        assert decoder is not None, "load first"
        assert self._block_size, "allocate first"
        step = Step(
            positions=self._tensor(batch.positions),
            slot_mapping=self._tensor(batch.slot_mapping),
            plan=AttentionPlan.build(batch, block_size=self._block_size, device=self._device),
        )
        # From another process a hidden state comes in the host's memory.
        inputs = self._tensor(batch.token_ids) if decoder.stage.is_first else hidden.to(self._device)
        return decoder.forward(inputs, self._tensor(batch.logit_rows), step)

    def check_device(self) -> None:
        """Computes one token. A broken CUDA context refuses that, and whatever comes after it."""
        assert self._decoder is not None, "load first"
        try:
            self._warm_up(self._decoder)
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()

    def release(self) -> None:
        self._decoder = None
        self._block_size = 0
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _warm_up(self, decoder: Decoder) -> None:
        """One token through every layer, into the null block: late imports, kernels that compile at their first call
        and libraries that set themselves up do so now, not in somebody's first answer."""
        zero = np.zeros(1, np.int64)
        batch = StageBatch(
            num_decodes=1,
            token_ids=zero,
            positions=zero,
            query_starts=np.array([0, 1], np.int32),
            kv_lens=np.ones(1, np.int32),
            block_tables=np.zeros((1, 1), np.int32),
            slot_mapping=zero,
            logit_rows=zero,
        )
        shape = (1, decoder.spec.hidden_size)
        is_first = decoder.stage.is_first
        self.forward(batch, None if is_first else torch.zeros(shape, dtype=self._dtype, device=self._device))

    def _tensor(self, array: NDArray[np.int64]) -> torch.Tensor:
        """On the CPU a view of the array; the batch outlives the step."""
        if not array.flags.writeable:
            array = array.copy()  # torch warns of what it could write to
        return torch.from_numpy(array).to(self._device)

    def _free_memory(self) -> int:
        if self._device.type == "cuda":
            free, total = torch.cuda.mem_get_info(self._device)
            return max(int(self._memory_utilization * total) - (total - free), 0)
        return available_memory() // 4


def pick_device(name: str) -> torch.device:
    """Raises ``ConfigError`` for a name that is unknown, or a device that is not there."""
    numbered = re.fullmatch(r"cuda:([0-9]{1,4})", name)
    if name not in ("auto", "cpu", "cuda") and numbered is None:
        raise ConfigError("device", name, "auto, cpu, cuda")
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("device", name, "auto or cpu; this torch sees no CUDA device")
    index, count = int(numbered[1]) if numbered else 0, torch.cuda.device_count()
    if index >= count:
        raise ConfigError("device", name, ", ".join(f"cuda:{number}" for number in range(count)))
    return torch.device("cuda", index)


def pick_dtype(name: str, config: CheckpointConfig, checkpoint: Checkpoint, device: torch.device) -> torch.dtype:
    """The type to compute in; ``auto`` is the config's, else that of the stored weights.

    float16 is for GPUs: on the CPU asking for it raises ``ConfigError``, and a float16 checkpoint runs in bfloat16.
    """
    if name == "auto":
        stored = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
        name = config.dtype or stored.get(next(iter(checkpoint.dtypes.values()), "F32"), "float32")
        if name not in _DTYPES:
            name = "float32"
        if name == "float16" and device.type == "cpu":
            logger.warning("a float16 checkpoint on the CPU is computed in bfloat16")
            name = "bfloat16"
    elif name == "float16" and device.type == "cpu":
        raise ConfigError("dtype", name, "auto, float32 or bfloat16 on the CPU")
    return _DTYPES[name]


def context_length(spec: ModelSpec, wanted: int | None) -> int:
    """Longest prompt + output: the model's own limit unless a length is wanted.

    A length above the limit raises ``ConfigError``. ``dynamic`` position encodings are left unstretched, as their
    authors leave them for short texts, unless the length wanted asks for it.
    """
    limits = [stretched_length(rope) for rope in spec.ropes.values()]
    limit = max(min(limits, default=spec.max_positions), spec.max_positions)
    if wanted is None:
        return spec.max_positions if any(rope.kind == "dynamic" for rope in spec.ropes.values()) else limit
    if not 1 <= wanted <= limit:
        raise ConfigError("max_model_len", wanted, f"1 to {limit} for this model")
    return wanted
