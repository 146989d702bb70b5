"""The settings of a simulation; the flags of ``llm-engine simulate`` are derived from them."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from ..core.config import check_at_least, check_choices, option
from ..core.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulationConfig:
    """What runs on what, and who asks for it."""

    model_shape: str | None = option(
        None, "a built-in shape, or a folder with a config.json; no weights are needed; llama-2-13b when absent"
    )
    num_layers: int | None = option(None, "layers instead of the shape's own number")
    hardware: str | None = option(
        None, "the device of every stage: a row of the table in docs/simulation.md; rtx-4070 when absent"
    )
    fit: str | None = option(
        None, "a step trace of a real run: what it cost there takes the hardware's place, and its stages and pool"
    )
    stages: int | None = option(None, "stages the layers are split into; 4 when absent, or as many as the trace has")
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
    tenants: int = option(1, "how many tenants the requests belong to, in turn")
    priority_levels: int = option(1, "priorities of the requests, 0 to one less, in turn")
    deadline_ms: float | None = option(None, "milliseconds after its arrival by which a request wants its last token")
    workload: str | None = option(
        None,
        "one that is shipped instead (bursty-chat, long-documents, many-tenants, shared-prefix), or a JSONL file: "
        "arrival_s, input_len or prompt_token_ids, output_len, and more, a request per line",
    )
    time_scale: float = option(1.0, "what the workload's times of arrival are multiplied by; 0.5: twice as fast")
    slo_ttft_ms: float | None = option(
        None, "milliseconds to the first token that count as good; the workload's own when absent, if it has one"
    )
    slo_itl_ms: float | None = option(
        None, "mean milliseconds between a request's tokens that count as good; the workload's own when absent"
    )

    def __post_init__(self) -> None:
        check_choices(self)
        check_at_least(self, 1, "num_layers", "stages", "requests", "input_len", "output_len", "prefix_groups")
        check_at_least(self, 1, "tenants", "priority_levels")
        for name in ("deadline_ms", "slo_ttft_ms", "slo_itl_ms"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(name, value, "milliseconds above 0")
        if not 0 < self.time_scale < math.inf:
            raise ConfigError("time_scale", self.time_scale, "a number above 0")
        if self.time_scale != 1.0 and self.workload is None:
            raise ConfigError("time_scale", self.time_scale, "nothing without a workload; rate says how fast they come")
        if not self.rate > 0:
            raise ConfigError("rate", self.rate, "requests a second above 0, or inf")
        if not 0 <= self.length_sigma <= 10:
            raise ConfigError("length_sigma", self.length_sigma, "0 to 10")
        if self.host_overhead_us is not None and not 0 <= self.host_overhead_us < math.inf:
            raise ConfigError("host_overhead_us", self.host_overhead_us, "microseconds, 0 or more")


LOAD_SETTINGS = {
    field.name: field.default
    for field in fields(SimulationConfig)
    if field.name
    in (
        "requests",
        "input_len",
        "output_len",
        "lengths",
        "length_sigma",
        "rate",
        "shared_prefix",
        "prefix_groups",
        "tenants",
        "priority_levels",
        "deadline_ms",
    )
}
"""What a workload of its own says instead, with the defaults."""
