"""Run by test_splitk_interpreter.py in a process of its own: CUDA's decode operator, interpreted on the CPU.

Triton reads TRITON_INTERPRET when it is imported, and xformers asks for a GPU before it offers its Triton operators.
Prints one line per case: its name and the largest error against float64.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"
os.environ["XFORMERS_ENABLE_TRITON"] = "1"

import importlib.util
import sys
from pathlib import Path

import torch

torch.cuda.get_device_capability = lambda *_: (8, 0)

from llm_engine.models.attention import AttentionPlan, operator, xf  # noqa: E402

spec = importlib.util.spec_from_file_location("cases", Path(__file__).with_name("conftest.py"))
assert spec is not None
assert spec.loader is not None
cases = importlib.util.module_from_spec(spec)
sys.modules["cases"] = cases
spec.loader.exec_module(cases)

DECODES = [(1, 5), (1, 64), (1, 129)]


def run(name: str, **settings: object) -> None:
    case = cases.Case(DECODES, dtype=torch.float16, **settings)
    # The kernel loads whole pages and masks afterwards: as on a GPU, what is in the pool must be numbers.
    case.k.nan_to_num_()
    case.v.nan_to_num_()
    plan = AttentionPlan.build(case, block_size=case.block_size, device=torch.device("cpu"), paged_decodes_only=True)
    assert plan.padded_rows == 4, "three rows are padded to a batch the kernel is compiled for"
    stock = xf.paged_cuda_op(case.dtype, case.head_dim, case.block_size)

    class Interpreted(stock):  # type: ignore[misc, valid-type]
        SUPPORTED_DEVICES = frozenset({"cpu"})

    got = operator.paged_decode(case.q, case.k, case.v, plan, Interpreted, case.scale)
    print(name, float((got.double() - case.expected()).abs().max()), flush=True)


run("pages of 16", block_size=16)
run("pages of 64", block_size=64)
run("four heads to a group", heads=8, kv_heads=2, block_size=64)
run("one head to a group", heads=2, kv_heads=2, block_size=64)
run("head of 128", head_dim=128, heads=4, kv_heads=1, block_size=64)
