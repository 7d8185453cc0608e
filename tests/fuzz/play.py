"""Plays a case on an engine: requests come, are aborted, and things break, each in its step."""

from __future__ import annotations

import inspect
import random
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from fuzz.cases import EngineCase, ModelCase, RequestCase
from fuzz.checks import Checker, Wrong
from fuzz.reference import Model
from fuzz.texts import TEKKEN

from nemo_engine import Engine, RequestOutput, SamplingParams
from nemo_engine.scheduler import Request
from tests.helpers.checkpoints import random_state_dict, write_hf, write_mistral
from tests.helpers.speculating import choose_widths, plant_drafts, random_drafts
from tests.scheduler.invariants import check


class PlantedError(RuntimeError):
    """Raised on purpose in the middle of a step."""


class PlantedInterrupt(KeyboardInterrupt):
    """Raised on purpose in the middle of a step."""


class Player:
    """One case, played. ``counts`` say what it came across."""

    def __init__(self, case: EngineCase, model: Model, path: Path) -> None:
        self.case = case
        self.model = model
        self.counts: Counter[str] = Counter()
        options = dict(case.options)
        self.text = case.model.text
        self.engine = Engine(path, device="cpu", skip_tokenizer_init=not self.text, **options)
        if "speculative_config" in options:
            self._speculate(random.Random(f"speculation {case.seed}"))
        self.num_pages, self.page_size = options["num_kv_pages"], options["page_size"]
        self.limit = min(options["max_model_len"], self.num_pages * self.page_size + 1)
        self.is_kv_fp8 = options["kv_cache_dtype"] == "fp8"
        self.requests: dict[int, list[Request]] = {}  # of the scheduler, by index of their case
        self.outputs: dict[int, list[RequestOutput]] = {}
        self.active: dict[str, RequestCase] = {}
        self.ending: dict[str, list[RequestCase]] = {}  # aborted, and their name is another's by now
        self.may_fail: set[int] = set()  # that were there when something broke on purpose
        self.aborted: set[int] = set()
        self.num_steps = 0
        self.is_dead = False
        self._is_armed = False  # what was planted has yet to happen
        self._is_stepping = False  # it happens in a step, not where the test itself asks
        self._undo: Callable[[], None] | None = None

    def _speculate(self, rng: random.Random) -> None:
        """Steps of random widths, with drafts that are looked up or arbitrary."""
        choose_widths(self.engine._core.scheduler, rng, self.engine.config.widths)
        if rng.random() < 0.4:
            plant_drafts(self.engine, random_drafts(rng, self.model.config.vocab_size))

    # ---- playing

    def play(self) -> None:
        """Run it all, then check it all."""
        try:
            self._run()
            Checker(self).check_all()
        finally:
            self._restore()
            self.engine.close()

    def _run(self) -> None:
        waiting = sorted(self.case.requests, key=lambda one: (one.arrival, one.index))
        work = sum(len(one.prompt) + 100 for one in waiting) * 3 + 200
        while (waiting or self.engine.has_unfinished_requests()) and not self.is_dead:
            while waiting and waiting[0].arrival <= self.num_steps:
                self._add(waiting.pop(0))
            for name, one in list(self.active.items()):
                if one.abort is not None and self.num_steps >= one.arrival + one.abort:
                    self.counts["aborts"] += 1
                    self.aborted.add(one.index)
                    try:
                        self.engine.abort(name)
                        one.abort = None
                    except (PlantedError, PlantedInterrupt):
                        pass  # it is tried again after the next step
            self._step()
            self.num_steps += 1
            if self.num_steps > work:
                raise Wrong("no progress")

    def _add(self, one: RequestCase) -> None:
        params = SamplingParams(**one.params)
        prompt: dict[str, Any] = {"prompt_token_ids": one.prompt}
        if one.salt is not None:
            prompt["cache_salt"] = one.salt
        reasons = []
        if not one.name:
            reasons.append("must be a non-empty string")
        earlier = self.active.get(one.name)
        if earlier is not None and (earlier.index not in self.aborted or earlier.abort is not None):
            reasons.append("in use")
        if len(one.prompt) + (1 if params.max_tokens is None else params.max_tokens) > self.limit:
            reasons.append("a prompt of")
        prepare = self.engine.prepare

        def prepare_and_keep(*args: Any) -> Any:
            prepared = prepare(*args)
            self.requests[one.index] = [completion.request for completion in prepared.user.completions]
            return prepared

        self.engine.prepare = prepare_and_keep  # type: ignore[method-assign]
        try:
            self.engine.add_request(one.name, prompt, params, priority=one.priority)
        except ValueError as error:
            if not any(reason in str(error) for reason in reasons):
                raise Wrong(f"request {one.index} is refused: {error}") from error
            self.requests.pop(one.index, None)
            self.counts["refused"] += 1
            return
        finally:
            self.engine.prepare = prepare  # type: ignore[method-assign]
        if reasons:
            raise Wrong(f"request {one.index} is taken though {reasons}")
        if earlier is not None:  # it was aborted, and a step has failed that would have told so
            self.ending.setdefault(one.name, []).append(earlier)
        self.active[one.name] = one
        self.outputs[one.index] = []
        self.counts["requests"] += 1

    def _step(self) -> None:
        if self.case.fault is not None and self.case.fault[1] == self.num_steps:
            self._is_armed = True
            self._plant(self.case.fault[0])
        if self._is_armed:
            self.may_fail |= {one.index for one in self.active.values()}
        self._is_stepping = True
        try:
            outputs = self.engine.step()
        except (PlantedError, PlantedInterrupt):
            outputs = []
        except Exception as error:
            if self.may_fail and "dead" in str(error).lower():
                self.is_dead = True
                self.counts["dead"] += 1
                return
            raise
        finally:
            self._is_stepping = False
        if self.case.fault is not None and self.case.fault[0] == "nan" and self.num_steps > self.case.fault[1]:
            self._restore()
        for output in outputs:
            ending = self.ending.get(output.request_id)
            one = ending[0] if ending else self.active.get(output.request_id)
            if one is None:
                raise Wrong(f"an output of {output.request_id!r}, which has ended or never was")
            self.outputs[one.index].append(output)
            if output.finished and ending:
                ending.pop(0)
            elif output.finished:
                del self.active[output.request_id]
        if self._undo is None:
            check(self.engine._core.scheduler)

    def _plant(self, kind: str) -> None:
        self.counts[f"planted {kind}"] += 1
        core = self.engine._core
        rng = random.Random(f"fault {self.case.seed}")
        error: BaseException = PlantedInterrupt("planted") if "interrupt" in kind else PlantedError("planted")
        if kind == "nan":
            table = core.runner._step.model.weights.embed_tokens  # type: ignore[attr-defined]
            token = rng.choice(rng.choice(self.case.requests).prompt)
            with torch.inference_mode():
                row = table[token].clone()
                table[token] = torch.nan

            def restore() -> None:
                with torch.inference_mode():
                    table[token] = row

            self._undo = restore
            return
        if kind == "result":
            launch = core.runner.launch

            def result() -> Any:
                self._is_armed = False
                raise error

            def broken_launch(plan: Any) -> Any:
                core.runner.launch = launch  # type: ignore[method-assign]
                launch(plan)
                return SimpleNamespace(result=result)

            core.runner.launch = broken_launch  # type: ignore[method-assign]
            return
        places = [(core.runner, "launch")]
        if kind.startswith("inner"):
            scheduler = core.scheduler
            states = [scheduler, scheduler.kv.pool, *vars(scheduler).values()]
            places = [
                (state, name)
                for state in states
                if type(state).__module__.startswith("nemo_engine.scheduler.") and hasattr(state, "__dict__")
                for name, member in vars(type(state)).items()
                if inspect.isfunction(member) and not name.startswith("__")
            ]
        owner, name = rng.choice(places)
        is_after = rng.random() < 0.5
        original = getattr(owner, name)

        def broken(*args: Any, **options: Any) -> Any:
            if not self._is_stepping:
                return original(*args, **options)
            setattr(owner, name, original)
            self._is_armed = False
            if is_after:
                original(*args, **options)
            raise error

        setattr(owner, name, broken)

    def _restore(self) -> None:
        if self._undo is not None:
            self._undo()
            self._undo, self._is_armed = None, False


def written(case: ModelCase, folder: Path) -> dict[str, torch.Tensor]:
    """Write the checkpoint of ``case``; returns its weights."""
    state = random_state_dict(case.config, case.seed)
    write = write_hf if case.layout == "hf" else write_mistral
    write(folder, case.config, state, shards=case.shards)
    if case.text:
        (folder / "tekken.json").symlink_to(TEKKEN)
    return state


def play(cases: Sequence[EngineCase]) -> Counter[str]:
    """Play engines of one model, one after the other; ``Wrong`` says which case it was and what is wrong."""
    counts: Counter[str] = Counter(models=1)
    with tempfile.TemporaryDirectory() as folder:
        state = written(cases[0].model, Path(folder))
        for case in cases:
            model = Model(cases[0].model.config, state, getattr(torch, case.options["dtype"]))
            player = Player(case, model, Path(folder))
            player.play()
            counts.update(player.counts)
            counts["engines"] += 1
            counts["steps"] += player.num_steps
    return counts
