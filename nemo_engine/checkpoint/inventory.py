"""The inventory of a checkpoint: each tensor with its name, file and scheme, checked against the configuration before
anything is allocated.

Reads headers only. ``loader`` works from the inventory and looks nothing up again. Must not know torch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from nemo_engine.checkpoint.checkpoint import Checkpoint
from nemo_engine.checkpoint.layout import HF, PROJECTION_OF, ExpectedTensor, is_ignored, size_fields
from nemo_engine.checkpoint.lora import LowRank
from nemo_engine.checkpoint.quant_config import (
    BLOCK,
    INPUT_SCALES,
    KV_SCALES,
    WEIGHT_SCALES,
    Quantization,
    is_unused_scale,
)
from nemo_engine.checkpoint.safetensors_files import TensorInfo
from nemo_engine.config import ModelConfig

FAULTS_SHOWN = 8  # in one error message

_FLOATING = ("bfloat16", "float16", "float32", "float64")
_FP8 = "float8_e4m3fn"
_logger = logging.getLogger("nemo_engine")


@dataclass(frozen=True, slots=True)
class LinearKind:
    """The kind of a projection: dense ("none"), or FP8 with a scale an output ("channel") or a 128 x 128 ("block")."""

    scales: Literal["none", "channel", "block"] = "none"
    has_input_scale: bool = False


DENSE = LinearKind()
KindOf = Callable[[int | None, str], LinearKind]  # called with (layer, projection) or (None, "lm_head")


@dataclass(frozen=True, slots=True)
class StoredScales:
    """The names of the scales beside an FP8 tensor, and whether a tensor, a channel or a block has a scale."""

    weight: str
    input: str | None
    kind: Literal["tensor", "channel", "block"]


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor of the model as files hold it.

    ``scales`` belong to FP8 numbers. ``low_rank`` is the product that an adapter adds; ``is_of_adapter`` says that the
    whole tensor is the adapter's. The rows of a query or key head may be in Mistral's order (``is_interleaved``).
    """

    expected: ExpectedTensor
    info: TensorInfo
    scales: StoredScales | None = None
    low_rank: LowRank | None = None
    is_interleaved: bool = False
    is_of_adapter: bool = False


@dataclass(frozen=True, slots=True)
class Inventory:
    """The tensors of a model; the names of the scales of each layer's keys and values; and the kind that each
    projection becomes.

    ``repeated_head`` is a head that the checkpoint holds although its embeddings are tied.
    """

    tensors: tuple[StoredTensor, ...] = ()
    repeated_head: StoredTensor | None = None
    kv_scales: Mapping[int, tuple[str, str]] = field(default_factory=dict)
    kinds: Mapping[tuple[int | None, str], LinearKind] = field(default_factory=dict)

    def kind_of(self, layer: int | None, projection: str) -> LinearKind:
        """What ``projection`` of ``layer`` is stored as here."""
        return self.kinds.get((layer, projection), DENSE)


def take_inventory(checkpoint: Checkpoint, config: ModelConfig, online: Quantization | None = None) -> Inventory:
    """Raise ``ValueError`` unless ``checkpoint`` holds exactly the tensors that ``config`` and its quantisation need.

    online: projections that it covers become FP8, unless they are already.
    """
    taker = _Taker(checkpoint, config)
    inventory = taker.take(online)
    if taker.faults:
        more = f"\n  and {len(taker.faults) - FAULTS_SHOWN} more" if len(taker.faults) > FAULTS_SHOWN else ""
        listed = "".join(f"\n  {fault}" for fault in taker.faults[:FAULTS_SHOWN])
        raise ValueError(f"the tensors of {checkpoint.path} are not those of its configuration:{listed}{more}")
    return inventory


def planned_inventory(config: ModelConfig, quantization: Quantization | None, online: Quantization | None) -> Inventory:
    """The inventory that a checkpoint of ``config`` and ``quantization`` would have, for dummy weights."""
    kinds: dict[tuple[int | None, str], LinearKind] = {}
    for tensor in HF.expected(config):
        if tensor.part not in PROJECTION_OF:
            continue
        for scheme in (online, quantization):
            if scheme is None or scheme.activations == "none":
                continue
            covered = scheme.covers(tensor.module)
            if tensor.part != "lm_head" if covered is None else covered:
                by: Literal["channel", "block"] = "block" if scheme.weights == "block" else "channel"
                kinds[tensor.layer, PROJECTION_OF[tensor.part]] = LinearKind(by, scheme.activations == "static")
    return Inventory(kinds=kinds)


class _Taker:
    """Goes through the tensors of a checkpoint, and collects faults."""

    def __init__(self, checkpoint: Checkpoint, config: ModelConfig) -> None:
        self.checkpoint = checkpoint
        self.config = config
        self.tensors = checkpoint.tensors
        self.faults: list[str] = []

    def take(self, online: Quantization | None) -> Inventory:
        names, config = self.checkpoint.names, self.config
        expected = names.expected(config, has_head=True)
        head = names.tensor("lm_head")
        if config.tie_word_embeddings and head not in self.tensors:  # may repeat its embeddings
            expected = [tensor for tensor in expected if tensor.part != "lm_head"]
        used = set()
        stored = []
        for tensor in expected:
            used.add(tensor.name)
            if tensor.name not in self.tensors:
                self.faults.append(f"{tensor.name}: expected {list(tensor.shape)}, not found{_without_head(tensor)}")
            elif not self._has_shape(tensor.name, tensor.shape):
                self.faults[-1] += f"; expected is {size_fields(names.layout, tensor.part)}"
            else:
                scales = self._scales_of(tensor) if self._is_fp8(tensor) else None
                if scales is not None:
                    used |= {name for name in (scales.weight, scales.input) if name is not None}
                stored.append(self._stored(tensor, scales))
        kv_scales = dict(self._kv_scales())
        used |= {name for pair in kv_scales.values() for name in pair}
        for name, info in self.tensors.items():
            if name in used:
                continue
            if is_ignored(name):
                _logger.info("%s in %s is not used: rotary frequencies follow from rope_theta", name, info.file.name)
            elif is_unused_scale(name):
                _logger.info("%s in %s is not used: queries and attention stay unquantised", name, info.file.name)
            else:
                self.faults.append(f"{name}: not expected, found {list(info.shape)} in {info.file.name}")
        repeated = next((tensor for tensor in stored if self._is_tied_copy(tensor.expected)), None)
        loaded = tuple(tensor for tensor in stored if tensor is not repeated)
        quantised = {tensor.expected.name for tensor in loaded if tensor.scales is not None}
        kinds = dict(self._kinds([tensor for tensor in expected if not self._is_tied_copy(tensor)], quantised, online))
        return Inventory(loaded, repeated, kv_scales, kinds)

    def _stored(self, tensor: ExpectedTensor, scales: StoredScales | None) -> StoredTensor:
        info, adapter = self.tensors[tensor.name], self.checkpoint.adapter
        key = (tensor.layer, tensor.part)
        is_of_adapter = adapter is not None and key in adapter.whole
        is_interleaved = self.checkpoint.layout == "mistral" and tensor.part in ("q_proj", "k_proj")
        low_rank = None if adapter is None else adapter.low_rank.get(key)
        return StoredTensor(tensor, info, scales, low_rank, is_interleaved and not is_of_adapter, is_of_adapter)

    def _has_shape(self, name: str, *shapes: tuple[int, ...]) -> bool:
        info = self.tensors[name]
        if info.shape in shapes:
            return True
        expected = " or ".join(str(list(shape)) for shape in shapes)
        self.faults.append(f"{name}: expected {expected}, found {list(info.shape)} in {info.file.name}")
        return False

    def _check_scale(self, name: str, *shapes: tuple[int, ...]) -> None:
        """Add a fault unless ``name`` has one of ``shapes`` and a floating-point dtype."""
        info = self.tensors[name]
        if self._has_shape(name, *shapes) and info.dtype not in _FLOATING:
            self.faults.append(
                f"{name}: expected bfloat16, float16, float32 or float64, found {info.dtype} in {info.file.name}"
            )

    def _is_fp8(self, tensor: ExpectedTensor) -> bool:
        """Whether ``tensor`` is stored as FP8; adds a fault if the configuration says otherwise."""
        info, quantization = self.tensors[tensor.name], self.checkpoint.quantization
        is_linear = tensor.part in PROJECTION_OF
        dtype = info.dtype
        if info.dtype != _FP8 and info.dtype not in _FLOATING:
            self.faults.append(
                f"{tensor.name}: expected bfloat16, float16, float32 or float8_e4m3fn, found {dtype} in "
                f"{info.file.name}"
            )
            return False
        module = tensor.name.removesuffix(".weight")
        covered = None if quantization is None else quantization.covers(module, tensor.module)
        if info.dtype == _FP8:
            if is_linear and quantization is not None and covered is not False and not self._is_tied_copy(tensor):
                return True
            reason = (
                "is no linear layer"
                if not is_linear
                else "the configuration ties it to the embeddings (tie_word_embeddings)"
                if self._is_tied_copy(tensor)
                else "the configuration has no quantization"
                if quantization is None
                else "the configuration leaves it out"
            )
            self.faults.append(f"{tensor.name}: found {dtype} in {info.file.name}, but {reason}")
        elif covered and is_linear and not self._is_tied_copy(tensor):
            self.faults.append(
                f"{tensor.name}: expected float8_e4m3fn, as the configuration's quantization covers it, found {dtype} "
                "in "
                f"{info.file.name}"
            )
        return False

    def _is_tied_copy(self, tensor: ExpectedTensor) -> bool:
        return tensor.part == "lm_head" and self.config.tie_word_embeddings

    def _scales_of(self, tensor: ExpectedTensor) -> StoredScales | None:
        """The scales beside an FP8 tensor; None, and a fault, if they are not those of its configuration."""
        quantization = self.checkpoint.quantization
        assert quantization is not None and quantization.weights != "none"
        module, (rows, width) = tensor.name.removesuffix(".weight"), tensor.shape
        weight = self._one_of(module, WEIGHT_SCALES)
        if weight is None:
            self.faults.append(f"{module}.weight_scale: expected beside an FP8 weight, not found")
            return None
        scalar = ((), (1,), (1, 1))
        shapes: dict[str, tuple[tuple[int, ...], ...]] = {
            "tensor": scalar,
            "channel": ((rows, 1), (rows,)),
            "block": ((-(-rows // BLOCK), -(-width // BLOCK)),),
        }
        self._check_scale(weight, *shapes[quantization.weights])
        inputs = self._one_of(module, INPUT_SCALES)
        if quantization.activations == "static" and inputs is None:
            self.faults.append(f"{module}.input_scale: expected, as activations have static scales, not found")
        if inputs is not None:
            self._check_scale(inputs, *scalar)
            if quantization.activations != "static":
                self.faults.append(f"{inputs}: not expected, as activations have no static scales")
        return StoredScales(weight, inputs, quantization.weights)

    def _one_of(self, module: str, suffixes: tuple[str, ...]) -> str | None:
        return next((f"{module}.{suffix}" for suffix in suffixes if f"{module}.{suffix}" in self.tensors), None)

    def _kv_scales(self) -> Iterator[tuple[int, tuple[str, str]]]:
        """(layer, name of the keys' scales, name of the values' scales) for every layer, or for none."""
        scales: dict[int, tuple[str, str]] = {}
        heads = self.config.num_kv_heads
        shapes = ((), (1,), (1, 1), (1, 1, 1), (heads,), (heads, 1), (1, heads), (heads, 1, 1))
        for layer in range(self.config.num_layers):
            module = self.checkpoint.names.attention(layer)
            names = {
                kind: next((name for form in forms if (name := form.format(module)) in self.tensors), None)
                for kind, forms in KV_SCALES.items()
            }
            k, v = names["k"] or names["both"], names["v"] or names["both"]
            if k is not None and v is not None:
                self._check_scale(k, *shapes)
                self._check_scale(v, *shapes)
                scales[layer] = (k, v)
            elif k is not None or v is not None:
                self.faults.append(
                    f"{k or v}: found in layer {layer}, but not the scale of its {'values' if k else 'keys'}"
                )
        if scales and len(scales) < self.config.num_layers:
            absent = next(layer for layer in range(self.config.num_layers) if layer not in scales)
            self.faults.append(f"layer {absent} has no scales of keys and values, and others have")
        quantization = self.checkpoint.quantization
        if not scales and not self.faults and quantization is not None and quantization.kv_cache:
            _logger.warning("%s is for FP8 keys and values and has no scales of them: 1 is taken", self.checkpoint.path)
        yield from scales.items()

    def _kinds(
        self, expected: list[ExpectedTensor], in_fp8: set[str], online: Quantization | None
    ) -> Iterator[tuple[tuple[int | None, str], LinearKind]]:
        """The kind that each projection becomes; the parts of a fused projection must agree."""
        quantization = self.checkpoint.quantization
        groups: dict[tuple[int | None, str], list[ExpectedTensor]] = {}
        for tensor in expected:
            if tensor.part in PROJECTION_OF:
                groups.setdefault((tensor.layer, PROJECTION_OF[tensor.part]), []).append(tensor)
        if self.config.tie_word_embeddings:
            groups[None, "lm_head"] = []
        for key, tensors in groups.items():
            names = [tensor.name for tensor in tensors]
            quantised = [name for name in names if name in in_fp8]
            if quantised and len(quantised) < len(names):
                plain = next(name for name in names if name not in in_fp8)
                self.faults.append(f"{plain}: is not FP8, and {quantised[0]} of the same fused projection is")
            kind = DENSE
            if quantised and quantization is not None and quantization.activations != "none":
                by = "block" if quantization.weights == "block" else "channel"
                kind = LinearKind(by, quantization.activations == "static")  # type: ignore[arg-type]
            elif not quantised and online is not None and online.covers(self._module(key)):
                kind = LinearKind("block" if online.weights == "block" else "channel")
            if kind.scales == "block":
                why = "" if quantised else ", so it cannot be quantised to 'fp8_block'"
                self.faults += [
                    f"{tensor.name}: its {tensor.shape[0]} rows are not whole blocks of {BLOCK}{why}"
                    for tensor in tensors[:-1]  # the next part of a fused projection begins at a block
                    if tensor.shape[0] % BLOCK
                ]
            if kind != DENSE:
                yield key, kind

    def _module(self, key: tuple[int | None, str]) -> str:
        layer, projection = key
        return projection if layer is None else f"model.layers.{layer}.{projection}"


def _without_head(tensor: ExpectedTensor) -> str:
    """A hint, for a checkpoint that has no head, at what may be wrong."""
    if tensor.part != "lm_head":
        return ""
    return (
        " (if the embeddings are the head, config.json says so by tie_word_embeddings; MistralModel is saved without "
        "one: save it from "
        "MistralForCausalLM)"
    )
