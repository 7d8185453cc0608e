"""``/metrics``: vLLM's names, counts that are exact, times that add up; and ``explain``, which tells the same of one
request.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from nemo_engine import AsyncEngine
from nemo_engine.outputs import StepRecord
from nemo_engine.server.metrics import Histogram
from nemo_engine.server.ui.history import SECONDS, History
from tests.helpers.speculating import choose_widths
from tests.server.live import ENGINE_OPTIONS, LiveServer

COUNTERS = {"prefix_cache_queries", "prefix_cache_hits", "num_preemptions", "prompt_tokens", "generation_tokens",
            "request_success"}  # fmt: skip
GAUGES = {"num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"}
HISTOGRAMS = {
    "time_to_first_token_seconds", "inter_token_latency_seconds", "request_time_per_output_token_seconds",
    "e2e_request_latency_seconds", "request_queue_time_seconds", "request_prefill_time_seconds",
    "request_decode_time_seconds", "iteration_tokens_total", "request_prompt_tokens", "request_generation_tokens",
}  # fmt: skip


@pytest.fixture(scope="module")
def fresh() -> Iterator[LiveServer]:
    """An engine of its own, so that the counts are known."""
    with AsyncEngine("nemo-tiny", **ENGINE_OPTIONS) as engine, LiveServer(engine, metrics_prefix="vllm") as server:
        yield server


def scrape(server: LiveServer, prefix: str = "vllm") -> dict[str, dict[tuple[str, ...], float]]:
    """{sample name without prefix: {values of the labels but the model's and the engine's: value}}."""
    found: dict[str, dict[tuple[str, ...], float]] = {}
    for family in text_string_to_metric_families(httpx.get(server.url + "/metrics").text):
        for sample in family.samples:
            assert sample.labels["model_name"] == "nemo-tiny", sample
            labels = tuple(v for k, v in sorted(sample.labels.items()) if k not in ("model_name", "engine"))
            found.setdefault(sample.name.removeprefix(prefix + ":"), {})[labels] = sample.value
    return found


def post(server: LiveServer, **body: Any) -> dict[str, Any]:
    response = httpx.post(server.url + "/v1/completions", json={"ignore_eos": True} | body, timeout=600)
    assert response.status_code == 200, response.text
    return dict(response.json())


def test_names_are_vllms_with_the_prefix_asked_for(fresh: LiveServer, live: LiveServer) -> None:
    for server, prefix in ((fresh, "vllm"), (live, "nemo_engine")):
        names = set(scrape(server, prefix))
        assert {f"{name}_total" for name in COUNTERS} | GAUGES <= names
        assert {f"{name}_{part}" for name in HISTOGRAMS for part in ("bucket", "sum", "count")} <= names


def test_the_dashboard_asks_for_what_there_is(live: LiveServer) -> None:
    """Every name in the queries of deploy/'s dashboard is one of /metrics, those of a GPU included, with its labels."""
    folder = Path(__file__).parents[2]
    board = json.loads((folder / "deploy/grafana/dashboards/nemo-engine.json").read_text())
    queries = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    queries += [variable["query"] for variable in board["templating"]["list"]]
    used = {name for query in queries for name in re.findall(r"nemo_engine:\w+", query)}
    page = httpx.get(live.url + "/metrics").text
    samples = [s for family in text_string_to_metric_families(page) for s in family.samples]
    known = {sample.name for sample in samples}
    known |= {
        f"nemo_engine:{name}" for name in re.findall(r'"(gpu_\w+)"', (folder / "nemo_engine/server/gpu.py").read_text())
    }
    assert len(used) > 15 and used <= known
    assert all(sample.labels["model_name"] for sample in samples if sample.name in used)
    assert any("finished_reason" in sample.labels for sample in samples)
    places = [tuple(panel["gridPos"].values()) for panel in board["panels"]]
    assert len(set(places)) == len(places) == len({panel["id"] for panel in board["panels"]})


def test_counts_are_exact_and_times_add_up(fresh: LiveServer) -> None:
    before = scrape(fresh)
    prompt = [1, *range(2000, 2039)]  # two full pages of 16 tokens, and 8 more
    answers = [post(fresh, prompt=prompt, max_tokens=7, explain=True, seed=1) for _ in range(2)]
    post(fresh, prompt=[[1, 3000], [1, 3001, 3002]], max_tokens=5, n=2, seed=1)
    after = scrape(fresh)

    def grown(name: str, *labels: str) -> float:
        return after[name][labels] - before[name].get(labels, 0.0)

    assert grown("prompt_tokens_total") == 2 * 40 + 2 * (2 + 3)  # each of n completions has its prompt computed
    assert grown("generation_tokens_total") == 2 * 7 + 4 * 5
    assert grown("request_success_total", "length") == 2 + 4
    assert grown("prefix_cache_hits_total") >= 32
    assert grown("request_generation_tokens_count") == 4 and grown("request_generation_tokens_sum") == 34
    assert grown("request_prompt_tokens_sum") == 85
    assert grown("time_to_first_token_seconds_count") == grown("e2e_request_latency_seconds_count") == 4
    assert grown("e2e_request_latency_seconds_sum") == pytest.approx(
        grown("request_queue_time_seconds_sum") + grown("request_inference_time_seconds_sum"), rel=1e-6
    )
    assert grown("request_inference_time_seconds_sum") == pytest.approx(
        grown("request_prefill_time_seconds_sum") + grown("request_decode_time_seconds_sum"), rel=1e-6
    )
    decodes = 2 * 6 + 4 * 4
    assert grown("inter_token_latency_seconds_count") == decodes
    assert after["num_requests_running"][()] == after["kv_cache_usage_perc"][()] == 0

    told = [answer["explain"]["requests"][0] for answer in answers]
    assert [one["cached_tokens"] for one in told] == [0, 32]
    assert (told[0]["cache"]["broke_at_page"], told[0]["cache"]["reason"]) == (0, "not_seen")
    assert (told[1]["cache"]["cached_pages"], told[1]["cache"]["reason"]) == (2, None)
    for one in told:
        assert min(one["queue_seconds"], one["prefill_seconds"], one["decode_seconds"]) >= 0 == one["preemptions"]
    assert answers[1]["usage"]["prompt_tokens_details"]["cached_tokens"] == 32


def test_drafts_are_counted_under_vllms_names_and_explained() -> None:
    config = {"method": "ngram", "num_speculative_tokens": 3}
    body = {"prompt": "one two three one two three one two", "max_tokens": 30, "temperature": 0, "explain": True}
    options = ENGINE_OPTIONS | {"speculative_config": config}
    with AsyncEngine("nemo-tiny", **options) as engine, LiveServer(engine, metrics_prefix="vllm") as server:
        choose_widths(engine._engine._core.scheduler, random.Random(2), (4,))
        answers = [post(server, **body, **more) for more in ({}, {"speculation": False}, {"presence_penalty": 0.01})]
        assert [answer["explain"]["speculation"][:8] for answer in answers] == ["on", "speculat", "penaltie"]
        assert answers[0]["choices"][0]["text"] == answers[1]["choices"][0]["text"]
        assert answers[1]["explain"]["parameters"]["speculation"] == {"value": False, "origin": "request"}
        counts = {name: found for name, found in scrape(server).items() if name.startswith("spec_decode_")}
    (drafts,), (tokens,), (accepted,) = (
        counts[f"spec_decode_num_{name}_total"].values() for name in ("drafts", "draft_tokens", "accepted_tokens")
    )
    by_place = counts["spec_decode_num_accepted_tokens_per_pos_total"]
    assert 3 * drafts >= tokens >= accepted == sum(by_place.values()) > 0
    assert list(by_place) == [("0",), ("1",), ("2",)] and sorted(by_place.values(), reverse=True) == [
        *by_place.values()
    ]


def test_why_a_prefix_broke(fresh: LiveServer) -> None:
    prompt = [1, *range(4000, 4063)]
    post(fresh, prompt=prompt, max_tokens=1)

    def cache(**body: Any) -> dict[str, Any]:
        return dict(post(fresh, max_tokens=1, explain=True, **body)["explain"]["requests"][0]["cache"])

    changed = [*prompt[:20], 5, *prompt[21:]]
    assert cache(prompt=changed) | {"page_size": 16} == {
        "page_size": 16, "full_pages": 3, "cached_pages": 1, "broke_at_page": 1, "broke_at_token": 16, "reason":
        "not_seen",
    }  # fmt: skip
    assert cache(prompt=prompt, cache_salt="mine")["broke_at_page"] == 0
    assert cache(prompt=prompt, cache_salt="mine")["reason"] is None
    assert cache(prompt=prompt, prompt_logprobs=1)["reason"] == "prompt_logprobs"
    for index in range(14):  # fill the cache with other content
        post(fresh, prompt=[1, *[100 + (index * 997 + i * 7) % 6000 for i in range(600)]], max_tokens=1)
    assert cache(prompt=prompt)["reason"] == "evicted"


def test_origins_of_parameters(engine: AsyncEngine) -> None:
    defaults = {"temperature": "0.5", "top_k": "9", "max_tokens": "4"}
    with LiveServer(engine, default_sampling_params=defaults, page=False) as server:
        shown = post(server, prompt=[1, 2000], top_k=3, explain=True)["explain"]["parameters"]
        assert shown["temperature"] == {"value": 0.5, "origin": "server"}
        assert shown["top_k"] == {"value": 3, "origin": "request"}
        assert shown["max_tokens"] == {"value": 4, "origin": "server"}
        assert shown["top_p"] == {"value": 1.0, "origin": "default"}
        cut = post(server, prompt=[1, 2000], max_tokens=10**6, explain=True, stop_token_ids=[*range(3, 6144)])
        assert cut["explain"]["parameters"]["max_tokens"] == {"value": 1022, "origin": "context"}


def test_histogram_takes_values_many_times() -> None:
    histogram = Histogram((1, 2))
    histogram.add(1)
    histogram.add(1.5, 3)
    histogram.add(9)
    samples = histogram.family("x", "text", {"a": "b"}).samples
    assert [(s.labels.get("le"), s.value) for s in samples if s.name == "x_bucket"] == [
        ("1.0", 1),
        ("2.0", 4),
        ("+Inf", 5),
    ]
    assert [s.value for s in samples if s.name == "x_sum"] == [1 + 4.5 + 9]


def test_history_keeps_its_seconds_in_order_and_bounded() -> None:
    history = History()
    for index in range(3 * SECONDS):
        history.step_done(StepRecord(index, 1000.0 + index, 2, 1, 10, 3, 10))
    history.step_done(StepRecord(0, 1000.0 + 3 * SECONDS - 2, 5, 0, 0, 5, 0))  # reported late
    seconds = [one.second for one in history._seconds]
    assert seconds == sorted(set(seconds)) and len(seconds) == SECONDS
    assert history._seconds[-2].num_decode_tokens == 7
