"""Attention over the paged KV cache: one plan a step, one xformers call a layer, an operator per device."""

from .operator import attention, write_kv
from .plan import AttentionPlan, RaggedBatch

__all__ = ["AttentionPlan", "RaggedBatch", "attention", "write_kv"]
