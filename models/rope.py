"""Rotary position encodings: frequencies fixed once, at load, and their cosines and sines as tables.

Kinds whose frequencies depend on the length of the text at hand (``dynamic``, ``longrope``) are fixed from the longest
context that is served, or chunks, prefix hits and resumes of one text would disagree about its positions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from .spec import RopeSpec


@dataclass(slots=True)
class RopeTable:
    """Cosine and sine of each position and frequency, scaled where the encoding asks for it."""

    cos: torch.Tensor
    """[max_model_len, dim / 2] float32"""
    sin: torch.Tensor
    """[max_model_len, dim / 2] float32"""

    @property
    def dim(self) -> int:
        """Leading elements of a head that are rotated: element i pairs with element i + dim / 2."""
        return 2 * self.cos.shape[1]


def rope_table(spec: RopeSpec, max_model_len: int, device: torch.device) -> RopeTable:
    """Tables for every position below ``max_model_len``."""
    inverse, scale = frequencies(spec, max_model_len)
    angles = torch.arange(max_model_len, dtype=torch.float32)[:, None] * inverse[None, :]
    return RopeTable(angles.cos().mul_(scale).to(device), angles.sin_().mul_(scale).to(device))


def frequencies(spec: RopeSpec, max_model_len: int) -> tuple[torch.Tensor, float]:
    """Angle per position of each pair of elements [dim / 2] in float32, and what cosines and sines are scaled by."""
    exponents = torch.arange(0, spec.dim, 2, dtype=torch.int64).float() / spec.dim
    if spec.kind == "dynamic":
        return _dynamic(spec, max_model_len, exponents), 1.0
    if spec.kind == "longrope":
        return _longrope(spec, max_model_len, exponents)
    plain = 1.0 / (spec.theta**exponents)
    if spec.kind == "linear":
        return plain / float(spec.parameters["factor"]), 1.0
    if spec.kind == "llama3":
        return _llama3(spec, plain), 1.0
    if spec.kind == "yarn":
        return _yarn(spec, plain)
    return plain, 1.0


def _dynamic(spec: RopeSpec, max_model_len: int, exponents: torch.Tensor) -> torch.Tensor:
    """NTK-aware scaling: a base raised so that the lowest frequency spans the whole context."""
    factor = float(spec.parameters["factor"])
    length = max(max_model_len, spec.max_positions)
    stretch = factor * length / spec.max_positions - (factor - 1)
    return 1.0 / ((spec.theta * stretch ** (spec.dim / (spec.dim - 2))) ** exponents)


def _longrope(spec: RopeSpec, max_model_len: int, exponents: torch.Tensor) -> tuple[torch.Tensor, float]:
    """LongRoPE (arXiv 2402.13753): a factor of its own for every frequency; long ones past the original context."""
    values, original = spec.parameters, spec.original_max_positions
    divisors = values["long_factor"] if max_model_len > original else values["short_factor"]
    inverse = 1.0 / (torch.tensor(divisors, dtype=torch.float32) * spec.theta**exponents)
    scale = values.get("attention_factor")
    if scale is None:
        factor = values.get("factor") or spec.max_positions / original
        scale = 1.0 if factor <= 1.0 else math.sqrt(1 + math.log(factor) / math.log(original))
    return inverse, float(scale)


def _llama3(spec: RopeSpec, plain: torch.Tensor) -> torch.Tensor:
    """Llama 3.1: long waves are stretched, short ones kept, those between blended."""
    factor = float(spec.parameters["factor"])
    low, high = float(spec.parameters["low_freq_factor"]), float(spec.parameters["high_freq_factor"])
    turns = spec.original_max_positions * plain / (2 * math.pi)  # full turns over the original context
    blend = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - blend) * plain / factor + blend * plain


def _yarn(spec: RopeSpec, plain: torch.Tensor) -> tuple[torch.Tensor, float]:
    """YaRN (arXiv 2309.00071): interpolation by parts, and a temperature on the attention scores."""
    values, dim = spec.parameters, spec.dim
    factor = float(values["factor"])

    def index_of(turns: float) -> float:
        """Which frequency makes that many full turns over the original context."""
        return dim * math.log(spec.original_max_positions / (turns * 2 * math.pi)) / (2 * math.log(spec.theta))

    low, high = index_of(values.get("beta_fast") or 32), index_of(values.get("beta_slow") or 1)
    if values.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = (torch.arange(dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)
    stretched = ramp.clamp(0.0, 1.0)

    scale = values.get("attention_factor")
    if scale is None:
        m, m_all = values.get("mscale"), values.get("mscale_all_dim")
        scale = _temperature(factor, m) / _temperature(factor, m_all) if m and m_all else _temperature(factor, 1.0)
    return plain / factor * stretched + plain * (1 - stretched), float(scale)


def _temperature(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0
