"""Batch files without an engine: forms of lines, bad lines, order, bounds, and what a run finds of one before it."""

from __future__ import annotations

import asyncio
import errno
import gzip
import io
import json
import random
import resource
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from nemo_engine.batch.job import BatchJob, first_model
from nemo_engine.batch.lines import CHAT, COMPLETIONS, RESPONSES, LineError, parse_request
from nemo_engine.batch.reader import Reader
from nemo_engine.batch.results import Numbers
from nemo_engine.batch.run import answer_all
from tests.batch.kills import results, union, write_lines
from tests.batch.scripted_run import Scripted, read_json, run


@pytest.mark.parametrize(
    ("data", "custom_id", "url", "body"),
    [
        ({"custom_id": "a", "method": "POST", "url": RESPONSES, "body": {"input": "x"}}, "a", RESPONSES, {"input": "x"}),
        ({"prompt": "x", "top_k": 3}, "line-7", COMPLETIONS, {"prompt": "x", "top_k": 3}),
        ({"prompt_token_ids": [5, 6], "id": "b"}, "b", COMPLETIONS, {"prompt": [5, 6]}),
        ({"messages": [{"role": "user", "content": "x"}], "custom_id": "c"}, "c", CHAT, {"messages": [{"role": "user", "content": "x"}]}),
        ({"id": "d", "prompt": "x", "output_tokens": 9}, "d", COMPLETIONS, {"prompt": "x", "max_tokens": 9, "ignore_eos": True}),
        (
            {"messages": [{"role": "user", "content": "x"}], "output_tokens": 9, "arrival_s": 2, "priority": 1},
            "line-7", CHAT, {"messages": [{"role": "user", "content": "x"}], "max_tokens": 9, "ignore_eos": True, "priority": 1},
        ),
    ],
)  # fmt: skip
def test_forms_of_lines(data: Any, custom_id: str, url: str, body: Any) -> None:
    line = parse_request(data, 7, 1000)
    assert (line.number, line.custom_id, line.url, line.body) == (7, custom_id, url, body)


def test_lengths_of_a_workload_become_ids_of_equal_beginnings() -> None:
    one, other = (
        parse_request(
            {"id": name, "prefix": "p", "prefix_tokens": 5, "prompt_tokens": 3, "output_tokens": 2}, 1, 1000
        ).body["prompt"]
        for name in "ab"
    )
    assert len(one) == 8 and one[:5] == other[:5] and one != other and all(0 <= token < 1000 for token in one)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (["x"], "a line must be a JSON object"),
        ({"custom_id": 5, "prompt": "x"}, "custom_id must be a text of 1 to 512"),
        ({"custom_id": "", "prompt": "x"}, "custom_id must be a text of 1 to 512"),
        ({"method": "POST", "url": CHAT, "body": {}}, "custom_id is missing"),
        ({"custom_id": "a", "method": "GET", "url": CHAT, "body": {}}, "method must be POST, got 'GET'"),
        ({"custom_id": "a", "url": CHAT, "body": {}}, "method must be POST, got nothing"),
        ({"custom_id": "a", "method": "POST", "url": "/v1/embeddings", "body": {}}, "url must be one of"),
        ({"custom_id": "a", "method": "POST", "url": [], "body": {}}, "url must be one of"),
        ({"custom_id": "a", "method": "POST", "url": CHAT, "body": []}, "body must be a JSON object"),
        ({"custom_id": "a", "method": "POST", "url": CHAT, "body": {}, "model": "x"}, "model is not a field here"),
        ({"prompt": "x", "messages": []}, "prompt and messages are given"),
        ({"prompt_token_ids": "x"}, "prompt_token_ids must be a list of token ids, got 'x'"),
        ({"prompt_token_ids": ["x"]}, "prompt_token_ids must be a list of token ids"),
        ({"prompt_token_ids": [[5]]}, "prompt_token_ids must be a list of token ids"),
        ({"turns": [{"prompt": "x", "output_tokens": 1}] * 2}, "one request, got 2 turns"),
        ({"generate": {}}, "generate stands for many requests"),
        ({}, "output_tokens must be an integer"),
    ],
)
def test_lines_that_are_no_request(data: Any, says: str) -> None:
    with pytest.raises(LineError, match=says):
        parse_request(data, 1, 1000)


def reader_of(data: bytes, max_bytes: int = 100) -> Reader:
    return Reader(
        io.BytesIO(data), is_done=lambda number: False, read_json=read_json, vocab_size=9, max_bytes=max_bytes
    )


def test_every_line_has_its_number_and_its_answer() -> None:
    limit = b'{"prompt":"' + b"x" * 87 + b'"}'
    assert len(limit) == 100
    lines = [
        b'{"prompt":"a"}',
        b"",
        b"  ",
        b'{"pro',
        limit,
        limit[:-2] + b'y"}',
        b'{"prompt":"' + b"z" * 1000 + b'"}',
        b'{"prompt":"b","id":"same"}',
        b'{"prompt":"c","id":"same"}',
        b"\xff\xfe",
        b'{"prompt":"last"}',
    ]
    found = reader_of(b"\r\n".join(lines)).window(100)
    told = {line.number: getattr(line, "message", "a request") for line in found}
    assert sorted(told) == [1, 4, 5, 6, 7, 8, 9, 10, 11]  # blank lines are none
    assert {number for number, text in told.items() if text == "a request"} == {1, 5, 8, 11}
    assert "not valid JSON" in told[4] and told[6] == told[7] == "a line must have at most 100 bytes"
    assert told[9] == "custom_id 'same' is that of line 8 too" and "not valid JSON" in told[10]


def test_a_window_is_in_the_order_of_its_prompts() -> None:
    prompts = ["b2", "a1", [5, 6], "b1", "a2", [5, 1]]
    data = b"\n".join(json.dumps({"prompt": prompt}).encode() for prompt in prompts)
    reader = reader_of(data)
    first, second, end = (reader.window(4) for _ in range(3))
    assert [line.number for line in first] == [3, 2, 4, 1] and [line.number for line in second] == [6, 5] and not end


def test_numbers() -> None:
    numbers = Numbers()
    for number in (0, 7, 8, 100_000, 8):
        numbers.add(number)
    assert len(numbers) == 4
    assert [number for number in (0, 1, 7, 8, 9, 99_999, 100_000, 10**9) if number in numbers] == [0, 7, 8, 100_000]


def test_no_more_are_open_than_may_be(tmp_path: Path) -> None:
    source, target = tmp_path / "in", tmp_path / "out"
    source.write_text("".join(f'{{"prompt":"{index % 50} {index}"}}\n' for index in range(1000)))
    script = Scripted(0.01)
    with BatchJob(source, target, {}) as job:
        reader = job.reader(read_json, 9, 1000)
        read: list[int] = []
        window = reader.window
        reader.window = lambda most: [read.append(reader.num_lines - len(script.order)), window(most)][1]  # type: ignore
        summary = asyncio.run(answer_all(reader, job.results, script.answer, max_open=16))
    assert summary.num_answered == 1000 and len(results(target)) == 1000
    assert script.most_open <= 16 and max(read) <= 2 * 16  # lines that were read and are not asked yet


def test_failures_go_beside_and_the_rest_goes_on(tmp_path: Path) -> None:
    source, target = tmp_path / "in", tmp_path / "out"
    lines = ['{"prompt":"a"}', '{"prompt":"b","fails":true}', "{", '{"prompt":"d"}']
    source.write_text("\n".join(lines))
    summary = run(source, target, Scripted())
    assert (summary.num_answered, summary.num_failed) == (2, 2)
    assert sorted(result["custom_id"] for result in results(target)) == ["line-1", "line-4"]
    by_line = {result["line"]: result for result in results(Path(f"{target}.errors"))}
    assert by_line[2]["error"] == {"code": "planted", "message": "it fails"} and by_line[2]["custom_id"] == "line-2"
    assert by_line[2]["response"]["status_code"] == 400
    assert by_line[3]["error"]["code"] == "invalid_json" and by_line[3]["response"] is None
    assert "line 1 column" in by_line[3]["error"]["message"], "the reason speaks of a line after this one"
    # Those that failed are tried again where their file is gone.
    Path(f"{target}.errors").unlink()
    again = Scripted()
    summary = run(source, target, again)
    assert again.order == [2] and (summary.num_resumed, summary.num_failed) == (2, 2)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_file_that_was_cut_anywhere_is_gone_on_with(tmp_path: Path, suffix: str) -> None:
    source, target = tmp_path / "in", tmp_path / f"out{suffix}"
    write_lines(source, 12)
    run(source, target, Scripted())
    wanted, data = union(target), target.read_bytes()
    for cut in [*range(0, len(data), 97), len(data) - 1]:
        target.write_bytes(data[:cut])
        summary = run(source, target, Scripted())
        assert union(target) == wanted and sum(wanted.values()) == 12, cut
        assert summary.num_resumed < 12
    assert run(source, target, Scripted()).num_resumed == 12


def test_other_options_than_before_are_refused_by_name(tmp_path: Path) -> None:
    source, target = tmp_path / "in", tmp_path / "out"
    write_lines(source, 12)
    run(source, target, Scripted(), options={"model": "m", "seed": 1})
    with pytest.raises(ValueError, match="seed was 1 and is 2; top_k was not given and is 5.*--force"):
        run(source, target, Scripted(), options={"model": "m", "seed": 2, "top_k": 5})
    with source.open("a") as file:
        file.write('\n{"prompt":"one more"}\n')
    with pytest.raises(ValueError, match="the input was "):
        run(source, target, Scripted(), options={"model": "m", "seed": 1})
    script = Scripted()
    run(source, target, script, options={"model": "m", "seed": 2}, force=True)
    assert script.order == [13]
    assert run(source, target, Scripted(), options={"model": "m", "seed": 2}).num_resumed == 13
    Path(f"{target}.run").write_text("{")
    with pytest.raises(ValueError, match="--force"):
        run(source, target, Scripted())
    target.unlink()
    Path(f"{target}.errors").unlink()
    assert run(source, target, Scripted(), options={"model": "other"}).num_resumed == 0


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    source, target = tmp_path / "in", tmp_path / "out"
    write_lines(source, 12)
    with pytest.raises(ValueError, match="does not exist"):
        run(tmp_path / "missing", target, Scripted())
    with pytest.raises(ValueError, match="is a directory"):
        run(tmp_path, target, Scripted())
    with pytest.raises(ValueError, match="would be written to"):
        run(source, source, Scripted())
    with pytest.raises(ValueError, match="no directory"):
        run(source, tmp_path / "no" / "out", Scripted())
    target.write_text("a letter\n")
    with pytest.raises(ValueError, match="no out.run says of which run"):
        run(source, target, Scripted())
    Path(f"{target}.run").write_text("{}")
    with pytest.raises(ValueError, match="line 1 is no result of a batch"):
        run(source, target, Scripted(), force=True)
    assert target.read_text() == "a letter\n"
    target.unlink()
    with BatchJob(source, target, {}), pytest.raises(ValueError, match="is being written by another run"):
        run(source, target, Scripted(), force=True)
    cut = tmp_path / "cut.gz"
    cut.write_bytes(gzip.compress(source.read_bytes())[:-30])
    with pytest.raises(ValueError, match="compressed input cannot be read on"):
        run(cut, tmp_path / "other", Scripted())


@contextmanager
def small_disk(num_bytes: int) -> Iterator[None]:
    """No file grows beyond so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_where_there_is_no_room_whole_results_stay(tmp_path: Path, suffix: str) -> None:
    source, target = tmp_path / "in", tmp_path / f"out{suffix}"
    dice = random.Random(1)
    source.write_text("".join(f'{{"prompt":"{dice.randbytes(40).hex()}"}}\n' for _ in range(60)))
    with small_disk(3000), pytest.raises(OSError, match="same command goes on from there") as raised:
        run(source, target, Scripted())
    assert raised.value.errno == errno.EFBIG and target.stat().st_size <= 3000
    there = union(target)
    assert suffix or 0 < sum(there.values()) < 60
    summary = run(source, target, Scripted())
    assert summary.num_resumed == sum(there.values()) and sum(union(target).values()) == 60
    assert there <= union(target)


def test_a_device_without_room_ends_the_run(tmp_path: Path) -> None:
    source = tmp_path / "in"
    write_lines(source, 12)
    with pytest.raises(OSError, match="No space left"):
        run(source, Path("/dev/full"), Scripted())
    assert not Path("/dev/full.run").exists()


def test_compressed_input(tmp_path: Path) -> None:
    source, target = tmp_path / "in", tmp_path / "out"
    write_lines(source, 12)
    run(source, target, Scripted())
    compressed = tmp_path / "compressed"  # by what it holds, not by its name
    compressed.write_bytes(gzip.compress(source.read_bytes()))
    run(compressed, tmp_path / "other", Scripted())
    assert union(tmp_path / "other") == union(target)


def test_what_stands_in_front_of_damage_is_answered(tmp_path: Path) -> None:
    dice = random.Random(3)
    lines = "".join(f'{{"prompt":"{dice.randbytes(40).hex()}"}}\n' for _ in range(200)).encode()
    whole = gzip.compress(lines)
    cut = whole[: len(whole) * 2 // 3]
    readable = zlib.decompressobj(wbits=31).decompress(cut).count(b"\n")
    source, target = tmp_path / "in.gz", tmp_path / "out"
    source.write_bytes(cut)
    with pytest.raises(ValueError, match="cannot be read on"):
        run(source, target, Scripted(0.01), max_open=7)
    assert 100 < readable < 200 and len(results(target)) == readable


def test_the_model_that_a_file_names(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.write_text('{"custom_id":"a","method":"POST","url":"/v1/completions","body":{"model":"m","prompt":"x"}}\n')
    assert first_model(str(source)) == "m"
    source.write_text('{"prompt":"x"}')
    for name in (str(source), "-"):
        with pytest.raises(ValueError, match="MODEL is needed"):
            first_model(name)
