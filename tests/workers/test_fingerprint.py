"""Equal checkpoints have equal fingerprints, and what would compute something else has another."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from llm_engine.workers.fingerprint import fingerprint


def checkpoint(folder: Path, *, layers: int = 4, name: str = "w", file: str = "model", seed: int = 0) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"num_hidden_layers": layers}))
    (folder / "tokenizer.json").write_text("{}")
    data = np.random.default_rng(seed).bytes(1 << 20)
    header = json.dumps({name: {"dtype": "F32", "shape": [1 << 18], "data_offsets": [0, 1 << 20]}}).encode()
    (folder / f"{file}.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data)
    return folder


def test_a_copy_has_the_same(tmp_path: Path) -> None:
    first = checkpoint(tmp_path / "a")
    assert fingerprint(first) == fingerprint(checkpoint(tmp_path / "b")) == fingerprint(str(first))
    (first / "tokenizer.json").write_text("another")
    assert fingerprint(first) == fingerprint(tmp_path / "b")


@pytest.mark.parametrize("change", [{"layers": 5}, {"name": "v"}, {"file": "part"}, {"seed": 1}])
def test_another_checkpoint_has_another(tmp_path: Path, change: dict[str, int]) -> None:
    assert fingerprint(checkpoint(tmp_path / "a")) != fingerprint(checkpoint(tmp_path / "b", **change))  # type: ignore[arg-type]


def test_a_file_that_is_cut_short_has_another(tmp_path: Path) -> None:
    first, second = checkpoint(tmp_path / "a"), checkpoint(tmp_path / "b")
    weights = second / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert fingerprint(first) != fingerprint(second)
    weights.write_bytes(b"\xff" * 20)
    assert fingerprint(first) != fingerprint(second)


def test_one_training_step_later_it_is_another(tmp_path: Path) -> None:
    """Every weight moves a little; sampling a part of them is enough to see it."""
    first, second = checkpoint(tmp_path / "a"), checkpoint(tmp_path / "b")
    weights = second / "model.safetensors"
    content = bytearray(weights.read_bytes())
    length = 8 + int.from_bytes(content[:8], "little")
    content[length::4] = bytes(byte ^ 1 for byte in content[length::4])
    weights.write_bytes(content)
    assert fingerprint(first) != fingerprint(second)
