"""From a checkpoint's files into weights: as stored, merged with an adapter, or quantised on the way.

Everything is checked before anything is allocated, then tensors go one by one to where they belong, part by part, while
a thread reads the next part; so the peak is the weights plus one tensor. FP8 numbers are never quantised again: each
part of a fused projection keeps its scales.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import replace

import torch

from nemo_engine.checkpoint.checkpoint import Checkpoint
from nemo_engine.checkpoint.inventory import Inventory, StoredTensor, take_inventory
from nemo_engine.checkpoint.progress import progress_bar
from nemo_engine.checkpoint.quant_config import Quantization
from nemo_engine.checkpoint.read_ahead import Part, ReadAhead
from nemo_engine.checkpoint.safetensors_files import TensorInfo, read_into
from nemo_engine.config import ModelConfig
from nemo_engine.model.linear import Fp8Linear, Linear
from nemo_engine.model.weights import LayerWeights, NemoWeights, Place, empty_weights, place_of
from nemo_engine.ops.linear import SCALE_BLOCK
from nemo_engine.startup_log import StartupLog

_ROWS = 1024  # rows that are widened to fp32 at a time
_PART_BYTES = 32 << 20  # read into a buffer at a time, at most

_logger = logging.getLogger("nemo_engine")


def load_weights(
    checkpoint: Checkpoint,
    config: ModelConfig,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    progress: bool | None = None,
    startup_log: StartupLog | None = None,
    inventory: Inventory | None = None,
    online: Quantization | None = None,
    needs_kv_scales: bool = False,
    is_widened: bool = False,
) -> NemoWeights:
    """Check and load ``checkpoint`` as ``dtype`` onto ``device``, tensor by tensor.

    progress: shows a bar; None shows one on a terminal if loading takes longer than a second. online: quantise the
    projections that it covers and that are not FP8 already. inventory: that of this checkpoint and ``online``, if the
    caller has it. needs_kv_scales: read the scales of keys and values, where there are any. is_widened: FP8 weights
    are kept as fp32 numbers. Raises ``ValueError`` listing the tensors that are missing, too many, or of wrong shape
    or dtype, and for NaN or infinity in an adapter or in a tensor that is or becomes FP8.
    """
    startup_log = StartupLog() if startup_log is None else startup_log
    if inventory is None:
        with startup_log.stage("check tensors"):
            inventory = take_inventory(checkpoint, config, online)
    has_kv_scales = needs_kv_scales and bool(inventory.kv_scales)
    with startup_log.stage(_stage_name(checkpoint, inventory, online, is_widened)) as stage:
        weights = empty_weights(config, dtype, torch.device(device), inventory.kind_of, has_kv_scales=has_kv_scales)
        tensors = sorted(inventory.tensors, key=lambda tensor: (tensor.info.file.name, tensor.info.offset))
        loader = _TensorLoader(checkpoint, config, weights)
        # Two buffers are at most one tensor.
        largest = min(_PART_BYTES, max(tensor.info.nbytes for tensor in tensors) // 2)
        parts = [loader.parts(tensor, largest) for tensor in tensors]
        with (
            progress_bar("load weights", sum(tensor.info.nbytes for tensor in tensors), progress) as advance,
            ReadAhead([part for some in parts for part in some], torch.device(device).type == "cuda") as ahead,
        ):
            for tensor, some in zip(tensors, parts, strict=True):
                if some:
                    for part in some:
                        loader.load_part(tensor, part, ahead.take(part))
                        advance(part.nbytes)
                    loader.finish(tensor)
                else:
                    loader.load(tensor)
                    advance(tensor.info.nbytes)
        if has_kv_scales:
            loader.load_kv_scales(inventory)
        if inventory.repeated_head is not None:
            loader.check_repeated_head(inventory.repeated_head)
        del loader  # and its buffer
        if is_widened:
            layers, without_layers = list(weights.layers), replace(weights, layers=())
            del weights  # so that a layer's FP8 numbers go as it is widened
            weights = _widened(layers, without_layers)
        stage.num_bytes = weights.num_bytes
    return weights


def _stage_name(checkpoint: Checkpoint, inventory: Inventory, online: Quantization | None, is_widened: bool) -> str:
    """The name of the stage in the start-up log: it says what loading does with adapters and FP8."""
    stored = checkpoint.quantization
    parts = []
    if checkpoint.adapter is not None:
        parts.append(f"merged with {checkpoint.adapter.describe()}")
    in_fp8 = stored is not None and any(tensor.scales is not None for tensor in inventory.tensors)
    if stored is not None and in_fp8:
        parts.append(stored.describe())
        if stored.activations == "none":
            parts.append("dequantised, as inputs are not quantised")
    if online is not None:
        parts.append(f"quantised to FP8, a scale per {online.weights}")
    if is_widened and (in_fp8 or online is not None):
        parts.append("kept as fp32 numbers")
    return "load weights" + (f" ({'; '.join(parts)})" if parts else "")


class TensorReader:
    """Reads tensors as the model has them: heads in half-split order, an adapter merged, FP8 numbers times their
    scales.

    Tensors that are not read to where they belong go through one buffer, allocated once: buffers of changing sizes,
    freed and allocated anew, would leave holes in the heap.
    """

    def __init__(self, checkpoint: Checkpoint, head_dim: int) -> None:
        self._checkpoint = checkpoint
        self._head_dim = head_dim
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def stored(self, tensor: StoredTensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """The numbers of the file, rows in half-split order. They are read into ``out``, of the same shape and dtype,
        or into the buffer, where the next call overwrites them.
        """
        if out is None:
            if self._buffer.numel() == 0:
                self._buffer = torch.empty(
                    max(info.nbytes for info in self._checkpoint.tensors.values()), dtype=torch.uint8
                )
            out = self._buffer[: tensor.info.nbytes].view(getattr(torch, tensor.info.dtype)).view(tensor.info.shape)
        self.settle(tensor, read_tensor(tensor.info, out))
        return out

    def settle(self, tensor: StoredTensor, rows: torch.Tensor) -> None:
        """Bring whole heads of the tensor, as they were read, into our order, in place; check those of an adapter."""
        if tensor.is_interleaved:
            for head in rows.view(torch.uint8).unflatten(0, (-1, self._head_dim)):
                head.copy_(half_split(head, self._head_dim))
        if tensor.is_of_adapter and not rows.isfinite().all():
            raise ValueError(f"{tensor.info.file}: {tensor.expected.module} holds NaN or infinity")

    def rows(self, tensor: StoredTensor) -> Iterator[tuple[int, torch.Tensor]]:
        """Yields (first row, rows) of the tensor's values: all of them as stored, or, if scales or an adapter change
        them, ``_ROWS`` at a time in fp32.
        """
        numbers = self.stored(tensor)
        if tensor.scales is None and tensor.low_rank is None:
            yield 0, numbers
            return
        scales, delta, is_by_block = None, None, False
        if tensor.scales is not None:
            is_by_block = tensor.scales.kind == "block"
            scales = self.weight_scales(tensor, is_by_block=is_by_block)
            _check_numbers(tensor.expected.name, numbers, tensor.scales.weight, scales)
        if tensor.low_rank is not None:
            delta = _Delta(tensor)
        for start in range(0, numbers.shape[0], _ROWS):
            values = numbers[start : start + _ROWS].float()
            if scales is not None:
                values *= _scales_of_rows(scales, is_by_block, start, *values.shape)
            if delta is not None:
                values += delta.rows(start, values.shape[0])
            yield start, values

    def whole(self, tensor: StoredTensor) -> torch.Tensor:
        """The tensor's values in memory of their own."""
        if tensor.scales is None and tensor.low_rank is None:
            return self.stored(tensor, torch.empty(tensor.info.shape, dtype=getattr(torch, tensor.info.dtype)))
        return torch.cat([rows for _, rows in self.rows(tensor)])

    def weight_scales(self, tensor: StoredTensor, *, is_by_block: bool) -> torch.Tensor:
        """The scales in fp32: (rows, 1), in half-split order, or (blocks, blocks) if ``is_by_block``."""
        assert tensor.scales is not None
        scales = self.scale(tensor.scales.weight)
        if is_by_block:
            return scales
        scales = scales.reshape(-1, 1).expand(tensor.expected.shape[0], 1)
        return half_split(scales, self._head_dim) if tensor.is_interleaved else scales

    def scale(self, name: str, *, may_be_zero: bool = True) -> torch.Tensor:
        """A tensor of scales in fp32.

        Raises ``ValueError`` for a number that cannot be a scale. 0 can be the scale of weights that are all 0.
        """
        scales = read_tensor(self._checkpoint.tensors[name]).float()
        wrong = ~scales.isfinite() | (scales < 0 if may_be_zero else scales <= 0)
        if wrong.any():
            limit = "not negative" if may_be_zero else "greater than 0"
            raise ValueError(f"{name} must be finite and {limit}, got {scales[wrong][:8].tolist()}")
        return scales


class _Delta:
    """The numbers that an adapter adds to a tensor, in fp32, as PEFT computes them: (B A) times the scaling."""

    def __init__(self, tensor: StoredTensor) -> None:
        assert tensor.low_rank is not None
        self._low_rank, self._module = tensor.low_rank, tensor.expected.module
        self._a, self._b = (self._read(info) for info in (tensor.low_rank.a, tensor.low_rank.b))
        if self._low_rank.is_embedding:  # the transpose of the product
            self._a, self._b = self._b.T, self._a.T

    def rows(self, start: int, count: int) -> torch.Tensor:
        """Rows ``start`` to ``start + count - 1``."""
        delta = (self._b[start : start + count] @ self._a).mul_(self._low_rank.scaling)
        if not delta.isfinite().all():
            raise ValueError(f"{self._low_rank.a.file}: what is added to {self._module} is not finite in fp32")
        return delta

    def _read(self, info: TensorInfo) -> torch.Tensor:
        half = read_tensor(info).float()
        if not half.isfinite().all():
            letter = "A" if info is self._low_rank.a else "B"
            raise ValueError(f"{info.file}: lora_{letter} of {self._module} holds NaN or infinity")
        return half


class _TensorLoader:
    """Puts tensors into their places: straight from the file where dtype and device allow it."""

    def __init__(self, checkpoint: Checkpoint, config: ModelConfig, weights: NemoWeights) -> None:
        self._config = config
        self._weights = weights
        self._names = checkpoint.names
        self._reader = TensorReader(checkpoint, config.head_dim)

    def parts(self, tensor: StoredTensor, most_bytes: int) -> list[Part]:
        """How the tensor is read ahead, by whole heads and blocks of scales: into its place, or in parts of at most
        ``most_bytes`` where that is enough. Empty if its numbers are wanted as a whole: to merge or to dequantise them.
        """
        place, info = self._place(tensor), tensor.info
        if tensor.low_rank is not None or (tensor.scales is not None and place.scales is None):
            return []
        is_as_stored = (tensor.scales is None) == (place.scales is None)
        if is_as_stored and _can_be_read_into(place.values, info):
            return [Part(info, 0, info.nbytes, place.values)]
        unit = math.lcm(SCALE_BLOCK, self._config.head_dim) * (info.nbytes // info.shape[0])
        size = max(1, most_bytes // unit) * unit
        return [Part(info, begin, min(size, info.nbytes - begin)) for begin in range(0, info.nbytes, size)]

    def load_part(self, tensor: StoredTensor, part: Part, content: torch.Tensor) -> None:
        """One of ``parts``, as it was read."""
        info, place = tensor.info, self._place(tensor)
        rows = content.view(getattr(torch, info.dtype)).view(-1, *info.shape[1:])
        self._reader.settle(tensor, rows)
        start = part.begin // (info.nbytes // info.shape[0])
        if part.out is not None:
            return
        if tensor.scales is not None:
            place.values[start : start + len(rows)].view(torch.uint8).copy_(rows.view(torch.uint8))
        else:
            place.store(tensor.expected.name, rows, start)

    def load(self, tensor: StoredTensor) -> None:
        """One tensor that is wanted as a whole."""
        place = self._place(tensor)
        for start, rows in self._reader.rows(tensor):
            place.store(tensor.expected.name, rows, start)
        self.finish(tensor)

    def _place(self, tensor: StoredTensor) -> Place:
        return place_of(self._weights, self._config, tensor.expected)

    def finish(self, tensor: StoredTensor) -> None:
        """What follows once a tensor is in its place: its scales, and what is a copy of it."""
        expected, stored, place = tensor.expected, tensor.scales, self._place(tensor)
        if stored is not None and place.scales is not None:
            scales = self._reader.weight_scales(tensor, is_by_block=place.is_by_block)
            _check_numbers(expected.name, place.values, stored.weight, scales)
            place.scales.copy_(scales)
            if stored.input is not None:
                self._load_input_scale(place, stored.input)
        if expected.part == "embed_tokens" and self._config.tie_word_embeddings:
            # The head of tied embeddings is a copy where it is FP8.
            head = place_of(self._weights, self._config, replace(expected, part="lm_head"))
            if head.scales is not None:
                head.store(expected.name, self._weights.embed_tokens)

    def _load_input_scale(self, place: Place, name: str) -> None:
        assert isinstance(place.linear, Fp8Linear) and place.linear.input_scale is not None
        # Parts of a fused projection have one input; where their scales differ all the same, none may saturate.
        largest = place.linear.input_scale
        scale = self._reader.scale(name, may_be_zero=False).to(largest.device).view(())
        if largest > 0 and scale != largest:
            _logger.info("%s differs from its neighbours' scales: the largest is taken", name)
        torch.maximum(largest, scale, out=largest)

    def load_kv_scales(self, inventory: Inventory) -> None:
        """Load the scales of keys and values of every layer: one for all heads, or one per head."""
        for layer, names in inventory.kv_scales.items():
            weights = self._weights.layers[layer]
            for name, to in zip(names, (weights.k_scale, weights.v_scale), strict=True):
                assert to is not None
                to.copy_(self._reader.scale(name, may_be_zero=False).reshape(-1).expand_as(to))

    def check_repeated_head(self, head: StoredTensor) -> None:
        """Raise ``ValueError`` if the head of a tied checkpoint differs from the embeddings: one would be dropped."""
        embeddings = self._weights.embed_tokens
        if not torch.equal(self._reader.stored(head).to(embeddings.device, embeddings.dtype), embeddings):
            raise ValueError(
                f"{head.info.file.parent}: the configuration ties lm_head to the embeddings, but {head.expected.name} "
                "in "
                f"{head.info.file.name} differs from {self._names.tensor('embed_tokens')}"
            )


def read_tensor(info: TensorInfo, out: torch.Tensor | None = None) -> torch.Tensor:
    """Read a tensor as the file holds it, to the CPU; into ``out`` (same dtype and shape, contiguous) if given."""
    dtype = getattr(torch, info.dtype)
    if out is None:
        out = torch.empty(info.shape, dtype=dtype)
    assert out.is_contiguous() and out.dtype == dtype and out.shape == info.shape and out.device.type == "cpu"
    read_into(info, out.view(-1).view(torch.uint8).numpy().data)
    return out


def _can_be_read_into(values: torch.Tensor, info: TensorInfo) -> bool:
    return values.device.type == "cpu" and values.dtype == getattr(torch, info.dtype)


def half_split(rows: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows of heads in interleaved rotary order, copied into half-split order."""
    return rows.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


def _scales_of_rows(scales: torch.Tensor, is_by_block: bool, start: int, count: int, width: int) -> torch.Tensor:
    """The scales of ``count`` rows from ``start`` on, where a block begins: (count, 1), or (count, width)."""
    if not is_by_block:
        return scales[start : start + count]
    blocks = scales[start // SCALE_BLOCK :][: -(-count // SCALE_BLOCK)]
    return blocks.repeat_interleave(SCALE_BLOCK, 0)[:count].repeat_interleave(SCALE_BLOCK, 1)[:, :width]


def _check_numbers(name: str, numbers: torch.Tensor, scale_name: str, scales: torch.Tensor) -> None:
    """Raise ``ValueError`` for NaN among FP8 ``numbers``, and for a scale of 0 whose numbers are not 0."""
    magnitudes = numbers.view(torch.uint8) & 0x7F
    if (magnitudes == 0x7F).any():  # e4m3 has no infinity
        raise ValueError(f"{name} holds NaN")
    for row, column in (scales == 0).nonzero().tolist():
        height, width = (1, numbers.shape[1]) if scales.shape[0] == numbers.shape[0] else (SCALE_BLOCK, SCALE_BLOCK)
        first_row, first_column = row * height, column * width
        if magnitudes[first_row : first_row + height, first_column : first_column + width].any():
            raise ValueError(f"{scale_name} is 0 for row {first_row} of {name}, whose numbers are not 0")


def _widened(layers: list[LayerWeights], without_layers: NemoWeights) -> NemoWeights:
    """``without_layers`` with ``layers``, which are replaced one by one."""

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
    return replace(without_layers, layers=tuple(layers), lm_head=widen(without_layers.lm_head))
