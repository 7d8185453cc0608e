"""``/v1/files`` and ``/v1/batches`` with OpenAI's client: whole, cancelled, after a restart, of other clients, and
refused.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from nemo_engine import AsyncEngine
from nemo_engine.batch.job import BatchJob
from nemo_engine.server.batch import worker
from nemo_engine.server.multipart import receive_form
from tests.server.live import LiveServer

URL = "/v1/chat/completions"
PART = b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\n'


def line(index: int, **body: Any) -> str:
    messages = [{"role": "user", "content": f"Hello {index}"}]
    return json.dumps(
        {"custom_id": f"{index}", "method": "POST", "url": URL, "body": {"messages": messages, "max_tokens": 4} | body}
    )


def client_of(live: LiveServer, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=live.url + "/v1", api_key=key, max_retries=0)


def ended(client: openai.OpenAI, batch_id: str) -> Any:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        batch = client.batches.retrieve(batch_id)
        if batch.status in ("completed", "failed", "cancelled"):
            return batch
        time.sleep(0.05)
    raise AssertionError(batch)


def test_openais_client(engine: AsyncEngine, tmp_path: Path) -> None:
    content = "\n".join(
        [*(line(index) for index in range(5)), "{", line(6, temperature="hot"), line(7).replace(URL, "/v1/completions")]
    )
    with LiveServer(engine, batch_dir=str(tmp_path)) as live:
        client = client_of(live)
        file = client.files.create(file=("in.jsonl", content.encode()), purpose="batch")
        assert (file.filename, file.bytes, file.purpose) == ("in.jsonl", len(content), "batch")
        assert client.files.content(file.id).text == content
        made = client.batches.create(
            input_file_id=file.id, endpoint=URL, completion_window="24h", metadata={"of": "a test"}
        )
        assert made.status == "validating" and made.metadata == {"of": "a test"}
        batch = ended(client, made.id)
        counts = batch.request_counts
        assert (batch.status, counts.total, counts.completed, counts.failed) == ("completed", 8, 5, 3)
        assert batch.in_progress_at and batch.completed_at
        answers = [json.loads(one) for one in client.files.content(batch.output_file_id).text.splitlines()]
        assert sorted(one["custom_id"] for one in answers) == ["0", "1", "2", "3", "4"]
        assert all(one["response"]["body"]["usage"]["completion_tokens"] <= 4 for one in answers)
        failed = [json.loads(one) for one in client.files.content(batch.error_file_id).text.splitlines()]
        assert {one["line"]: one["error"]["code"] for one in failed} == {
            6: "invalid_json",
            7: "invalid_value",
            8: "mismatched_endpoint",
        }
        assert {one.id for one in client.files.list()} == {file.id, batch.output_file_id, batch.error_file_id}
        assert [one.id for one in client.files.list(purpose="batch_output", limit=1)]
        assert [one.id for one in client.batches.list(limit=1)] == [made.id]
        assert client.files.delete(file.id).deleted
        with pytest.raises(openai.NotFoundError, match="no such file"):
            client.files.retrieve(file.id)
        empty = client.files.create(file=("empty", b"\n\n"), purpose="batch")
        made = client.batches.create(input_file_id=empty.id, endpoint=URL, completion_window="24h")
        assert ended(client, made.id).errors.data[0].code == "empty_file"


def test_a_batch_goes_on_after_a_restart_and_can_be_cancelled(engine: AsyncEngine, tmp_path: Path) -> None:
    content = "\n".join(line(index, max_tokens=30, ignore_eos=True) for index in range(60))
    with LiveServer(engine, batch_dir=str(tmp_path)) as live:
        client = client_of(live)
        file = client.files.create(file=content.encode(), purpose="batch")
        made = client.batches.create(input_file_id=file.id, endpoint=URL, completion_window="24h")
        with pytest.raises(openai.BadRequestError, match="which is not finished"):
            client.files.delete(file.id)
        while (before := client.batches.retrieve(made.id)).request_counts.completed == 0:
            time.sleep(0.01)
    live.app.state.batches.store.close()
    assert before.status == "in_progress" and before.request_counts.completed < 60
    with LiveServer(engine, batch_dir=str(tmp_path)) as live:
        client = client_of(live)
        batch = ended(client, made.id)
        assert (batch.status, batch.request_counts.completed) == ("completed", 60)
        answers = [json.loads(one) for one in client.files.content(batch.output_file_id).text.splitlines()]
        assert sorted(int(one["custom_id"]) for one in answers) == list(range(60))
        made, later = (
            client.batches.create(input_file_id=file.id, endpoint=URL, completion_window="24h") for _ in range(2)
        )
        assert client.batches.cancel(later.id).status == "cancelled"
        while client.batches.retrieve(made.id).request_counts.completed == 0:
            time.sleep(0.01)
        client.batches.cancel(made.id)
        batch = ended(client, made.id)
        assert batch.status == "cancelled" and batch.cancelling_at and batch.cancelled_at
        partial = client.files.content(batch.output_file_id).text.splitlines()
        assert 0 < len(partial) == batch.request_counts.completed < 60
        assert client.batches.cancel(made.id).status == "cancelled"


def test_a_batch_cancelled_while_its_files_are_opened_leaves_none_open(
    engine: AsyncEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_opening, may_open, closed = threading.Event(), threading.Event(), threading.Event()

    class SlowJob(BatchJob):
        def __init__(self, *args: Any, **options: Any) -> None:
            is_opening.set()
            may_open.wait()
            super().__init__(*args, **options)

        def close(self) -> None:
            super().close()
            closed.set()

    monkeypatch.setattr(worker, "BatchJob", SlowJob)
    with LiveServer(engine, batch_dir=str(tmp_path)) as live:
        client = client_of(live)
        file = client.files.create(file=line(0).encode(), purpose="batch")
        made = client.batches.create(input_file_id=file.id, endpoint=URL, completion_window="24h")
        is_opening.wait()
        assert client.batches.cancel(made.id).status == "cancelling"
        may_open.set()
        assert ended(client, made.id).status == "cancelled" and closed.is_set()
    live.app.state.batches.store.close()


def test_files_and_batches_of_others_are_not_there(engine: AsyncEngine, tmp_path: Path) -> None:
    with LiveServer(engine, batch_dir=str(tmp_path), api_key=["a:one", "b:two"]) as live:
        ours, others = client_of(live, "one"), client_of(live, "two")
        file = ours.files.create(file=line(0).encode(), purpose="batch")
        batch = ours.batches.create(input_file_id=file.id, endpoint=URL, completion_window="24h")
        for ask in (
            lambda: others.files.retrieve(file.id),
            lambda: others.files.content(file.id),
            lambda: others.files.delete(file.id),
            lambda: others.batches.retrieve(batch.id),
            lambda: others.batches.cancel(batch.id),
            lambda: others.batches.create(input_file_id=file.id, endpoint=URL, completion_window="24h"),
        ):
            with pytest.raises(openai.NotFoundError):
                ask()
        assert not list(others.files.list()) and not list(others.batches.list())
        assert ended(ours, batch.id).status == "completed"


def test_what_is_refused(engine: AsyncEngine, live: LiveServer, tmp_path: Path) -> None:
    with pytest.raises(openai.NotFoundError, match="--batch-dir"):
        client_of(live).files.create(file=b"{}", purpose="batch")
    with pytest.raises(openai.NotFoundError, match="--batch-dir"):
        client_of(live).batches.list()
    with LiveServer(engine, batch_dir=str(tmp_path), max_batch_file_mib=0.1) as own:
        with pytest.raises(ValueError, match="another server's"):
            LiveServer(engine, batch_dir=str(tmp_path))
        client = client_of(own)
        with pytest.raises(openai.APIStatusError, match="larger than 104857 bytes"):
            client.files.create(file=b"x" * 200_000, purpose="batch")
        with pytest.raises(openai.BadRequestError, match="purpose must be batch, got 'assistants'"):
            client.files.create(file=b"x", purpose="assistants")
        for body, says in (
            ({"input_file_id": "file-0", "endpoint": URL, "completion_window": "24h"}, "no such file: 'file-0'"),
            ({"input_file_id": "../x", "endpoint": URL, "completion_window": "24h"}, "no such file"),
            ({"input_file_id": "x", "endpoint": "/v1/embeddings", "completion_window": "24h"}, "endpoint"),
            ({"input_file_id": "x", "endpoint": URL, "completion_window": "1h"}, "completion_window"),
            ({"input_file_id": "x", "endpoint": URL, "completion_window": "24h", "metadata": {"a": "b" * 600}}, "512 characters"),
            ({"input_file_id": "x", "endpoint": URL, "completion_window": "24h", "output_expires_after": {"seconds": 1}}, "not supported"),
        ):  # fmt: skip
            answer = httpx.post(own.url + "/v1/batches", json=body)
            assert 400 <= answer.status_code < 500 and says in answer.json()["error"]["message"], body
        form = {"content-type": "multipart/form-data; boundary=b"}
        for headers, content, says in (
            ({}, b"x", "multipart/form-data"),
            (form, b"--b\r\nContent-Disposition: form-data; name=\"file\"\r\n\r\nx", "ends before its last boundary"),
            (form, b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--b--', "file is missing"),
            (form, b"--b\r\nno-name: x\r\n\r\nx\r\n--b--", "a part has no name"),
            (form, b"no boundary", "the body is no form"),
            ({"content-type": "multipart/form-data; boundary=" + "b" * 300}, b"x", "the body is no form"),
            (form, (PART + b"x\r\n") * 21 + b"--b--", "more than 20 parts"),
            (form, PART + b"x" * 70_000 + b"\r\n--b--", "the field purpose is longer than 65536 bytes"),
            (form, (PART.replace(b"purpose", b"file") + b"\r\n") * 2 + b"--b--", "more than one file"),
            (form, PART.replace(b"\r\n\r\n", b"\r\nx: " + b"y" * 20_000 + b"\r\n\r\n") + b"\r\n--b--", "Maximum header size"),
        ):  # fmt: skip
            answer = httpx.post(own.url + "/v1/files", headers=headers, content=content)
            assert answer.status_code == 400 and says in answer.json()["error"]["message"], content
        for path in ("/v1/files?limit=0", "/v1/files?order=odd", "/v1/files?after=x", "/v1/batches?limit=x"):
            assert httpx.get(own.url + path).status_code == 400, path
    assert {path.name for path in tmp_path.iterdir()} == {"lock"}  # nothing is left of what was refused


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_forms_in_pieces_of_any_size(size: int, tmp_path: Path) -> None:
    content = b"a\r\n--bound \r\n-\r\n--boundar\r\n"
    body = (
        b"--boundary\r\nContent-Disposition: form-data; "
        b'name="purpose"\r\n\r\nbatch\r\n--boundary\r\ncontent-disposition: form-data; '
        b'name="file"; filename="x.jsonl"\r\nContent-Type: text/plain\r\n\r\n' + content + b"\r\n--boundary--\r\n"
    )

    async def pieces() -> Any:
        for at in range(0, len(body), size):
            yield body[at : at + size]

    path = tmp_path / "file"
    with path.open("wb") as file:
        form = asyncio.run(receive_form('multipart/form-data; boundary="boundary"', pieces(), file, 10**6))
    assert path.read_bytes() == content and (form.fields, form.filename) == ({"purpose": "batch"}, "x.jsonl")
