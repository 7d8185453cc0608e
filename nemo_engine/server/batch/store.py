"""The files and batches of ``/v1/files`` and ``/v1/batches``: what lies in the folder that the server was given, and
survives it.
"""

from __future__ import annotations

import fcntl
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

from nemo_engine.server.clients import Client
from nemo_engine.server.errors import ApiError

_ID = re.compile(r"(file-|batch_)[0-9a-f]{32}")
UNFINISHED = ("validating", "in_progress", "finalizing", "cancelling")


class Entry:
    """A file or a batch. ``shown``: the object that clients get.

    ``data``: of a file, the name of its content in the folder.
    """

    def __init__(self, shown: dict[str, Any], owner: str, data: str | None, created: float) -> None:
        self.shown = shown
        self.owner = owner
        self.data = data
        self.created = created

    @property
    def id(self) -> str:
        """The object's."""
        text: str = self.shown["id"]
        return text


class BatchStore:
    """Entries as files ``ID.json``, each written whole or not at all.

    Raises ``ValueError`` for a folder that cannot be used.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.entries: dict[str, Entry] = {}
        if not folder.is_dir():
            raise ValueError(f"batch_dir must be a folder that exists, got {str(folder)!r}")
        self._lock = (folder / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"batch_dir {str(folder)!r} is another server's, which runs") from None
        for path in folder.glob("*.json"):
            if _ID.fullmatch(path.stem):
                try:
                    self.entries[path.stem] = Entry(**json.loads(path.read_bytes()))
                except (ValueError, TypeError) as error:
                    raise ValueError(f"batch_dir: {path} is no entry of a server: {error}") from None

    def close(self) -> None:
        """Leave the folder to another server."""
        self._lock.close()

    def add_file(
        self, client: str, data: str, filename: str, purpose: str, file_id: str | None = None
    ) -> dict[str, Any]:
        """Make content that lies in the folder a file of ``client``."""
        shown = {
            "id": file_id or new_id("file-"), "object": "file", "bytes": (self.folder / data).stat().st_size,
            "created_at": int(time.time()), "filename": filename, "purpose": purpose, "status": "processed",
            "expires_at": None, "status_details": None,
        }  # fmt: skip
        self.save(Entry(shown, client, data, time.time()))
        return shown

    def save(self, entry: Entry) -> None:
        """Keep an entry, or what has changed of it."""
        path = self.folder / f"{entry.id}.json"
        beside = path.with_suffix(".new")
        values = {"shown": entry.shown, "owner": entry.owner, "data": entry.data, "created": entry.created}
        beside.write_text(json.dumps(values))
        beside.replace(path)
        self.entries[entry.id] = entry

    def find(self, entry_id: str, kind: str, client: Client) -> Entry:
        """An entry of ``client``. 404 for others."""
        entry = self.entries.get(entry_id)
        if entry is None or entry.owner != client.name or entry.shown["object"] != kind:
            raise ApiError(404, f"no such {kind}: {entry_id[:100]!r}", param="id", code="not_found")
        return entry

    def path_of(self, entry: Entry) -> Path:
        """Where the content of a file lies."""
        assert entry.data is not None
        return self.folder / entry.data

    def delete(self, entry: Entry) -> None:
        """Remove a file. 400 if a batch that is not finished reads it."""
        for other in self.entries.values():
            if other.shown.get("input_file_id") == entry.id and other.shown["status"] in UNFINISHED:
                raise ApiError(400, f"{entry.id} is the input of {other.id}, which is not finished", code="file_in_use")
        (self.folder / f"{entry.id}.json").unlink(missing_ok=True)
        self.path_of(entry).unlink(missing_ok=True)
        del self.entries[entry.id]

    def page(
        self,
        kind: str,
        client: Client,
        after: str | None,
        limit: int,
        is_ascending: bool,
        matches: Callable[[Entry], bool],
    ) -> dict[str, Any]:
        """A page of the entries of ``client``, as OpenAI's lists have it."""
        entries = [
            e for e in self.entries.values() if e.owner == client.name and e.shown["object"] == kind and matches(e)
        ]
        entries.sort(key=lambda entry: (entry.created, entry.id), reverse=not is_ascending)
        if after is not None:
            at = next((index for index, entry in enumerate(entries) if entry.id == after), None)
            if at is None:
                raise ApiError(400, f"after must be the id of a {kind} in the list, got {after[:100]!r}", param="after")
            entries = entries[at + 1 :]
        shown = [entry.shown for entry in entries[:limit]]
        ids = {"first_id": shown[0]["id"], "last_id": shown[-1]["id"]} if shown else {"first_id": None, "last_id": None}
        return {"object": "list", "data": shown, "has_more": len(entries) > limit} | ids


def new_id(prefix: str) -> str:
    """One that nothing has."""
    return prefix + uuid4().hex
