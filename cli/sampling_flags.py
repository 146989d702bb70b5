"""Sampling flags of ``generate`` and ``chat``."""

from __future__ import annotations

import argparse
from typing import Any

from ..core.errors import InvalidParamsError
from ..core.sampling_params import SAMPLING_FIELDS, SamplingParams
from .settings import nearest

_FLAGS: dict[str, tuple[Any, str]] = {
    "max_tokens": (int, "most tokens to generate"),
    "min_tokens": (int, "fewest tokens before it may stop"),
    "temperature": (float, "0 takes the likeliest token"),
    "top_k": (int, "sample among the k likeliest tokens"),
    "top_p": (float, "sample among the likeliest tokens of this total probability"),
    "min_p": (float, "leave out tokens below this share of the likeliest one's probability"),
    "repetition_penalty": (float, "above 1 discourages tokens that occurred"),
    "presence_penalty": (float, "discourages tokens that were generated"),
    "frequency_penalty": (float, "the same, by how often"),
}


def add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    """Flags for the common sampling fields; those not given leave no trace in the namespace."""
    group = parser.add_argument_group("sampling")
    for name, (kind, text) in _FLAGS.items():
        group.add_argument(
            "--" + name.replace("_", "-"),
            type=kind,
            dest="sampling_" + name,
            metavar=kind.__name__.upper(),
            default=argparse.SUPPRESS,
            help=text,
        )
    group.add_argument(
        "--stop", dest="sampling_stop", nargs="+", metavar="TEXT", default=argparse.SUPPRESS, help="texts that end it"
    )
    group.add_argument(
        "--ignore-eos",
        dest="sampling_ignore_eos",
        action="store_true",
        default=argparse.SUPPRESS,
        help="go on after the end of sequence",
    )
    if parser.prog.endswith("generate"):
        group.add_argument(
            "--n", dest="sampling_n", type=int, metavar="INT", default=argparse.SUPPRESS, help="answers per prompt"
        )


def given(args: argparse.Namespace) -> dict[str, Any]:
    """The sampling fields that were given as flags."""
    prefix = "sampling_"
    return {name.removeprefix(prefix): value for name, value in vars(args).items() if name.startswith(prefix)}


def make_params(model_defaults: dict[str, Any], *given: dict[str, Any]) -> SamplingParams:
    """Params from the model's defaults and what was given, later ones winning.

    Raises ``InvalidParamsError`` for a bad value or an unknown field, with the nearest known name.
    """
    merged = dict(model_defaults)
    for fields in given:
        merged |= fields
    for name, value in merged.items():
        if name not in SAMPLING_FIELDS:
            hint = nearest(name, SAMPLING_FIELDS)
            raise InvalidParamsError(name, value, "a sampling field" + (f"; {hint}" if hint else ""))
    return SamplingParams(**merged)
