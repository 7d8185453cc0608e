"""Computes steps: keeps requests, keys and values on the device, derives the model's inputs there, samples, reports.

Knows neither scheduler nor text: a ``StepPlan`` comes in, a ``StepResult`` goes out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_engine.config import EngineConfig, ModelConfig
from nemo_engine.model.nemo import ModelInputs, Nemo
from nemo_engine.model.weights import NemoWeights
from nemo_engine.ops import Ops
from nemo_engine.ops.attention import AttentionMeta, Workspace
from nemo_engine.runner.kv_cache import KVCache
from nemo_engine.runner.request_table import RequestTable
from nemo_engine.runner.sampler import Sampler
from nemo_engine.step import StepPlan, StepResult, TokenLogprobs

PROMPT_LOGPROB_ROWS = 256  # logits computed at once for prompt log-probabilities: bounds their memory


@dataclass(frozen=True, slots=True)
class _DecodeRows:
    """What follows from which slots decode; kept while the plan brings the same tuple."""

    slots: tuple[int, ...]
    slot_ids: Tensor  # (B,) int64
    num_pages: int  # of the longest row


class Handle:
    """A launched step. On the CPU it is done when launched; on CUDA ``result`` waits for its tokens."""

    def __init__(
        self,
        plan: StepPlan,
        tokens: Tensor,
        logprobs: dict[int, TokenLogprobs],
        prompt_logprobs: dict[int, list[TokenLogprobs]],
    ) -> None:
        self._plan = plan
        self._tokens = tokens
        self._logprobs = logprobs
        self._prompt_logprobs = prompt_logprobs

    def result(self) -> StepResult:
        """Wait for the step and return what came out of it."""
        return StepResult(self._plan.step_id, self._tokens.tolist(), self._logprobs, self._prompt_logprobs)


class Runner:
    """The device half. ``num_pages`` usable pages, contexts of up to ``max_model_len`` tokens."""

    def __init__(
        self,
        model_config: ModelConfig,
        config: EngineConfig,
        weights: NemoWeights,
        ops: Ops,
        *,
        num_pages: int,
        max_model_len: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._device = device
        self._page_size = config.page_size
        self._model = Nemo(model_config, weights, ops, max_model_len)
        self._kv_cache = KVCache(model_config, num_pages, config.page_size, dtype, device)
        self._table = RequestTable(config.max_num_seqs, max_model_len, config.page_size, device)
        self._sampler = Sampler(config.max_num_seqs, model_config.vocab_size, device)
        self._prompt_lens: dict[int, int] = {}  # slots that want prompt log-probabilities -> their prompt's length
        self._decode_rows = _DecodeRows((), torch.empty(0, dtype=torch.int64, device=device), 0)
        self._workspace = Workspace()

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> Handle:
        """Compute ``plan``; see ``step`` for what a plan means."""
        self._table.apply(plan)
        for fill in plan.fills:
            self._sampler.fill(fill)
            self._prompt_lens.pop(fill.slot, None)
            if fill.params.prompt_logprobs is not None:
                self._prompt_lens[fill.slot] = fill.num_prompt_tokens
        decodes = self._get_decode_rows(plan)
        inputs = self._build_inputs(plan, decodes)
        x, residual = self._model.forward(inputs, self._kv_cache.layers)
        prompt_logprobs = self._prompt_logprobs(plan, x, residual) if self._prompt_lens else {}

        samplers = [row for row in plan.prefills if row.samples]
        slots, slot_ids = decodes.slots, decodes.slot_ids
        if samplers:
            slots += tuple([row.slot for row in samplers])
            slot_ids = torch.cat([slot_ids, self._ints([row.slot for row in samplers])])
        if plan.prefills:
            rows = self._sampling_rows(plan)
            x, residual = x[rows], residual[rows]
            self._table.num_computed[self._ints([row.slot for row in plan.prefills])] += self._ints(
                [row.num_tokens for row in plan.prefills]
            )
        self._table.num_computed[decodes.slot_ids] += 1
        if not slots:
            return Handle(plan, torch.empty(0, dtype=torch.int64), {}, prompt_logprobs)
        logits = self._model.logits(x, residual)  # (R, V)
        positions = self._table.num_computed[slot_ids]  # of the tokens to be sampled
        tokens = self._sampler.sample(logits, slots, slot_ids, positions, self._table.token_ids)
        self._table.token_ids[slot_ids, positions] = tokens.clamp(min=0).to(torch.int32)
        return Handle(plan, tokens, self._sampler.logprobs(logits, slots, tokens), prompt_logprobs)

    def close(self) -> None:
        """Drop all tensors."""
        del self._model, self._kv_cache, self._table, self._sampler, self._workspace, self._decode_rows

    def _ints(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._device)

    def _get_decode_rows(self, plan: StepPlan) -> _DecodeRows:
        slots, kept = plan.decode_slots, self._decode_rows
        if slots is not kept.slots:
            kept = _DecodeRows(slots, self._ints(list(slots)), 0)
        elif not plan.new_pages:
            return kept
        longest = max([self._table.num_pages[slot] for slot in slots], default=0)
        self._decode_rows = _DecodeRows(slots, kept.slot_ids, longest)
        return self._decode_rows

    def _build_inputs(self, plan: StepPlan, decodes: _DecodeRows) -> ModelInputs:
        """Ids, positions and places of the step's tokens, from the table. Row order: decode rows, then prefill rows."""
        table, size = self._table, self._page_size
        positions = table.num_computed[decodes.slot_ids]  # (B,)
        ids = table.token_ids[decodes.slot_ids, positions].long()
        pages = table.page_table[decodes.slot_ids, positions // size]
        mapping = pages * size + positions % size
        num_decodes = len(decodes.slots)
        if not plan.prefills:
            starts = torch.arange(num_decodes + 1, device=self._device)
            page_table = table.page_table[decodes.slot_ids, : decodes.num_pages]
            return ModelInputs(
                ids,
                positions,
                mapping,
                AttentionMeta(num_decodes, starts, positions + 1, page_table, size, self._workspace),
            )
        all_ids, all_positions, all_mappings = [ids], [positions], [mapping]
        for row in plan.prefills:
            end = row.start + row.num_tokens
            own = torch.arange(row.start, end, device=self._device)
            all_ids.append(table.token_ids[row.slot, row.start : end].long())
            all_positions.append(own)
            all_mappings.append(table.page_table[row.slot, own // size] * size + own % size)
        prefill_lens = [row.start + row.num_tokens for row in plan.prefills]
        starts = self._ints([0] + [1] * num_decodes + [row.num_tokens for row in plan.prefills]).cumsum(0)
        slot_ids = torch.cat([decodes.slot_ids, self._ints([row.slot for row in plan.prefills])])
        num_pages = max(decodes.num_pages, -(-max(prefill_lens) // size))
        meta = AttentionMeta(
            num_decodes,
            starts,
            torch.cat([positions + 1, self._ints(prefill_lens)]),
            table.page_table[slot_ids, :num_pages],
            size,
            self._workspace,
        )
        return ModelInputs(torch.cat(all_ids), torch.cat(all_positions), torch.cat(all_mappings), meta)

    def _sampling_rows(self, plan: StepPlan) -> Tensor:
        """Indices of the tokens whose logits are sampled: the decodes, and the last of each prefill row that samples."""
        rows = list(range(len(plan.decode_slots)))
        end = len(rows)
        for row in plan.prefills:
            end += row.num_tokens
            if row.samples:
                rows.append(end - 1)
        return self._ints(rows)

    def _prompt_logprobs(self, plan: StepPlan, x: Tensor, residual: Tensor) -> dict[int, list[TokenLogprobs]]:
        found: dict[int, list[TokenLogprobs]] = {}
        begin = len(plan.decode_slots)
        for index, row in enumerate(plan.prefills):
            prompt_len = self._prompt_lens.get(row.slot, 0)
            count = min(row.num_tokens, prompt_len - 1 - row.start)  # positions whose next token is a prompt token
            entries: list[TokenLogprobs] = []
            for first in range(0, count, PROMPT_LOGPROB_ROWS):
                last = min(first + PROMPT_LOGPROB_ROWS, count)
                logits = self._model.logits(x[begin + first : begin + last], residual[begin + first : begin + last])
                targets = self._table.token_ids[row.slot, row.start + first + 1 : row.start + last + 1].long()
                entries += self._sampler.prompt_logprobs(logits, targets, row.slot)
            if entries:
                found[index] = entries
            begin += row.num_tokens
        return found
