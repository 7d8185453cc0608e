"""From a checkpoint's files into weights: as stored, or quantised on the way.

Everything is checked before anything is allocated, then tensors go one by one to where they belong; so the peak is the weights plus one
tensor. FP8 numbers are never quantised again: each part of a fused projection keeps its scales.
"""

from __future__ import annotations

import logging
from dataclasses import replace

import torch

from nemo_engine.config import ModelConfig
from nemo_engine.ledger import Ledger
from nemo_engine.model.checkpoint import Checkpoint
from nemo_engine.model.inventory import Inventory, StoredScales, take_inventory
from nemo_engine.model.layout import ExpectedTensor, expected_tensors, tensor_name
from nemo_engine.model.linear import Fp8Linear, Linear
from nemo_engine.model.progress import progress_bar
from nemo_engine.model.quantization import Quantization
from nemo_engine.model.weights import LayerWeights, NemoWeights, Place, empty_weights, place_of
from nemo_engine.ops.linear import SCALE_BLOCK
from nemo_engine.ops.quantize import FP8

_ROWS = 1024  # of FP8 numbers that are widened at once

_logger = logging.getLogger("nemo_engine")


def load_weights(
    checkpoint: Checkpoint,
    config: ModelConfig,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    progress: bool | None = None,
    ledger: Ledger | None = None,
    inventory: Inventory | None = None,
    online: Quantization | None = None,
    needs_kv_scales: bool = False,
    is_widened: bool = False,
) -> NemoWeights:
    """Check and load ``checkpoint`` as ``dtype`` onto ``device``, tensor by tensor.

    progress: shows a bar; None shows one on a terminal if loading takes longer than a second. online: quantise the projections that it
    covers and that are not FP8 already. inventory: of this checkpoint and ``online``, if it has been taken. needs_kv_scales: read the scales of keys and values, where there are any. is_widened: FP8 weights
    are kept as fp32 numbers. Raises ``ValueError`` listing the tensors that are missing, too many, or of wrong shape or dtype, and for
    NaN or infinity in what is or becomes FP8.
    """
    ledger = Ledger() if ledger is None else ledger
    if inventory is None:
        with ledger.stage("check tensors"):
            inventory = take_inventory(checkpoint, config, online)
    has_kv_scales = needs_kv_scales and bool(inventory.kv_scales)
    with ledger.stage(_stage_name(checkpoint.quantization, inventory, online, is_widened)) as stage:
        weights = empty_weights(config, dtype, torch.device(device), inventory.kind_of, has_kv_scales=has_kv_scales)
        expected = expected_tensors(config, checkpoint.layout)
        expected.sort(key=lambda tensor: _place_on_disk(checkpoint, tensor))
        total = sum(checkpoint.tensors[tensor.name].nbytes for tensor in expected)
        loader = _TensorLoader(checkpoint, config, weights, inventory)
        with progress_bar("load weights", total, progress) as advance:
            for tensor in expected:
                loader.load(tensor)
                advance(checkpoint.tensors[tensor.name].nbytes)
        if has_kv_scales:
            loader.load_kv_scales()
        del loader  # and its buffer
        _check_tied_head(checkpoint, config, weights)
        if is_widened:
            layers, rest = list(weights.layers), replace(weights, layers=())
            del weights  # so that a layer's FP8 numbers go as it is widened
            weights = _widened(layers, rest)
        stage.num_bytes = weights.num_bytes
    return weights


def _stage_name(
    stored: Quantization | None, inventory: Inventory, online: Quantization | None, is_widened: bool
) -> str:
    """What loading does with FP8, for the ledger."""
    parts = []
    if inventory.scales and stored is not None:
        parts.append(stored.describe())
        if stored.activations == "none":
            parts.append("dequantised, as inputs are not quantised")
    if online is not None:
        parts.append(f"quantised to FP8, a scale per {online.weights}")
    if is_widened and parts:
        parts.append("kept as fp32 numbers")
    return "load weights" + (f" ({'; '.join(parts)})" if parts else "")


def _place_on_disk(checkpoint: Checkpoint, tensor: ExpectedTensor) -> tuple[str, int]:
    """Sorts tensors so that files are read from front to back."""
    info = checkpoint.tensors[tensor.name]
    return info.file.name, info.offset


class _TensorLoader:
    """Reads tensors straight to their places, or through one buffer where order, dtype or device differ.

    The buffer is allocated once: freed and allocated anew, buffers of changing sizes leave holes in the heap.
    """

    def __init__(self, checkpoint: Checkpoint, config: ModelConfig, weights: NemoWeights, inventory: Inventory) -> None:
        self._checkpoint = checkpoint
        self._config = config
        self._weights = weights
        self._inventory = inventory
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def load(self, tensor: ExpectedTensor) -> None:
        """One tensor, and its scales."""
        place = place_of(self._weights, self._config, tensor)
        stored = self._inventory.scales.get(tensor.name)
        if stored is None:
            self._load_numbers(tensor, place)
            if tensor.part == "embed_tokens" and self._config.tie_word_embeddings:
                self._load_tied_head(tensor)
            return
        if place.scales is None:
            self._dequantise(tensor, place, stored)
            return
        self._load_numbers(tensor, place)
        scales = self._weight_scales(tensor, stored, place.is_by_block)
        _check_numbers(tensor.name, place.values, stored.weight, scales)
        place.scales.copy_(scales)
        if stored.input is not None:
            assert isinstance(place.linear, Fp8Linear) and place.linear.input_scale is not None
            # Parts of a fused projection have one input; where their scales differ all the same, none may saturate.
            largest = place.linear.input_scale
            scale = self._scale(stored.input, may_be_zero=False).to(largest.device).view(())
            if largest > 0 and scale != largest:
                _logger.info("%s differs from its neighbours' scales: the largest is taken", stored.input)
            torch.maximum(largest, scale, out=largest)

    def load_kv_scales(self) -> None:
        """Scales of keys and values of every layer: one for all heads, or one per head."""
        for layer, names in self._inventory.kv_scales.items():
            weights = self._weights.layers[layer]
            for name, to in zip(names, (weights.k_scale, weights.v_scale), strict=True):
                assert to is not None
                to.copy_(self._scale(name, may_be_zero=False).reshape(-1).expand_as(to))

    def _load_numbers(self, tensor: ExpectedTensor, place: Place) -> None:
        """The values of ``tensor`` as they are stored, or in the place's dtype, or quantised."""
        info = self._checkpoint.tensors[tensor.name]
        out = place.values
        is_interleaved = self._is_interleaved(tensor)
        if out.device.type == "cpu" and out.dtype == info.dtype and not is_interleaved:
            self._checkpoint.read(tensor.name, out=out)
            return
        stored = self._read(tensor.name)
        if place.scales is not None and info.dtype != FP8:
            place.store(tensor.name, half_split(stored, self._config.head_dim) if is_interleaved else stored)
            return
        if info.dtype == FP8:
            out, stored = out.view(torch.uint8), stored.view(torch.uint8)
        if is_interleaved:
            out = _paired(out, self._config.head_dim, is_half_split=True)
            stored = _paired(stored, self._config.head_dim)
        out.copy_(stored)

    def _load_tied_head(self, tensor: ExpectedTensor) -> None:
        """The head of tied embeddings, where it is a copy because it is FP8."""
        place = place_of(self._weights, self._config, replace(tensor, part="lm_head"))
        if place.scales is not None:
            place.store(tensor.name, self._weights.embed_tokens)

    def _dequantise(self, tensor: ExpectedTensor, place: Place, stored: StoredScales) -> None:
        """FP8 numbers times their scales, into a dense projection."""
        numbers = self._read(tensor.name)
        if self._is_interleaved(tensor):
            numbers = half_split(numbers.view(torch.uint8), self._config.head_dim).view(FP8)
        is_by_block = stored.kind == "block"
        scales = self._weight_scales(tensor, stored, is_by_block)
        _check_numbers(tensor.name, numbers, stored.weight, scales)
        for start in range(0, numbers.shape[0], _ROWS):
            wide = numbers[start : start + _ROWS].float()
            if is_by_block:
                rows = scales.repeat_interleave(SCALE_BLOCK, 0)[start : start + wide.shape[0]]
                wide *= rows.repeat_interleave(SCALE_BLOCK, 1)[:, : wide.shape[1]]
            else:
                wide *= scales[start : start + _ROWS]
            place.values[start : start + _ROWS].copy_(wide)

    def _weight_scales(self, tensor: ExpectedTensor, stored: StoredScales, is_by_block: bool) -> torch.Tensor:
        """(rows, 1) fp32, whatever the checkpoint has a scale for, in our order of rows; or (blocks, blocks)."""
        scales = self._scale(stored.weight)
        if is_by_block:
            return scales
        scales = scales.reshape(-1, 1).expand(tensor.shape[0], 1)
        return half_split(scales, self._config.head_dim).reshape(-1, 1) if self._is_interleaved(tensor) else scales

    def _scale(self, name: str, *, may_be_zero: bool = True) -> torch.Tensor:
        """A tensor of scales in fp32. Raises ``ValueError`` if one cannot be a scale; 0 may be one of weights that are 0."""
        scales = self._checkpoint.read(name).float()
        wrong = ~scales.isfinite() | (scales < 0 if may_be_zero else scales <= 0)
        if wrong.any():
            limit = "not negative" if may_be_zero else "greater than 0"
            raise ValueError(f"{name} must be finite and {limit}, got {scales[wrong][:8].tolist()}")
        return scales

    def _read(self, name: str) -> torch.Tensor:
        """A tensor in the buffer; valid until the next."""
        info = self._checkpoint.tensors[name]
        if self._buffer.numel() == 0:
            largest = max(info.nbytes for info in self._checkpoint.tensors.values())
            self._buffer = torch.empty(largest, dtype=torch.uint8)
        stored = self._buffer[: info.nbytes].view(info.dtype).view(info.shape)
        self._checkpoint.read(name, out=stored)
        return stored

    def _is_interleaved(self, tensor: ExpectedTensor) -> bool:
        return self._checkpoint.layout == "mistral" and tensor.part in ("q_proj", "k_proj")


def half_split(rows: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows of heads in interleaved rotary order, copied into half-split order."""
    return _paired(rows, head_dim).flatten(0, 2)


def _paired(rows: torch.Tensor, head_dim: int, *, is_half_split: bool = False) -> torch.Tensor:
    """A view of (heads, 2, D / 2, ...): the halves of a head, whose rows lie in either order."""
    if is_half_split:
        return rows.unflatten(0, (-1, 2, head_dim // 2))
    return rows.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2)


def _check_numbers(name: str, numbers: torch.Tensor, scale_name: str, scales: torch.Tensor) -> None:
    """Raise ``ValueError`` for NaN among FP8 ``numbers``, and for a scale of 0 whose numbers are not 0."""
    magnitudes = numbers.view(torch.uint8) & 0x7F
    if (magnitudes == 0x7F).any():  # e4m3 has no infinity
        raise ValueError(f"{name} holds NaN")
    for row, column in (scales == 0).nonzero().tolist():
        height, width = (1, numbers.shape[1]) if scales.shape[0] == numbers.shape[0] else (SCALE_BLOCK, SCALE_BLOCK)
        first, left = row * height, column * width
        if magnitudes[first : first + height, left : left + width].any():
            raise ValueError(f"{scale_name} is 0 for row {first} of {name}, whose numbers are not 0")


def _widened(layers: list[LayerWeights], rest: NemoWeights) -> NemoWeights:
    """``rest`` with ``layers``, which are replaced one by one."""

    def widen(linear: Linear) -> Linear:
        return linear.widen() if isinstance(linear, Fp8Linear) else linear

    for index, layer in enumerate(layers):
        layers[index] = replace(
            layer,
            qkv=widen(layer.qkv),
            o=widen(layer.o),
            gate_up=widen(layer.gate_up),
            down=widen(layer.down),
        )
    return replace(rest, layers=tuple(layers), lm_head=widen(rest.lm_head))


def _check_tied_head(checkpoint: Checkpoint, config: ModelConfig, weights: NemoWeights) -> None:
    """A tied checkpoint may repeat the embeddings as its head; if they differ, one of the two would be dropped."""
    name = tensor_name(checkpoint.layout, "lm_head")
    if not config.tie_word_embeddings or name not in checkpoint.tensors:
        return
    head = checkpoint.read(name)
    if not torch.equal(head.to(weights.embed_tokens.device, weights.embed_tokens.dtype), weights.embed_tokens):
        raise ValueError(
            f"{checkpoint.path}: the configuration ties lm_head to the embeddings, but {name} in "
            f"{checkpoint.tensors[name].file.name} differs from {tensor_name(checkpoint.layout, 'embed_tokens')}"
        )
