"""Fetching a checkpoint from the Hugging Face Hub: exactly one weight set, its configuration and its tokenizer."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

SMALL_FILES = (
    "config.json",
    "generation_config.json",
    "params.json",
    "tekken.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tokenizer.model",
    "tokenizer.model.v3",
)

_logger = logging.getLogger("nemo_engine")


def weight_set_of(files: Iterable[str]) -> tuple[str, list[str]] | None:
    """Which weight set to use of a repository or directory with these files: its stem and its files; None without one.

    Hugging Face's ("model") goes before Mistral's ("consolidated"), one file before shards with an index.
    """
    names = set(files)
    for stem in ("model", "consolidated"):
        if f"{stem}.safetensors" in names:
            return stem, [f"{stem}.safetensors"]
        index = f"{stem}.safetensors.index.json"
        if index in names:
            return stem, [index, *sorted(n for n in names if n.startswith(f"{stem}-") and n.endswith(".safetensors"))]
    return None


def download(repo_id: str, *, revision: str | None, needs_weights: bool) -> Path:
    """Download ``repo_id`` into huggingface_hub's cache and return the directory.

    Raises ``ImportError`` without huggingface_hub, ``ValueError`` where the repository cannot be had or holds no weights.
    """
    try:
        import huggingface_hub
    except ImportError:
        raise ImportError(
            f"{repo_id!r} is no local directory, and downloading it needs huggingface_hub: pip install 'nemo-engine[hub]'"
        ) from None
    try:
        files = huggingface_hub.list_repo_files(repo_id, revision=revision)
    except Exception as error:  # offline, unknown, gated, ...: a complete copy in the cache still serves
        try:
            return Path(huggingface_hub.snapshot_download(repo_id, revision=revision, local_files_only=True))
        except Exception:
            raise ValueError(
                f"model {repo_id!r} is no local directory, and the Hub does not have it or cannot be reached: "
                f"{type(error).__name__}: {error}"
            ) from error
    wanted = [name for name in SMALL_FILES if name in files]
    if needs_weights:
        chosen = weight_set_of(files)
        if chosen is None:
            raise ValueError(
                f"Hub repository {repo_id!r} holds neither model.safetensors nor consolidated.safetensors, whole or in "
                "shards with an index"
            )
        stem, weight_files = chosen
        wanted += weight_files
        _logger.info("%s: downloading the weight set %s*.safetensors (%d files)", repo_id, stem, len(weight_files))
    return Path(huggingface_hub.snapshot_download(repo_id, revision=revision, allow_patterns=wanted))
