"""The settings of a simulation; the flags of ``llm-engine simulate`` are derived from them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..core.config import check_at_least, check_choices, option
from ..core.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulationConfig:
    """What runs on what, and who asks for it."""

    model_shape: str | None = option(
        None, "a built-in shape, or a folder with a config.json; no weights are needed; llama-2-13b when absent"
    )
    num_layers: int | None = option(None, "layers instead of the shape's own number")
    hardware: str = option("rtx-4070", "the device of every stage: a row of the table in docs/simulation.md")
    fit: str | None = option(None, "a step trace of a real run: what it cost there takes the hardware's place")
    stages: int = option(4, "stages the layers are split into")
    link: str | None = option(
        None,
        "between the stages: lan-1g, lan-10g, ipc, pcie4, nvlink, none, or LATENCY_US,GBIT; lan-1g when absent, or "
        "what the trace shows",
    )
    host_overhead_us: float | None = option(
        None,
        "microseconds the two threads spend on a micro-batch: half to schedule and push it, half to retire its result; "
        "200 when absent, or what the trace shows",
    )
    unlimited_kv: bool = option(False, "a KV cache large enough for everybody, instead of what the memory leaves")
    requests: int = option(256, "how many requests come")
    input_len: int = option(128, "tokens of a prompt; the mean where lengths are drawn")
    output_len: int = option(128, "tokens of an answer; the mean where lengths are drawn")
    lengths: str = option("fixed", "fixed, or drawn from a lognormal distribution", choices=("fixed", "lognormal"))
    length_sigma: float = option(0.8, "spread of the logarithm of drawn lengths")
    rate: float = option(math.inf, "requests a second, as a Poisson stream; inf: all at once")
    shared_prefix: int = option(0, "first tokens of a prompt that it shares with others of its group")
    prefix_groups: int = option(1, "how many different shared prefixes there are")
    workload: str | None = option(
        None, "a JSONL file instead: arrival_s, input_len or prompt_token_ids, output_len, a request per line"
    )

    def __post_init__(self) -> None:
        check_choices(self)
        check_at_least(self, 1, "num_layers", "stages", "requests", "input_len", "output_len", "prefix_groups")
        if not self.rate > 0:
            raise ConfigError("rate", self.rate, "requests a second above 0, or inf")
        if not 0 <= self.length_sigma <= 10:
            raise ConfigError("length_sigma", self.length_sigma, "0 to 10")
        if self.host_overhead_us is not None and not 0 <= self.host_overhead_us < math.inf:
            raise ConfigError("host_overhead_us", self.host_overhead_us, "microseconds, 0 or more")
