"""A PEFT adapter (LoRA): what it changes in a model, read from its configuration and its file's header and checked
against the model.

Everything in it is used or refused by name. ``loader`` merges it, so it costs nothing afterwards. Must not know torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemo_engine.checkpoint.hub import ADAPTER_FILES
from nemo_engine.checkpoint.layout import HF, WITH_VOCABULARY, ExpectedTensor
from nemo_engine.checkpoint.safetensors_files import TensorInfo, read_header, read_into, read_json
from nemo_engine.checks import check_int, check_positive
from nemo_engine.config import ModelConfig
from nemo_engine.config_reader import MAX_VOCAB, MAX_WIDTH

FAULTS_SHOWN = 8  # in one error message

Key = tuple[int | None, str]  # (layer, part)

# Fields of adapter_config.json that do not change the merged model, or that are read below.
_HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "inference_mode", "lora_dropout", "megatron_core", "peft_type",
    "peft_version", "revision", "runtime_config", "task_type", "eva_config", "exclude_modules", "layers_pattern",
    "ensure_weight_tying", "qalora_group_size",
}  # fmt: skip
_READ = {
    "alpha_pattern", "bias", "init_lora_weights", "layers_to_transform", "lora_alpha", "modules_to_save", "r",
    "rank_pattern", "target_modules", "use_rslora", "fan_in_fan_out",
}  # fmt: skip
_REFUSED = {
    "use_dora": "DoRA scales each weight's rows anew after the merge",
    "layer_replication": "layers that are repeated make another model",
    "trainable_token_indices": "single trained tokens lie beside the embeddings",
    "alora_invocation_tokens": "an activated LoRA changes the model from a token on, so it cannot be merged",
    "use_qalora": "QA-LoRA is for quantised models",
    "lora_bias": "projections have no bias here",
    "target_parameters": "it changes parameters that are no module",
}
# Initialisations that leave the base model as it is; PiSSA, OLoRA, CorDA and LoftQ replace weights of it.
_INITS = (None, True, False, "gaussian", "eva", "orthogonal", "kaiming")
_PREFIXES = ("model.", "", "language_model.model.", "language_model.", "model.language_model.")
_SUFFIXES = {
    ".lora_A.weight": "A", ".lora_B.weight": "B", ".lora_embedding_A": "A", ".lora_embedding_B": "B",
    ".base_layer.weight": "whole", ".weight": "whole",
}  # fmt: skip
_REPLACED = ".original_module.weight"
_FLOATING = ("bfloat16", "float16", "float32", "float64")
_MAX_PATTERN, _MAX_REPEATS = 256, 4  # characters; and repetitions, each of which multiplies the time by a name's length
_NESTED = re.compile(r"\)\s*[*+{]")  # a repeated group can take exponential time


@dataclass(frozen=True, slots=True)
class LowRank:
    """The product ``scaling`` B A, which is added to a weight (out, in): A is (rank, in) and B is (out, rank).

    For embeddings (V, H), A is (rank, V) and B is (H, rank), and the transpose of the product is added.
    """

    a: TensorInfo
    b: TensorInfo
    scaling: float
    is_embedding: bool


@dataclass(frozen=True, slots=True)
class Adapter:
    """The changes of an adapter: it replaces the weights of ``whole``, and adds a product to those of ``low_rank``."""

    path: Path
    vocab_size: int
    whole: Mapping[Key, TensorInfo] = field(repr=False)
    low_rank: Mapping[Key, LowRank] = field(repr=False)

    def describe(self) -> str:
        """The adapter in a few words."""
        parts = sorted({part for _, part in self.low_rank})
        ranks = sorted({pair.a.shape[0] for pair in self.low_rank.values()})
        words = [f"LoRA of rank {', '.join(map(str, ranks))} on {', '.join(parts)}"] if parts else []
        saved = sorted({part for _, part in self.whole})
        words += [f"{', '.join(saved)} in full"] if saved else []
        return f"adapter {self.path}: {'; '.join(words)}"


def read_adapter(path: Path, config: ModelConfig) -> Adapter:
    """The adapter in directory ``path``, for a model of ``config``.

    Raises ``ValueError`` (``FileNotFoundError`` for an absent file) naming file, field or tensor, and what is wrong
    with it.
    """
    config_file, weights_file = (path / name for name in ADAPTER_FILES)
    fields = read_json(config_file)
    if not isinstance(fields, dict):
        raise ValueError(f"{config_file} must hold a JSON object, got {type(fields).__name__}")
    try:
        _check_fields(fields)
        scaling_of = _scaling(fields)
    except ValueError as error:
        raise ValueError(f"{config_file}: {error}") from None
    if not weights_file.exists():
        if (path / "adapter_model.bin").exists():
            raise ValueError(
                f"{path / 'adapter_model.bin'} is a pickle, which may hold code: where you trust it, load the adapter "
                "with peft and save it "
                "anew, which writes adapter_model.safetensors"
            )
        others = sorted(file.name for file in path.glob("*.safetensors"))
        instead = f"; an adapter is read from this file alone: put the tensors of {', '.join(others)} into it"
        raise FileNotFoundError(f"{weights_file} does not exist{instead if others else ''}")
    return _Taker(path, fields, config, read_header(weights_file)).take(scaling_of)


def _check_fields(fields: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` for a configuration that is no LoRA, or that asks for something that a merge cannot do."""
    kind = fields.get("peft_type")
    if kind != "LORA":
        raise ValueError(f"peft_type must be 'LORA', got {kind!r}: merge it with peft and give the merged checkpoint")
    for name, value in fields.items():
        if name in _HARMLESS or name in _READ or value in (None, False, "", [], {}):
            continue
        why = _REFUSED.get(name, "it is not known here")
        raise ValueError(f"{name} is not supported, got {value!r}: {why}; merge the adapter with peft instead")
    if fields.get("bias", "none") != "none":
        raise ValueError(f"bias must be 'none', as projections have none here, got {fields['bias']!r}")
    for name in ("fan_in_fan_out", "use_rslora"):
        if not isinstance(fields.get(name, False), (bool, type(None))):
            raise ValueError(f"{name} must be true or false, got {fields[name]!r}")
    if fields.get("fan_in_fan_out"):
        raise ValueError("fan_in_fan_out must be false, as weights are stored (out, in) here, got True")
    if fields.get("init_lora_weights") not in _INITS:
        raise ValueError(
            f"init_lora_weights {fields['init_lora_weights']!r} is not supported: it replaces the model's weights, so "
            "the adapter belongs to "
            "others than the checkpoint's; save it with path_initial_model_for_weight_conversion, or merge it with peft"
        )
    for name in ("rank_pattern", "alpha_pattern"):
        patterns = fields.get(name) or {}
        if not isinstance(patterns, dict):
            raise ValueError(f"{name} must be an object, got {patterns!r}")
        for pattern in patterns:
            _compile(name, pattern)
    targets = fields.get("target_modules")
    if isinstance(targets, str) and targets != "all-linear":
        _compile("target_modules", targets)
    elif targets is not None and not isinstance(targets, str):
        _check_names("target_modules", targets)
    if fields.get("modules_to_save") is not None:
        _check_names("modules_to_save", fields["modules_to_save"])
    layers = fields.get("layers_to_transform")
    for layer in layers if isinstance(layers, list) else [0 if layers is None else layers]:
        check_int("layers_to_transform", layer, low=0)


def _check_names(name: str, value: object) -> None:
    if not isinstance(value, list) or not all(isinstance(item, str) and item for item in value):
        raise ValueError(f"{name} must be names of modules, got {value!r}")


def _compile(name: str, pattern: str, form: str = "{}") -> re.Pattern[str]:
    """A pattern of the configuration. A stranger wrote it, so one that could take exponential time is refused."""
    repeats = sum(map(pattern.count, "*+{"))
    if len(pattern) > _MAX_PATTERN or repeats > _MAX_REPEATS or _NESTED.search(pattern):
        raise ValueError(
            f"{name}: the pattern {pattern[:80]!r} is not supported: it is longer than {_MAX_PATTERN} characters, has "
            f"more than {_MAX_REPEATS} "
            "repetitions, or repeats a group"
        )
    try:
        return re.compile(form.format(pattern))
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{name}: {pattern!r} is not a regular expression: {error}") from None


def _scaling(fields: Mapping[str, Any]) -> Callable[[str], tuple[int, float]]:
    """A function from a module to its rank and scaling: alpha / rank, or alpha / sqrt(rank) with ``use_rslora``."""
    exponent = 0.5 if fields.get("use_rslora") else 1.0

    def of_pattern(name: str, module: str, default: Any) -> Any:
        for pattern, value in (fields.get(name) or {}).items():
            if _compile(name, pattern, r"(?:.*\.)?(?:{})").fullmatch(
                module
            ):  # as in PEFT, the first pattern that fits the end of the name counts
                return value
        return default

    def scaling(module: str) -> tuple[int, float]:
        rank = of_pattern("rank_pattern", module, fields.get("r", 8))
        alpha = of_pattern("alpha_pattern", module, fields.get("lora_alpha", 8))
        check_int(f"rank of {module}" if module else "r", rank, low=1, high=MAX_WIDTH)
        if alpha != 0:
            check_positive(f"lora_alpha of {module}" if module else "lora_alpha", alpha)
        return rank, alpha / rank**exponent

    scaling("")
    return scaling


class _Taker:
    """Goes through the tensors of an adapter, and collects faults."""

    def __init__(
        self, path: Path, fields: Mapping[str, Any], config: ModelConfig, tensors: Mapping[str, TensorInfo]
    ) -> None:
        self._path, self._fields, self._config = path, fields, config
        self._tensors = tensors
        self._faults: list[str] = []
        self._expected = {(tensor.layer, tensor.part): tensor for tensor in HF.expected(config, has_head=True)}
        self._by_module = {
            prefix + tensor.module.removeprefix("model."): key
            for prefix in _PREFIXES
            for key, tensor in self._expected.items()
        }

    def take(self, scaling_of: Callable[[str], tuple[int, float]]) -> Adapter:
        """The adapter; raises ``ValueError`` listing the faults."""
        pairs, whole = self._sorted()
        vocab_size = self._vocab_size(whole)
        for key, info in whole.items():
            expected = self._expected[key]
            if key[1] not in WITH_VOCABULARY and not self._is_saved(expected):
                self._faults.append(f"{expected.module}: is there in full, and modules_to_save does not name it")
            shape = (vocab_size, *expected.shape[1:]) if expected.part in WITH_VOCABULARY else expected.shape
            self._check(info, "in full", shape)
        low_rank = {}
        for key, pair in pairs.items():
            expected = self._expected[key]
            if len(pair) < 2:
                self._faults.append(f"{expected.module}: lora_{next(iter(pair))} is there and its other half is not")
                continue
            try:
                rank, scaling = scaling_of(expected.module)
            except ValueError as error:
                self._faults.append(str(error))
                continue
            is_embedding = expected.part == "embed_tokens"
            rows, width = expected.shape[0], expected.shape[1]
            if expected.part in WITH_VOCABULARY:
                rows = vocab_size
            self._check(pair["A"], "lora_A", (rank, rows if is_embedding else width))
            self._check(pair["B"], "lora_B", (width if is_embedding else rows, rank))
            low_rank[key] = LowRank(pair["A"], pair["B"], scaling, is_embedding)
        self._check_targets(whole, low_rank)
        self._check_tied(low_rank)
        if not self._faults and not whole and not low_rank:
            self._faults.append("there are no tensors")
        if self._faults:
            more = f"\n  and {len(self._faults) - FAULTS_SHOWN} more" if len(self._faults) > FAULTS_SHOWN else ""
            listed = "".join(f"\n  {fault}" for fault in self._faults[:FAULTS_SHOWN])
            raise ValueError(
                f"{self._path / ADAPTER_FILES[1]} is not an adapter of this model and its own "
                f"configuration:{listed}{more}"
            )
        return Adapter(self._path, vocab_size, whole, low_rank)

    def _sorted(self) -> tuple[dict[Key, dict[str, TensorInfo]], dict[Key, TensorInfo]]:
        """The tensors by what they belong to: halves of products, and whole weights."""
        pairs: dict[Key, dict[str, TensorInfo]] = {}
        whole: dict[Key, TensorInfo] = {}
        stems = {name.removeprefix("base_model.model.") for name in self._tensors}
        for name, info in self._tensors.items():
            # "default" is an adapter's name, as old files have it.
            stem = name.removeprefix("base_model.model.").replace(".default.weight", ".weight")
            if stem.endswith(_REPLACED) and stem.removesuffix(_REPLACED) + ".weight" in stems:
                continue  # the model's own weight, stored beside the one that replaces it
            stem = stem.replace(".modules_to_save.weight", ".weight")
            suffix = next((suffix for suffix in _SUFFIXES if stem.endswith(suffix)), None)
            key = None if suffix is None else self._by_module.get(stem.removesuffix(suffix))
            if suffix is None or key is None or (_SUFFIXES[suffix] != "whole" and len(self._expected[key].shape) < 2):
                why = (
                    "DoRA is not supported"
                    if "lora_magnitude_vector" in name
                    else "it belongs to nothing in this model"
                )
                self._faults.append(f"{name}: {list(info.shape)} is not expected: {why}")
                continue
            other = whole.get(key) if _SUFFIXES[suffix] == "whole" else pairs.get(key, {}).get(_SUFFIXES[suffix])
            if other is not None:  # PEFT writes embeddings that have grown under two names
                if not _are_equal(info, other):
                    self._faults.append(f"{name}: is there under two names, and the numbers differ")
            elif _SUFFIXES[suffix] == "whole":
                whole[key] = info
            elif ("embedding" in suffix) != (self._expected[key].part == "embed_tokens"):
                self._faults.append(f"{name}: lora_embedding is for embeddings, and lora_A for projections")
            else:
                pairs.setdefault(key, {})[_SUFFIXES[suffix]] = info
        return pairs, whole

    def _vocab_size(self, whole: Mapping[Key, TensorInfo]) -> int:
        """The vocabulary with the tokens that the adapter has added."""
        size = self._config.vocab_size
        rows = {part: whole[None, part].shape[0] for part in WITH_VOCABULARY if _is_matrix(whole.get((None, part)))}
        for part, count in rows.items():
            if count < size or count > MAX_VOCAB:
                self._faults.append(f"{part}: has {count} rows, and the model's vocab_size is {size}")
        grown = max([size, *rows.values()])
        if grown > size and len(rows) < 2:
            absent = "lm_head" if "embed_tokens" in rows else "embed_tokens"
            self._faults.append(f"the vocabulary grows from {size} to {grown}, and {absent} is not in the adapter")
        return grown

    def _check(self, info: TensorInfo, what: str, shape: tuple[int, ...]) -> None:
        name = next(name for name, stored in self._tensors.items() if stored is info)
        if info.shape != shape:
            self._faults.append(f"{name}: {what} must be {list(shape)}, found {list(info.shape)}")
        elif info.dtype not in _FLOATING:
            self._faults.append(f"{name}: must be {', '.join(_FLOATING[:-1])} or {_FLOATING[-1]}, found {info.dtype}")

    def _is_saved(self, expected: ExpectedTensor) -> bool:
        return any(expected.module.endswith(name) for name in self._fields.get("modules_to_save") or [])

    def _check_targets(self, whole: Mapping[Key, TensorInfo], low_rank: Mapping[Key, LowRank]) -> None:
        """Add a fault for each product that ``target_modules`` does not name, for each that it names and the adapter
        lacks, and for each of ``modules_to_save`` that the adapter does not hold whole.
        """
        for name in self._fields.get("modules_to_save") or []:
            if not any(self._expected[key].module.endswith(name) for key in whole):
                self._faults.append(f"modules_to_save names {name}, and it is not there in full")
        targets, layers = self._fields.get("target_modules"), self._fields.get("layers_to_transform")
        if targets is None:
            return
        layers = [layers] if isinstance(layers, int) else layers
        for key, expected in self._expected.items():
            if len(expected.shape) < 2:
                continue
            is_named = _is_target(targets, expected) and (not layers or key[0] is None or key[0] in layers)
            if key in low_rank and not is_named:
                self._faults.append(f"{expected.module}: has lora_A and lora_B, and target_modules does not name it")
            elif is_named and key not in low_rank and not self._fields.get("exclude_modules"):
                self._faults.append(f"{expected.module}: target_modules names it, and lora_A and lora_B are not there")

    def _check_tied(self, low_rank: Mapping[Key, LowRank]) -> None:
        """Add a fault for a product on head or embeddings where both are one tensor: it would change the other too,
        which training did not.
        """
        for part in WITH_VOCABULARY:
            if self._config.tie_word_embeddings and (None, part) in low_rank:
                self._faults.append(
                    f"{part}: lora_A and lora_B of what tie_word_embeddings makes one are not supported"
                )


def _are_equal(first: TensorInfo, second: TensorInfo) -> bool:
    """Whether two tensors hold the same numbers."""
    if (first.shape, first.dtype) != (second.shape, second.dtype):
        return False
    buffers = bytearray(first.nbytes), bytearray(first.nbytes)
    for info, buffer in zip((first, second), buffers, strict=True):
        read_into(info, memoryview(buffer))
    return buffers[0] == buffers[1]


def _is_matrix(info: TensorInfo | None) -> bool:
    return info is not None and len(info.shape) == 2


def _is_target(targets: list[str] | str, expected: ExpectedTensor) -> bool:
    if targets == "all-linear":
        return expected.layer is not None
    if isinstance(targets, str):
        return any(
            re.fullmatch(targets, prefix + expected.module.removeprefix("model.")) is not None for prefix in _PREFIXES
        )
    return any(expected.module == name or expected.module.endswith(f".{name}") for name in targets)
