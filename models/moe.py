"""A mixture of experts: each token goes through the few MLPs its router prefers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .ops import TorchOps
from .spec import ModelSpec

if TYPE_CHECKING:
    from .weights import Survey, WeightReader


class Experts:
    """Router and experts of one layer."""

    def __init__(self, spec: ModelSpec, index: int, ops: TorchOps, load: Survey | WeightReader) -> None:
        experts = spec.layers[index].experts
        assert experts is not None, "a layer without experts"
        names, prefix = spec.names, f"{spec.names.layers}{index}."
        self.spec, self.ops, self.activation = experts, ops, spec.activation
        self.router = load.linear([(prefix + names.router, experts.num_experts)], spec.hidden_size)
        self.gate_up, self.down = [], []
        for expert in range(experts.num_experts):
            parts = [(prefix + name.format(expert=expert), experts.intermediate_size) for name in names.expert_gate_up]
            self.gate_up.append(load.linear(parts, spec.hidden_size))
            down = [(prefix + names.expert_down.format(expert=expert), spec.hidden_size)]
            self.down.append(load.linear(down, experts.intermediate_size))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[T, H] -> [T, H]. Sums in a fixed order, so a token's result does not depend on the others' choices."""
        top_k = self.spec.top_k
        weights, chosen = torch.softmax(self.router(x).float(), -1).topk(top_k, -1)  # [T, k] each
        if self.spec.normalize:
            weights = weights / weights.sum(-1, keepdim=True)
        order = chosen.flatten().argsort(stable=True)  # pairs (token, choice), sorted by expert
        counts = torch.bincount(chosen.flatten(), minlength=self.spec.num_experts).tolist()
        inputs = x[order // top_k]  # [T * k, H]
        outputs = torch.empty_like(inputs)
        start = 0
        for expert, count in enumerate(counts):
            if count:
                rows = slice(start, start + count)
                hidden = self.ops.gated(self.gate_up[expert](inputs[rows]), self.activation)  # [count, I]
                outputs[rows] = self.down[expert](hidden)
                start += count
        by_token = torch.empty_like(outputs)
        by_token[order] = outputs
        return (by_token.view(-1, top_k, x.shape[-1]) * weights[..., None].to(x.dtype)).sum(1)
