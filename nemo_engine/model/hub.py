"""Fetching a checkpoint from the Hugging Face Hub: exactly one weight set, its configuration and its tokenizer."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

SMALL_FILES = (
    "config.json",
    "generation_config.json",
    "params.json",
    "tekken.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "tokenizer.model",
    "tokenizer.model.v3",
)

_logger = logging.getLogger("nemo_engine")


@dataclass(frozen=True, slots=True)
class WeightSet:
    """The weights of one layout: ``stem`` is "model" for Hugging Face's, "consolidated" for Mistral's."""

    stem: str
    config_file: str
    files: tuple[str, ...]


def weight_sets_of(files: Iterable[str]) -> list[WeightSet]:
    """The weight sets among the files of a repository or directory, the one to use first.

    Hugging Face's goes before Mistral's, unless only the latter has its configuration; one file goes before shards.
    """
    names = set(files)
    found = []
    for stem, config_file in (("model", "config.json"), ("consolidated", "params.json")):
        single, index = f"{stem}.safetensors", f"{stem}.safetensors.index.json"
        if single in names:
            found.append(WeightSet(stem, config_file, (single,)))
        elif index in names:
            shards = sorted(name for name in names if name.startswith(f"{stem}-") and name.endswith(".safetensors"))
            found.append(WeightSet(stem, config_file, (index, *shards)))
    return sorted(found, key=lambda weights: weights.config_file not in names)


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
    wanted += [name for name in files if name.startswith("additional_chat_templates/")]
    if needs_weights:
        weight_sets = weight_sets_of(files)
        if not weight_sets:
            raise ValueError(
                f"Hub repository {repo_id!r} holds neither model.safetensors nor consolidated.safetensors, whole or in "
                "shards with an index"
            )
        chosen = weight_sets[0]
        wanted += chosen.files
        _logger.info("%s: downloading %s (%d files of weights)", repo_id, chosen.files[0], len(chosen.files))
    try:
        return Path(huggingface_hub.snapshot_download(repo_id, revision=revision, allow_patterns=wanted))
    except Exception as error:
        raise ValueError(
            f"downloading {repo_id!r} failed, try again to go on: {type(error).__name__}: {error}"
        ) from error
