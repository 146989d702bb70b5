"""Where a model lies: the bundled one, a local folder, or a name on the Hugging Face hub."""

from __future__ import annotations

import logging
from pathlib import Path

from ..core.errors import ModelLoadError

logger = logging.getLogger(__name__)

DEMO_MODEL = Path(__file__).resolve().parent / "demo_model"
_WANTED = [
    "*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "tokenizer*", "*.jinja",
    "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model",
]  # fmt: skip
# Other formats' copies of the same weights, and whatever lies in folders.
_UNWANTED = ["consolidated*", "*/*"]


def resolve_model(model: str | None, *, revision: str | None = None, download_dir: str | None = None) -> Path:
    """The local folder of a model: the bundled one for ``None``, ``model`` itself where it is a folder, otherwise the
    snapshot of the hub's repository of that name, downloaded if need be (the hub's usual cache, token and offline
    switch apply). Blocks while downloading, with the hub's progress bars.

    Raises ``ModelLoadError`` where there is no such folder or repository, or it cannot be reached and is not cached.
    """
    if model is None:
        return DEMO_MODEL
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ModelLoadError(f"model {model!r} is a file; a folder or a hub name is wanted")
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise ModelLoadError(f"model {model!r}: there is no such folder")
    return _download(model, revision, download_dir)


def _download(name: str, revision: str | None, download_dir: str | None) -> Path:
    import huggingface_hub as hub  # takes a while to import, and most models are folders
    from huggingface_hub import errors

    at = f" at revision {revision!r}" if revision else ""
    try:
        path = hub.snapshot_download(
            name, revision=revision, cache_dir=download_dir, allow_patterns=_WANTED, ignore_patterns=_UNWANTED
        )
    except errors.HFValidationError as error:
        raise ModelLoadError(f"model {name!r} is neither a folder nor a hub name: {error}") from error
    except errors.GatedRepoError as error:
        raise ModelLoadError(
            f"model {name!r} is gated on the hub: accept its terms there, then log in or set HF_TOKEN"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelLoadError(f"model {name!r} has no revision {revision!r} on the hub") from error
    except errors.RepositoryNotFoundError as error:
        raise ModelLoadError(
            f"model {name!r} is no folder here and not on the hub (or private: log in or set HF_TOKEN)"
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise ModelLoadError(
            f"model {name!r}{at} is no folder here, not in the hub's cache, and the hub cannot be reached "
            "(offline, or HF_HUB_OFFLINE is set)"
        ) from error
    except (errors.HfHubHTTPError, OSError) as error:
        raise ModelLoadError(f"model {name!r}{at} cannot be fetched from the hub: {error}") from error
    logger.info("model %s is at %s", name, path)
    return Path(path)
