"""The FP8 schemes of checkpoints, read from the configuration of each tool that writes them.

compressed-tensors (llm-compressor), plain "fp8" (AutoFP8, DeepSeek's blocks), NVIDIA ModelOpt, and Mistral's own. All
come down to one ``Quantization``. Everything else is refused by the scheme's name.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from nemo_engine.config import EngineConfig

BLOCK = 128  # rows and columns of a weight that share a scale in the block scheme

# The names of scales, beside the ``weight`` of their module.
WEIGHT_SCALES = ("weight_scale", "weight_scale_inv", "qscale_weight")
INPUT_SCALES = ("input_scale", "act_scale", "activation_scale", "qscale_act")
# The names of the scales of keys and values; {} is the name of the layer's attention module.
KV_SCALES = {
    "k": (
        "{}.k_scale",
        "{}.attn.k_scale",
        "{}.k_proj.k_scale",
        "{}.k_proj.output_scale",
        "{}.k_fake_quantizer.qscale_act",
    ),
    "v": (
        "{}.v_scale",
        "{}.attn.v_scale",
        "{}.v_proj.v_scale",
        "{}.v_proj.output_scale",
        "{}.v_fake_quantizer.qscale_act",
    ),
    "both": ("{}.kv_scale", "{}.attn.kv_scale", "{}.kv_fake_quantizer.qscale_act"),
}
# Scales of queries and attention weights, which stay unquantised here.
_UNUSED = re.compile(r".*\.(q_scale|prob_output_scale|q_proj\.output_scale|q_fake_quantizer\.qscale_act)")


@dataclass(frozen=True, slots=True)
class Quantization:
    """How linear layers are stored, and how their inputs are quantised.

    weights: one scale per "tensor", per output "channel", or per "block" of 128 by 128; "none" if only keys and values
    are FP8.
    activations: quantised by a "static" scale per layer, by a "dynamic" one per token (and per 128 of it beside weights
    in blocks), or "none". covers() tells which modules. kv_cache: keys and values are meant to be FP8.
    """

    method: str  # "compressed-tensors", "fp8", "modelopt", "mistral"; or "online"
    weights: Literal["none", "tensor", "channel", "block"]
    activations: Literal["none", "static", "dynamic"]
    targets: tuple[str, ...] = ("Linear",)
    ignored: tuple[str, ...] = ()
    kv_cache: bool = False

    def covers(self, *names: str) -> bool | None:
        """Whether a module of these names ("model.layers.0.mlp.down_proj") is to be FP8; None if only the dtype of its
        tensor can tell.
        """
        if self.method == "mistral":
            return None
        if any(self._matches(pattern, name) for pattern in self.ignored for name in names):
            return False
        return any(self._matches(pattern, name) for pattern in self.targets for name in names)

    def _matches(self, pattern: str, module: str) -> bool:
        if pattern.startswith("re:"):
            return re.match(pattern[3:], module) is not None
        if pattern == "Linear":  # the name of a class, which all of these modules have
            return True
        if self.method == "modelopt":
            return fnmatch.fnmatchcase(module, pattern) or module.startswith(pattern.rstrip(".") + ".")
        return pattern == module or module.startswith(pattern + ".") or module.endswith("." + pattern)

    def describe(self) -> str:
        """The scheme in one line."""
        if self.weights == "none":
            return f"FP8 keys and values ({self.method}), weights not quantised"
        inputs = {"none": "inputs not quantised", "static": "static scales of inputs", "dynamic": "inputs by token"}
        kv = ", FP8 keys and values" if self.kv_cache else ""
        return f"FP8 weights ({self.method}), a scale per {self.weights}, {inputs[self.activations]}{kv}"


ONLINE = {
    "fp8": Quantization("online", "channel", "dynamic", ignored=("lm_head",)),
    "fp8_block": Quantization("online", "block", "dynamic", ignored=("lm_head",)),
}


def resolve_online(config: EngineConfig, stored: Quantization | None) -> Quantization | None:
    """The scheme that weights get while a checkpoint of scheme ``stored`` loads; None if they stay as they are.

    Raises ``ValueError`` if ``config`` asks for a scheme that this checkpoint cannot get.
    """
    name = config.quantization
    head = replace(ONLINE["fp8"], targets=("lm_head",), ignored=()) if config.quantize_lm_head else None
    if stored is not None and stored.weights != "none":
        if name is not None and (stored.activations == "none" or (name == "fp8_block") != (stored.weights == "block")):
            raise ValueError(
                f"quantization {name!r} conflicts with what the checkpoint is already: {stored.describe()}"
            )
        return head
    if name is None:
        return head
    return replace(ONLINE[name], ignored=()) if config.quantize_lm_head else ONLINE[name]


def is_unused_scale(name: str) -> bool:
    """Whether a tensor may stay unread because it is a scale for a part that this engine does not quantise."""
    return _UNUSED.fullmatch(name) is not None


def quantization_of(
    config: Mapping[str, Any], modelopt: Mapping[str, Any] | None = None, *, is_mistral: bool = False
) -> Quantization | None:
    """The scheme of a checkpoint, from its config.json (or params.json) and its hf_quant_config.json if it has one.

    None if it is not quantised. Raises ``ValueError`` naming a scheme that is not supported.
    """
    if is_mistral:
        if config.get("quantization_config") is not None:
            raise ValueError("params.json: quantization_config is not supported there: use the Hugging Face layout")
        block = config.get("quantization")
        return None if block is None else _of_mistral(_object("params.json: quantization", block))
    block = config.get("quantization_config")
    if block is None:
        block = config.get("compression_config")  # the name of this block in early compressed-tensors
    if block is None and modelopt is not None:
        modelopt = _object("hf_quant_config.json", modelopt)
        return _of_modelopt(_object("hf_quant_config.json: quantization", modelopt.get("quantization", modelopt)))
    if block is None:
        return None
    block = _object("config.json: quantization_config", block)
    method = str(block.get("quant_method", "unnamed"))
    if method == "compressed-tensors":
        return _of_compressed_tensors(block)
    if method == "fp8":
        return _of_plain_fp8(block)
    if method.startswith("modelopt"):
        return _of_modelopt(_object("config.json: quantization_config.quantization", block.get("quantization", block)))
    raise _unsupported(f"quant_method {method!r}", _bits_of(block), what=method)


def _of_compressed_tensors(block: Mapping[str, Any]) -> Quantization:
    sparsity = _object("sparsity_config", block.get("sparsity_config") or {})
    if sparsity.get("format", "dense") != "dense" or sparsity.get("sparsity_structure", "unstructured") == "2:4":
        structure = sparsity.get("sparsity_structure", sparsity.get("format"))
        raise _unsupported(f"compressed-tensors with sparsity {structure!r}")
    if block.get("transform_config"):
        raise _unsupported("compressed-tensors with transform_config (rotations of weights and activations)")
    groups = _object("config_groups", block.get("config_groups") or {})
    has_kv = _has_kv_scheme(block.get("kv_cache_scheme"))
    if not groups:
        if not has_kv:
            raise ValueError("config.json: quantization_config of compressed-tensors has no config_groups")
        return Quantization("compressed-tensors", "none", "none", targets=(), kv_cache=True)
    schemes: set[tuple[Any, Any]] = set()
    targets: list[str] = []
    for name, group in groups.items():
        group = _object(f"config_groups.{name}", group)
        schemes.add(_scheme_of_group(name, group, block.get("format")))
        targets += _names(f"config_groups.{name}.targets", group.get("targets", ["Linear"]))
    if len(schemes) > 1:
        raise _unsupported("compressed-tensors with several schemes in one checkpoint")
    ((weights, activations),) = schemes
    return Quantization(
        "compressed-tensors",
        weights,
        activations,
        tuple(dict.fromkeys(targets)),
        _names("ignore", block.get("ignore") or []),
        has_kv,
    )


def _has_kv_scheme(value: Any) -> bool:
    """Whether keys and values have a scheme; it must be FP8's with scales that are stored."""
    if value is None:
        return False
    kv = _object("kv_cache_scheme", value)
    if (kv.get("num_bits"), kv.get("type")) != (8, "float") or kv.get("dynamic") or kv.get("symmetric") is False:
        words = [_bits_of(kv), *["dynamic"] * bool(kv.get("dynamic")), *["asymmetric"] * (kv.get("symmetric") is False)]
        raise _unsupported(f"kv_cache_scheme of {', '.join(words)}")
    return True


def _scheme_of_group(name: str, group: Mapping[str, Any], file_format: Any) -> tuple[Any, Any]:
    weights = _object(f"config_groups.{name}.weights", group.get("weights") or {})
    if (weights.get("num_bits"), weights.get("type")) != (8, "float"):
        raise _unsupported(
            f"compressed-tensors {_bits_of(weights)} weights (format {group.get('format') or file_format!r})"
        )
    strategy = weights.get("strategy", "tensor")
    if strategy == "block" and not _is_block(weights.get("block_structure")):
        raise _unsupported(f"weights in blocks of {weights.get('block_structure')}")
    if strategy not in ("tensor", "channel", "block") or weights.get("dynamic") or weights.get("symmetric") is False:
        raise _unsupported(
            f"FP8 weights of strategy {strategy!r}{', dynamic' if weights.get('dynamic') else ''}"
            f"{', asymmetric' if weights.get('symmetric') is False else ''}"
        )
    if group.get("output_activations"):
        raise _unsupported("quantised output_activations")
    if group.get("input_activations") is None:
        return strategy, "none"
    inputs = _object(f"config_groups.{name}.input_activations", group["input_activations"])
    if (inputs.get("num_bits"), inputs.get("type")) != (8, "float") or inputs.get("symmetric") is False:
        raise _unsupported(f"FP8 weights with {_bits_of(inputs)} activations")
    kind = inputs.get("strategy", "tensor")
    if not inputs.get("dynamic"):
        if kind != "tensor" or strategy == "block":
            raise _unsupported(f"static activation scales of strategy {kind!r} with weights by {strategy!r}")
        return strategy, "static"
    expected = "group" if strategy == "block" else "token"
    if kind != expected or (kind == "group" and inputs.get("group_size") != BLOCK):
        raise _unsupported(f"dynamic activation scales of strategy {kind!r} with weights by {strategy!r}")
    return strategy, "dynamic"


def _of_plain_fp8(block: Mapping[str, Any]) -> Quantization:
    scheme = block.get("activation_scheme", "dynamic")
    shape = block.get("weight_block_size")
    if scheme not in ("static", "dynamic") or (shape is not None and scheme == "static"):
        raise _unsupported(f"quant_method 'fp8' with activation_scheme {scheme!r} and weight_block_size {shape}")
    if shape is not None and not _is_block(shape):
        raise _unsupported(f"quant_method 'fp8' with weight_block_size {shape}")
    if block.get("fmt", "e4m3") not in ("e4m3", "float8_e4m3fn"):
        raise _unsupported(f"quant_method 'fp8' with fmt {block['fmt']!r}")
    kv = block.get("kv_cache_scheme") or block.get("kv_cache_quant_method")
    if kv not in (None, "static"):
        raise _unsupported(f"quant_method 'fp8' with kv_cache_scheme {kv!r}")
    ignored = block.get("ignored_layers") or block.get("modules_to_not_convert") or ["lm_head"]
    return Quantization(
        "fp8",
        "tensor" if shape is None else "block",
        scheme,
        ignored=_names("ignored_layers", ignored),
        kv_cache=kv == "static",
    )


def _of_modelopt(block: Mapping[str, Any]) -> Quantization | None:
    algorithm = str(block.get("quant_algo") or "none")
    schemes: dict[str, tuple[Any, Any]] = {
        "FP8": ("tensor", "static"),
        "FP8_PER_CHANNEL_PER_TOKEN": ("channel", "dynamic"),
    }
    kv = block.get("kv_cache_quant_algo")
    if isinstance(block.get("kv_cache_scheme"), Mapping):
        scheme = block["kv_cache_scheme"]
        kv = "FP8" if (scheme.get("num_bits"), scheme.get("type")) == (8, "float") else _bits_of(scheme)
    if kv not in (None, "", "FP8"):
        raise _unsupported(f"ModelOpt kv_cache_quant_algo {kv!r}")
    if algorithm == "none":
        return Quantization("modelopt", "none", "none", targets=(), kv_cache=True) if kv else None
    if algorithm.upper() not in schemes:
        raise _unsupported(f"ModelOpt quant_algo {algorithm!r}")
    weights, activations = schemes[algorithm.upper()]
    ignored = _names("exclude_modules", block.get("exclude_modules") or block.get("ignore") or [])
    return Quantization("modelopt", weights, activations, ignored=ignored, kv_cache=kv == "FP8")


def _of_mistral(block: Mapping[str, Any]) -> Quantization:
    if block.get("qformat_weight") != "fp8_e4m3":
        raise _unsupported(f"Mistral's qformat_weight {block.get('qformat_weight')!r}")
    scheme = block.get("qscheme_act") or "TENSOR"
    if scheme not in ("TENSOR", "NO_SCALES", "DYNAMIC"):
        raise _unsupported(f"Mistral's qscheme_act {scheme!r}")
    return Quantization("mistral", "tensor", "static" if scheme == "TENSOR" else "dynamic")


def _is_block(shape: Any) -> bool:
    return isinstance(shape, (list, tuple)) and list(shape) == [BLOCK, BLOCK]


def _bits_of(block: Mapping[str, Any]) -> str:
    """The name of the number format, for an error: "INT4", "FP4", "MXFP4"."""
    bits, kind = block.get("num_bits", block.get("bits")), str(block.get("type", "int"))
    if bits is None:
        return "unnamed"
    return f"{'FP' if kind == 'float' else 'INT'}{bits}"


# The number format of each ``quant_method``, for the error; other methods are named alone.
_KNOWN_METHODS = {
    "awq": "4-bit integers by AWQ",
    "gptq": "integers of 2 to 8 bits by GPTQ",
    "bitsandbytes": "made by bitsandbytes (load_in_4bit or load_in_8bit)",
}


def _unsupported(scheme: str, bits: str = "unnamed", what: str = "") -> ValueError:
    form = "" if bits == "unnamed" else f" ({bits})"
    known = f", {_KNOWN_METHODS[what]}" if what in _KNOWN_METHODS else ""
    return ValueError(
        f"the checkpoint's quantisation is not supported: {scheme}{form}{known}; take the unquantised checkpoint that "
        "it was made from, with "
        "quantization='fp8' where memory is short, or an FP8 (e4m3) one of compressed-tensors, quant_method 'fp8', "
        "ModelOpt or Mistral"
    )


def refuse_foreign_tensors(names: Iterable[str]) -> None:
    """Raise ``ValueError`` if the names of tensors show numbers that are packed as AWQ, GPTQ or bitsandbytes pack
    them.
    """
    for name in names:
        if name.endswith((".qweight", ".qzeros", ".g_idx")):
            raise _unsupported(f"tensor {name} is of AWQ or GPTQ", "integers of 2 to 8 bits")
        if name.endswith((".absmax", ".quant_map", ".SCB")) or ".quant_state." in name:
            raise _unsupported(f"tensor {name} is of bitsandbytes", what="bitsandbytes")


def _object(name: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} must be a JSON object, got {value!r}")
    return value


def _names(name: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, (list, tuple)) or not all(isinstance(item, str) for item in value):
        raise ValueError(f"{name} must be a list of names, got {value!r}")
    for item in value:
        if item.startswith("re:"):
            try:
                re.compile(item[3:])
            except re.error as error:
                raise ValueError(f"{name}: {item!r} is not a regular expression: {error}") from None
    return tuple(value)
