"""The weights of a model in memory, and three ways to come by them: allocate, load a checkpoint, draw them at random.

Everything is checked before anything is allocated, then tensors go one by one to where they belong; so the peak is the
weights plus one tensor. Must not know how checkpoints are found.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass

import torch

from nemo_engine.config import ModelConfig
from nemo_engine.ledger import Ledger
from nemo_engine.model.checkpoint import Checkpoint
from nemo_engine.model.layout import ExpectedTensor, expected_tensors, is_ignored, tensor_name
from nemo_engine.model.linear import DenseLinear
from nemo_engine.model.progress import progress_bar

FAULTS_SHOWN = 8  # in one error message
DUMMY_PERIOD = 262_139  # random numbers drawn per dummy tensor, then repeated; prime, so that no two rows are alike

_FLOATING = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_logger = logging.getLogger("nemo_engine")


@dataclass(frozen=True, slots=True, eq=False)
class LayerWeights:
    """One decoder layer. H hidden, I intermediate, Q and K the widths of all query heads and of all key heads.

    ``qkv`` (Q + 2 K, H) has the rows [q; k; v], ``gate_up`` (2 I, H) has [gate; up]; ``o`` is (H, Q), ``down`` (H, I), the
    norms (H,). Query and key heads are in half-split rotary order.
    """

    input_layernorm: torch.Tensor
    qkv: DenseLinear
    o: DenseLinear
    post_attention_layernorm: torch.Tensor
    gate_up: DenseLinear
    down: DenseLinear


@dataclass(frozen=True, slots=True, eq=False)
class NemoWeights:
    """A whole model: ``embed_tokens`` (V, H), ``norm`` (H,), ``lm_head`` (V, H). Tied, the last holds the first's tensor."""

    embed_tokens: torch.Tensor
    layers: tuple[LayerWeights, ...]
    norm: torch.Tensor
    lm_head: DenseLinear

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors, tied ones counted once."""
        layers = sum(
            layer.input_layernorm.nbytes + layer.post_attention_layernorm.nbytes
            + layer.qkv.num_bytes + layer.o.num_bytes + layer.gate_up.num_bytes + layer.down.num_bytes
            for layer in self.layers
        )  # fmt: skip
        head = 0 if self.lm_head.weight is self.embed_tokens else self.lm_head.num_bytes
        return self.embed_tokens.nbytes + layers + self.norm.nbytes + head


def load_weights(
    checkpoint: Checkpoint,
    config: ModelConfig,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    progress: bool | None = None,
    ledger: Ledger | None = None,
) -> NemoWeights:
    """Check and load ``checkpoint`` as ``dtype`` onto ``device``, tensor by tensor.

    ``progress`` shows a bar; None shows one on a terminal if loading takes longer than a second. Raises ``ValueError``
    listing the tensors that are missing, too many, or of wrong shape or dtype.
    """
    ledger = Ledger() if ledger is None else ledger
    with ledger.stage("check tensors"):
        check_tensors(checkpoint, config)
    with ledger.stage("load weights") as stage:
        weights = empty_weights(config, dtype, torch.device(device))
        stage.num_bytes = weights.num_bytes
        expected = expected_tensors(config, checkpoint.layout)
        expected.sort(key=lambda tensor: _place_on_disk(checkpoint, tensor))
        total = sum(checkpoint.tensors[tensor.name].nbytes for tensor in expected)
        loader = _TensorLoader(checkpoint, config, weights)
        with progress_bar("load weights", total, progress) as advance:
            for tensor in expected:
                loader.load(tensor)
                advance(checkpoint.tensors[tensor.name].nbytes)
        del loader  # and its buffer
        _check_tied_head(checkpoint, config, weights)
    return weights


def dummy_weights(
    config: ModelConfig, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0
) -> NemoWeights:
    """Seeded random weights at which activations stay near 1. A tensor depends on seed, name and shape only.

    Up to ``DUMMY_PERIOD`` numbers are drawn per tensor, on the CPU in fp32, and repeated, so that 12B parameters take
    seconds and every device and dtype has the same ones.
    """
    weights = empty_weights(config, dtype, torch.device(device))
    residual_scale = (2 * config.num_layers) ** -0.5  # 2 additions per layer together add a variance near 1
    for tensor in expected_tensors(config, "hf"):
        destination = _destination(weights, config, tensor)
        if len(tensor.shape) == 1:
            destination.fill_(1.0)
            continue
        scale = tensor.shape[1] ** -0.5
        if tensor.part in ("o_proj", "down_proj"):
            scale *= residual_scale
        elif tensor.part == "embed_tokens" and not config.tie_word_embeddings:
            scale = 1.0
        digest = hashlib.sha256(f"{seed}/{tensor.name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
        flat = destination.view(-1)
        block = torch.randn(min(flat.numel(), DUMMY_PERIOD), generator=generator).mul_(scale).to(flat.device, dtype)
        for start in range(0, flat.numel(), DUMMY_PERIOD):
            part = flat[start : start + DUMMY_PERIOD]
            part.copy_(block[: part.numel()])
    return weights


def check_tensors(checkpoint: Checkpoint, config: ModelConfig) -> None:
    """Raise ``ValueError`` unless ``checkpoint`` holds exactly the tensors that ``config`` needs; reads headers only."""
    expected = {tensor.name: tensor.shape for tensor in expected_tensors(config, checkpoint.layout)}
    optional = {}
    if config.tie_word_embeddings:
        optional[tensor_name(checkpoint.layout, "lm_head")] = (config.vocab_size, config.hidden_size)
    faults = [
        f"{name}: expected {list(shape)}, not found"
        for name, shape in expected.items()
        if name not in checkpoint.tensors
    ]
    for name, info in checkpoint.tensors.items():
        shape = expected.get(name, optional.get(name))
        if shape is None:
            if is_ignored(name):
                _logger.info("%s in %s is not used: rotary frequencies follow from rope_theta", name, info.file.name)
            else:
                faults.append(f"{name}: not expected, found {list(info.shape)} in {info.file.name}")
        elif info.shape != shape:
            faults.append(f"{name}: expected {list(shape)}, found {list(info.shape)} in {info.file.name}")
        elif info.dtype not in _FLOATING:
            found = str(info.dtype).removeprefix("torch.")
            later = " (FP8 support will bring it)" if "float8" in found else ""
            faults.append(f"{name}: expected bfloat16, float16 or float32, found {found} in {info.file.name}{later}")
    if faults:
        more = f"\n  and {len(faults) - FAULTS_SHOWN} more" if len(faults) > FAULTS_SHOWN else ""
        listed = "".join(f"\n  {fault}" for fault in faults[:FAULTS_SHOWN])
        raise ValueError(f"the tensors of {checkpoint.path} are not those of its configuration:{listed}{more}")


def empty_weights(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> NemoWeights:
    """Memory for the weights of ``config``, uninitialised."""

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    hidden, inner = config.hidden_size, config.intermediate_size
    embed_tokens = empty(config.vocab_size, hidden)
    return NemoWeights(
        embed_tokens=embed_tokens,
        layers=tuple(
            LayerWeights(
                input_layernorm=empty(hidden),
                qkv=DenseLinear(empty(config.q_size + 2 * config.kv_size, hidden)),
                o=DenseLinear(empty(hidden, config.q_size)),
                post_attention_layernorm=empty(hidden),
                gate_up=DenseLinear(empty(2 * inner, hidden)),
                down=DenseLinear(empty(hidden, inner)),
            )
            for _ in range(config.num_layers)
        ),
        norm=empty(hidden),
        lm_head=DenseLinear(embed_tokens if config.tie_word_embeddings else empty(config.vocab_size, hidden)),
    )


def _destination(weights: NemoWeights, config: ModelConfig, tensor: ExpectedTensor) -> torch.Tensor:
    """The place of a checkpoint's tensor in ``weights``: contiguous, and of the tensor's shape."""
    if tensor.layer is None:
        outer = {"embed_tokens": weights.embed_tokens, "norm": weights.norm, "lm_head": weights.lm_head.weight}
        return outer[tensor.part]
    layer = weights.layers[tensor.layer]
    q, kv, inner = config.q_size, config.kv_size, config.intermediate_size
    places = {
        "input_layernorm": layer.input_layernorm,
        "q_proj": layer.qkv.weight[:q],
        "k_proj": layer.qkv.weight[q : q + kv],
        "v_proj": layer.qkv.weight[q + kv :],
        "o_proj": layer.o.weight,
        "post_attention_layernorm": layer.post_attention_layernorm,
        "gate_proj": layer.gate_up.weight[:inner],
        "up_proj": layer.gate_up.weight[inner:],
        "down_proj": layer.down.weight,
    }
    return places[tensor.part]


def _place_on_disk(checkpoint: Checkpoint, tensor: ExpectedTensor) -> tuple[str, int]:
    """Sorts tensors so that files are read from front to back."""
    info = checkpoint.tensors[tensor.name]
    return info.file.name, info.offset


class _TensorLoader:
    """Reads tensors straight to their places, or through one buffer where order, dtype or device differ.

    The buffer is allocated once: freed and allocated anew, buffers of changing sizes leave holes in the heap.
    """

    def __init__(self, checkpoint: Checkpoint, config: ModelConfig, weights: NemoWeights) -> None:
        self._checkpoint = checkpoint
        self._config = config
        self._weights = weights
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def load(self, tensor: ExpectedTensor) -> None:
        info = self._checkpoint.tensors[tensor.name]
        out = _destination(self._weights, self._config, tensor)
        is_interleaved = self._checkpoint.layout == "mistral" and tensor.part in ("q_proj", "k_proj")
        if out.device.type == "cpu" and out.dtype == info.dtype and not is_interleaved:
            self._checkpoint.read(tensor.name, out=out)
            return
        if self._buffer.numel() == 0:
            largest = max(info.nbytes for info in self._checkpoint.tensors.values())
            self._buffer = torch.empty(largest, dtype=torch.uint8)
        stored = self._buffer[: info.nbytes].view(info.dtype).view(info.shape)
        self._checkpoint.read(tensor.name, out=stored)
        if is_interleaved:
            # (heads, D/2, 2, H) -> (heads, 2, D/2, H): the interleaved pairs become the two halves of a head
            heads, half = tensor.shape[0] // self._config.head_dim, self._config.head_dim // 2
            stored = stored.view(heads, half, 2, -1).transpose(1, 2)
            out = out.view(heads, 2, half, -1)
        out.copy_(stored)


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
