"""Folders, the bundled model, and a hub that cannot be reached."""

from __future__ import annotations

from pathlib import Path

import pytest

from llm_engine.core.errors import ModelLoadError
from llm_engine.models.hub import DEMO_MODEL, resolve_model


def test_a_folder_is_itself(tmp_path: Path) -> None:
    assert resolve_model(str(tmp_path)) == tmp_path


def test_no_name_is_the_bundled_model() -> None:
    assert resolve_model(None) == DEMO_MODEL
    assert (DEMO_MODEL / "config.json").exists()


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "~/nowhere-at-all", "a/b/c"])
def test_a_path_that_is_not_there(name: str) -> None:
    with pytest.raises(ModelLoadError, match="no such folder"):
        resolve_model(name)


def test_a_file_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_text("")
    with pytest.raises(ModelLoadError, match="is a file"):
        resolve_model(str(tmp_path / "model.gguf"))


def test_offline_and_not_cached_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelLoadError, match="'org/model' at revision 'v2' is no folder here, not in the hub's cache"):
        resolve_model("org/model", revision="v2", download_dir=str(tmp_path))


def test_offline_but_cached_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--org--model"
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    assert resolve_model("org/model", download_dir=str(tmp_path)) == snapshot


def test_a_name_the_hub_cannot_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelLoadError, match="neither a folder nor a hub name"):
        resolve_model("no spaces/allowed", download_dir=str(tmp_path))
