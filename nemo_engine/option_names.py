"""Names of options that this engine does not have: which of its own is near, and what those of vLLM and transformers
are here.

One table serves ``Engine``, ``SamplingParams``, the command line and the server.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from inspect import signature
from typing import Any

_VLLM_PARALLEL = "one GPU computes a model here: leave it out, and start an engine for each GPU"
_NOTHING_SWAPPED = (
    "nothing is swapped: a request that is preempted is computed anew. Leave it out, or set {kv_cache_gib} for less "
    "cache"
)
_BEAMS = "there is no beam search: sample several with {n}, and choose by cumulative_logprob"
_GUIDED = "use {structured_outputs}"
_LORA = "one adapter is merged with the model while it loads: use {lora}"
_ALWAYS = "it is always so: leave it out"
_SPECULATIVE = "use {speculative_config}, which needs no draft model"
_HUB_CACHE = "set HF_HOME or HF_HUB_CACHE in the environment"
_HUB_TOKEN = "set HF_TOKEN in the environment"
_QUANTIZED = "use {quantization} 'fp8'"

# What to do instead. Braces hold names of options, which the command line writes as flags.
ELSEWHERE = {
    # vLLM's engine
    "gpu_memory_utilization": "memory is planned item by item and the KV cache takes what is left: set {kv_cache_gib} "
    "or {num_kv_pages} for less",
    "kv_cache_memory_bytes": "use {kv_cache_gib}",
    "num_gpu_blocks_override": "use {num_kv_pages}",
    "block_size": "use {page_size}",
    "trust_remote_code": "no code of a checkpoint is ever run: leave it out",
    "pipeline_parallel_size": _VLLM_PARALLEL,
    "data_parallel_size": _VLLM_PARALLEL,
    "distributed_executor_backend": _VLLM_PARALLEL,
    "swap_space": _NOTHING_SWAPPED,
    "cpu_offload_gb": _NOTHING_SWAPPED,
    "enable_chunked_prefill": _ALWAYS,
    "use_v2_block_manager": _ALWAYS,
    "max_seq_len_to_capture": "all batch sizes are captured at any length: leave it out, or set {enforce_eager}",
    "compilation_config": "CUDA graphs are captured at start-up: leave it out, or set {enforce_eager}",
    "max_seq_len": "use {max_model_len}",
    "scheduler_policy": "use {scheduling_policy}",
    "disable_log_stats": "statistics are asked for (stats(), /metrics): leave it out",
    "disable_log_requests": "requests are logged only with {log_requests}: leave it out",
    "tokenizer_mode": "the tokenizer's files say what it is: leave it out",
    "tokenizer_revision": "give the directory or file of another tokenizer as {tokenizer}",
    "hf_overrides": "change config.json in a copy of the checkpoint",
    "rope_scaling": "scaled rotary frequencies are not computed here",
    "download_dir": _HUB_CACHE,
    "hf_token": _HUB_TOKEN,
    "enable_lora": _LORA,
    "lora_modules": _LORA,
    "max_loras": _LORA,
    "max_lora_rank": _LORA,
    "lora_request": _LORA,
    "speculative_model": _SPECULATIVE,
    "num_speculative_tokens": _SPECULATIVE,
    "enable_auto_tool_choice": "tools are always taken: leave it out",
    "tool_call_parser": "calls are read in the model's form: leave it out",
    "use_tqdm": "use {progress}",
    # vLLM's sampling
    "best_of": "use {n}, and choose by cumulative_logprob",
    "use_beam_search": _BEAMS,
    "guided_json": _GUIDED + " with json",
    "guided_regex": _GUIDED + " with regex",
    "guided_choice": _GUIDED + " with choice",
    "guided_grammar": _GUIDED + " with grammar",
    "guided_json_object": _GUIDED + " with json_object",
    "guided_whitespace_pattern": _GUIDED + " with whitespace_pattern",
    "guided_decoding": _GUIDED,
    "guided_decoding_backend": _GUIDED + ", which has one backend",
    "logits_processors": "use {logit_bias}, {allowed_token_ids}, {bad_words} or {structured_outputs}",
    "truncate_prompt_tokens": "cut the prompt's token ids before they are given",
    # transformers' generation and loading
    "max_new_tokens": "use {max_tokens}",
    "max_length": "use {max_tokens}, which does not count the prompt",
    "min_new_tokens": "use {min_tokens}",
    "min_length": "use {min_tokens}, which does not count the prompt",
    "do_sample": "use {temperature}: 0 is greedy, and anything above samples",
    "num_return_sequences": "use {n}",
    "num_beams": _BEAMS,
    "early_stopping": _BEAMS,
    "length_penalty": _BEAMS,
    "stop_strings": "use {stop}",
    "eos_token_id": "use {stop_token_ids}",
    "pad_token_id": "batches are not padded: leave it out",
    "bad_words_ids": "use {bad_words}, which are texts",
    "no_repeat_ngram_size": "use {repetition_penalty} or {frequency_penalty}",
    "output_scores": "use {logprobs}",
    "return_dict_in_generate": "outputs are always objects: leave it out",
    "use_cache": _ALWAYS,
    "low_cpu_mem_usage": _ALWAYS,
    "typical_p": "use {min_p} or {top_p}",
    "top_a": "use {min_p} or {top_p}",
    "device_map": "use {device}",
    "torch_dtype": "use {dtype}",
    "load_in_8bit": _QUANTIZED,
    "load_in_4bit": "4 bits have no kernels here: " + _QUANTIZED,
    "quantization_config": _QUANTIZED,
    "attn_implementation": "use {prefer} with paged_attention=flash_attn",
    "cache_dir": _HUB_CACHE,
    "token": _HUB_TOKEN,
    "use_auth_token": _HUB_TOKEN,
    "local_files_only": "set HF_HUB_OFFLINE=1 in the environment",
    "adapter": "use {lora}",
    "peft_model_id": "use {lora}",
}


def advice(name: str, known: Iterable[str], place: str = "", *, as_flags: bool = False) -> str:
    """What to use in place of an option ``name`` that is not among ``known``; "" if nothing is like it.

    place: what has the options that are ``known``, so that one of another place is told apart.
    """
    known = list(known)

    def written(option: str) -> str:
        return "--" + option.replace("_", "-") if as_flags else option

    if name in ELSEWHERE:
        return re.sub(r"\{(\w+)\}", lambda match: written(match[1]), ELSEWHERE[name])
    for other, (whose, names) in _options_of_others().items():
        if name in names and other != place:
            return f"it belongs to {whose} ({other})"
    near = difflib.get_close_matches(name, [*known, *ELSEWHERE], 1, 0.7)
    if not near:
        return ""
    return (
        f"{near[0]}: {advice(near[0], (), as_flags=as_flags)}"
        if near[0] in ELSEWHERE
        else f"did you mean {written(near[0])}?"
    )


def refuse_unknown_options(place: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raise ``ValueError`` naming the first option of ``given`` that ``place`` does not know, and what to use
    instead.
    """
    known = set(known)
    for name in given:
        if name not in known:
            hint = advice(name, sorted(known), place)
            raise ValueError(f"{place} has no option {name!r}" + (f": {hint}" if hint else ""))


def refuse_unknown_arguments(function: Callable[..., Any], given: Mapping[str, Any]) -> None:
    """The same for keywords of ``function`` beyond those that it declares."""
    if given:
        refuse_unknown_options(function.__name__, given, signature(function).parameters)


def _options_of_others() -> dict[str, tuple[str, set[str]]]:
    from nemo_engine.config import EngineConfig
    from nemo_engine.sampling_params import SamplingParams

    return {
        "Engine": ("the engine's options", set(EngineConfig.__dataclass_fields__)),
        "SamplingParams": ("a request's parameters", set(SamplingParams.__dataclass_fields__)),
    }
