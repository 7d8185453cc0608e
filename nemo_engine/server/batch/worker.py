"""``BatchWorker``: answers the batches of a server one after another, beside its other requests, and goes on with them
after a restart.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from pathlib import Path
from typing import Any

from nemo_engine.batch.job import BatchJob
from nemo_engine.batch.run import BatchSummary, answer_all
from nemo_engine.engine.async_engine import EngineClosedError, EngineDeadError
from nemo_engine.server.batch.answers import BatchAnswers
from nemo_engine.server.batch.store import UNFINISHED, BatchStore, Entry, new_id
from nemo_engine.server.clients import Client
from nemo_engine.server.service import Service

_logger = logging.getLogger("nemo_engine.server")


class BatchWorker:
    """Runs one batch at a time, in the order in which they came."""

    def __init__(self, service: Service, store: BatchStore) -> None:
        self._service = service
        self.store = store
        self._waiting: asyncio.Queue[str] = asyncio.Queue()
        self._task: asyncio.Task[None] | None = None
        self._current: tuple[str, asyncio.Task[BatchSummary]] | None = None

    def start(self) -> None:
        """Go on with unfinished batches. To be called in the server's event loop; a second call does nothing."""
        if self._task is None:
            unfinished = [entry for entry in self.store.entries.values() if entry.shown.get("status") in UNFINISHED]
            for entry in sorted(unfinished, key=lambda entry: entry.created):
                self._waiting.put_nowait(entry.id)
            self._task = asyncio.get_running_loop().create_task(self._work())

    async def stop(self) -> None:
        """Stop; the next start goes on with unfinished batches."""
        for task in (self._current and self._current[1], self._task):
            if task:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        self.store.close()

    def create(
        self, client: Client, input_file_id: str, endpoint: str, window: str, metadata: dict[str, str] | None
    ) -> dict[str, Any]:
        """Make a batch over a file of ``client``. Raises ``ApiError`` if the client has no such file."""
        source = self.store.find(input_file_id, "file", client)
        batch: dict[str, Any] = {
            "id": new_id("batch_"), "object": "batch", "endpoint": endpoint, "errors": None, "input_file_id": source.id,
            "completion_window": window, "status": "validating", "output_file_id": None, "error_file_id": None,
            "created_at": int(time.time()), "in_progress_at": None, "expires_at": None, "finalizing_at": None,
            "completed_at": None, "failed_at": None, "expired_at": None, "cancelling_at": None, "cancelled_at": None,
            "request_counts": {"total": 0, "completed": 0, "failed": 0}, "metadata": metadata, "model":
            self._service.model_name,
        }  # fmt: skip
        # The results get the name of their later file now, so that a restarted server finds them.
        self.store.save(Entry(batch, client.name, new_id("file-"), time.time()))
        self.start()
        self._waiting.put_nowait(batch["id"])
        return batch

    def cancel(self, entry: Entry) -> None:
        """End a batch, and keep its results so far. A batch that has ended stays as it is."""
        if entry.shown["status"] not in UNFINISHED:
            return
        self._set(entry, "cancelling")
        if self._current is not None and self._current[0] == entry.id:
            self._current[1].cancel()
        else:
            self._finish(entry, "cancelled")

    async def _work(self) -> None:
        while True:
            entry = self.store.entries[await self._waiting.get()]
            if entry.shown["status"] not in UNFINISHED:
                continue
            if entry.shown["status"] == "cancelling":
                self._finish(entry, "cancelled")
                continue
            task = asyncio.ensure_future(self._run(entry))
            self._current = entry.id, task
            try:
                await asyncio.wait([task])
                self._conclude(entry, task)
            except (EngineClosedError, EngineDeadError) as error:
                _logger.warning("%s waits for the next start of the server: %s", entry.id, error)
                return
            except OSError as error:
                _logger.error("%s: what became of it cannot be written: %s", entry.id, error)
            finally:
                self._current = None

    def _conclude(self, entry: Entry, task: asyncio.Task[BatchSummary]) -> None:
        if task.cancelled():
            if entry.shown["status"] == "cancelling":
                self._finish(entry, "cancelled")
            return
        error = task.exception()
        if isinstance(error, (EngineClosedError, EngineDeadError)):
            raise error
        if error is not None:
            if not isinstance(error, (OSError, ValueError)):
                _logger.error("%s failed", entry.id, exc_info=error)
            reason = str(error) if isinstance(error, (OSError, ValueError)) else "the server failed at it"
            self._fail(entry, "batch_failed", reason.replace(str(self.store.folder) + "/", ""))
        elif task.result().num_done == 0:
            self._fail(entry, "empty_file", "the file holds no request")
        else:
            self._finish(entry, "completed")

    async def _run(self, entry: Entry) -> BatchSummary:
        store, client = self.store, Client(entry.owner)
        source = store.find(entry.shown["input_file_id"], "file", client)
        target = store.folder / str(entry.data)
        opening = asyncio.ensure_future(asyncio.to_thread(BatchJob, store.path_of(source), target, {}, force=True))
        try:
            job = await asyncio.shield(opening)
        except asyncio.CancelledError:
            with contextlib.suppress(OSError, ValueError):
                (await opening).close()  # the thread goes on, and what it opens would stay open
            raise
        with job:
            answers = BatchAnswers(self._service, client, entry.shown["endpoint"])
            counts = entry.shown["request_counts"]

            class Counts:
                def update(self, summary: BatchSummary) -> None:
                    """One more line is done."""
                    counts["completed"], counts["failed"] = job.results.num_answered, job.results.num_failed
                    counts["total"] = max(job.total or 0, counts["completed"] + counts["failed"])

            self._set(entry, "in_progress")
            # As many as run at once: so no other client's request waits behind these in the queue.
            max_open = self._service.engine.config.max_num_seqs
            summary = await answer_all(
                answers.reader(job), job.results, answers.answer, max_open=max_open, watcher=Counts()
            )
            Counts().update(summary)
            counts["total"] = counts["completed"] + counts["failed"]
        return summary

    def _finish(self, entry: Entry, status: str) -> None:
        batch, target = entry.shown, str(entry.data)
        for field, data, file_id in (
            ("output_file_id", target, target),
            ("error_file_id", f"{target}.errors", new_id("file-")),
        ):
            path = self.store.folder / data
            if batch[field] is None and path.exists() and path.stat().st_size:
                kind = field.removesuffix("_file_id")
                file = self.store.add_file(entry.owner, data, f"{batch['id']}_{kind}.jsonl", "batch_output", file_id)
                batch[field] = file["id"]
        Path(self.store.folder / f"{target}.run").unlink(missing_ok=True)
        self._set(entry, status)

    def _fail(self, entry: Entry, code: str, message: str) -> None:
        error = {"code": code, "message": message, "line": None, "param": None}
        entry.shown["errors"] = {"object": "list", "data": [error]}
        self._finish(entry, "failed")

    def _set(self, entry: Entry, status: str) -> None:
        entry.shown["status"] = status
        if entry.shown[f"{status}_at"] is None:
            entry.shown[f"{status}_at"] = int(time.time())
        self.store.save(entry)
