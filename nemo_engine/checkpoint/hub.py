"""Downloads from the Hugging Face Hub: exactly one weight set of a checkpoint with its configuration and tokenizer, or
an adapter.

huggingface_hub reads HF_HOME, HF_HUB_CACHE, HF_TOKEN, HF_HUB_OFFLINE and HF_ENDPOINT itself; the message of a failure
says which of them may help.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from nemo_engine.checkpoint.safetensors_files import Headers, read_json, tensors_of_header

Needs = Literal["weights", "headers", "config"]

TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")
TEMPLATE_FOLDER = "additional_chat_templates"
TEXT_FILES = (
    "tekken.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tokenizer.model",
    "tokenizer.model.v3",
    *TEMPLATE_FILES,
)
SMALL_FILES = ("config.json", "generation_config.json", "hf_quant_config.json", "params.json", *TEXT_FILES)
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")

# The ";" lets a user paste these commands also when the command line has joined the lines of the error.
CONVERSION = """
from transformers import AutoModelForCausalLM, AutoTokenizer;
AutoModelForCausalLM.from_pretrained({path!r}, torch_dtype="auto").save_pretrained("converted");
AutoTokenizer.from_pretrained({path!r}).save_pretrained("converted")"""

_logger = logging.getLogger("nemo_engine")


class DownloadError(ValueError):
    """A repository could not be downloaded; its content may be fine."""


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
    sets = []
    for stem, config_file in (("model", "config.json"), ("consolidated", "params.json")):
        single, index = f"{stem}.safetensors", f"{stem}.safetensors.index.json"
        if single in names:
            sets.append(WeightSet(stem, config_file, (single,)))
        elif index in names:
            shards = sorted(name for name in names if name.startswith(f"{stem}-") and name.endswith(".safetensors"))
            sets.append(WeightSet(stem, config_file, (index, *shards)))
    return sorted(sets, key=lambda weights: weights.config_file not in names)


def download(repo_id: str, *, revision: str | None, needs: Needs) -> tuple[Path, Headers | None]:
    """Download ``repo_id`` into huggingface_hub's cache and return the directory, and with needs "headers" also the
    headers of its weights.

    Raises ``DownloadError`` if the download fails, and ``ValueError`` if the repository holds no weights.
    """
    import huggingface_hub

    try:
        files = huggingface_hub.list_repo_files(repo_id, revision=revision)
    except Exception as error:  # offline, unknown, gated, ...: a complete copy in the cache still serves
        folder = _cached(repo_id, revision, f"model {repo_id!r} is no local directory, and", error)
        if needs != "config" and not weight_sets_of(file.name for file in folder.iterdir()):
            raise DownloadError(
                f"the cache holds no weights of model {repo_id!r}, and the Hub cannot be asked: {_reason(error)}; "
                f"{_what_may_help(error)}"
            ) from error
        return folder, None
    file_names = [name for name in SMALL_FILES if name in files]
    weight_sets = weight_sets_of(files)
    if needs != "config" and not weight_sets:
        raise ValueError(_no_weights_message(repo_id, files))
    file_names += [name for name in files if name.startswith(f"{TEMPLATE_FOLDER}/")]
    if needs == "weights":
        chosen = weight_sets[0]
        file_names += chosen.files
        _logger.info("%s: downloading %s (%d files of weights)", repo_id, chosen.files[0], len(chosen.files))
    elif needs == "headers":
        file_names += [name for name in weight_sets[0].files if name.endswith(".index.json")]
    folder = _snapshot(repo_id, revision, file_names)
    return folder, _remote_headers(repo_id, revision, folder, weight_sets[0]) if needs == "headers" else None


def download_adapter(repo_id: str) -> Path:
    """Download a PEFT adapter, and its tokenizer if it has one. Raises ``DownloadError`` if that fails."""
    import huggingface_hub

    try:
        files = huggingface_hub.list_repo_files(repo_id)
    except Exception as error:
        return _cached(repo_id, None, f"lora {repo_id!r} is no local directory, and", error)
    file_names = [name for name in (*ADAPTER_FILES, *TEXT_FILES) if name in files]
    return _snapshot(repo_id, None, file_names + [name for name in files if name.startswith(f"{TEMPLATE_FOLDER}/")])


def _snapshot(repo_id: str, revision: str | None, file_names: list[str]) -> Path:
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(repo_id, revision=revision, allow_patterns=file_names))
    except Exception as error:
        raise DownloadError(
            f"downloading {repo_id!r} failed, try again to go on: {_reason(error)}; {_what_may_help(error)}"
        ) from error


def _cached(repo_id: str, revision: str | None, prefix: str, error: Exception) -> Path:
    """The directory of a repository in the cache, for when the Hub cannot list it."""
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(repo_id, revision=revision, local_files_only=True))
    except Exception:
        raise DownloadError(
            f"{prefix} the Hub does not have it or cannot be reached: {_reason(error)}; {_what_may_help(error)}"
        ) from error


def _remote_headers(repo_id: str, revision: str | None, folder: Path, weights: WeightSet) -> Headers:
    """The headers of the files of ``weights``, read by HTTP range requests."""
    from huggingface_hub import HfApi

    files = set(weights.files)
    index = next((name for name in files if name.endswith(".index.json")), None)
    if index is not None:
        data = read_json(folder / index)
        weight_map = data.get("weight_map") if isinstance(data, dict) else None
        files = (
            {name for name in weight_map.values() if isinstance(name, str)} if isinstance(weight_map, dict) else set()
        )
    headers = {}
    for name in sorted(files & set(weights.files)):
        try:
            read = HfApi().parse_safetensors_file_metadata(repo_id, name, revision=revision)
        except Exception as error:
            raise DownloadError(
                f"the header of {name} in {repo_id!r} cannot be read: {_reason(error)}; {_what_may_help(error)}"
            ) from error
        entries: dict[str, Any] = {}
        for tensor, info in read.tensors.items():
            entry = asdict(info)
            entries[tensor] = entry | {name: list(entry[name]) for name in ("shape", "data_offsets")}
        headers[name] = tensors_of_header(folder / name, entries, 0, None)
    return headers


def _no_weights_message(repo_id: str, files: list[str]) -> str:
    message = (
        f"Hub repository {repo_id!r} holds neither model.safetensors nor consolidated.safetensors, whole or in shards "
        "with an index"
    )
    if ADAPTER_FILES[0] in files:
        return f"{message}: it is an adapter; give the model that it was made for as the model, and this as lora"
    if any(name.endswith(".gguf") for name in files):
        return f"{message}: it holds GGUF files, for llama.cpp; take the repository that they were made from"
    if any(name.startswith("pytorch_model") and name.endswith(".bin") for name in files):
        return (
            f"{message}: it holds pickles (.bin), which may hold code: where you trust it, convert it with"
            + CONVERSION.format(path=repo_id)
        )
    return message


def _status(error: BaseException | None) -> int | None:
    """The HTTP status that ``error``, or one of its causes, carries."""
    while error is not None:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(status, int):
            return status
        error = error.__cause__ or error.__context__
    return None


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _what_may_help(error: Exception) -> str:
    """The settings of huggingface_hub that may make the download work."""
    from huggingface_hub import constants, errors

    if constants.HF_HUB_OFFLINE or isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set: unset it, or let HF_HOME or HF_HUB_CACHE name a cache that holds it"
    if isinstance(error, errors.GatedRepoError) or _status(error) in (401, 403):
        return (
            "is the id right? A repository that is gated or private needs HF_TOKEN of an account that may read it"
            + (", and the one that is set may not" if os.environ.get("HF_TOKEN") else "")
        )
    if isinstance(error, (errors.RepositoryNotFoundError, errors.RevisionNotFoundError)):
        return "is the id right, and the revision? A private repository needs HF_TOKEN"
    if isinstance(error, OSError) and error.errno == 28:
        return f"HF_HOME or HF_HUB_CACHE may name a larger disk than that of {constants.HF_HUB_CACHE}"
    return (
        f"asked was {constants.ENDPOINT}: HF_ENDPOINT may name a mirror, HF_HOME or HF_HUB_CACHE a cache that holds "
        "it, and HTTPS_PROXY a proxy"
    )
