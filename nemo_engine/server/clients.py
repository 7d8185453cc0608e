"""Who asks: API keys and their names, the names that the header Host may have, and pages of other sites."""

from __future__ import annotations

import base64
import binascii
import hmac
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from ipaddress import ip_address

from starlette.datastructures import Headers

from nemo_engine.server.options import ServerOptions

LOOPBACK_NAMES = ("localhost", "*.localhost", "127.0.0.1", "::1")

_NAMED = re.compile(rb"([A-Za-z0-9_.-]{1,64}):(.+)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Client:
    """Whose requests these are.

    ``name`` is that of the key, or stands for one that has none; "" where there are no keys.
    """

    name: str


ANYONE = Client("")


class KeyRing:
    """The accepted keys. Keys of one name are one client."""

    def __init__(self, options: ServerOptions) -> None:
        self._options = options
        self._secret = secrets.token_bytes(16)
        self._clients: dict[bytes, Client] = {}
        self.reload()

    def reload(self) -> None:
        """Take the keys from where the options say.

        Raises ``ValueError`` or ``OSError``, and keeps what it has, if that fails.
        """
        clients = {}
        for entry in self._options.keys():
            named = _NAMED.fullmatch(entry)
            key = named[2] if named else entry
            # Keys without a name are told apart by a hash that nobody outside this process can repeat.
            digest = blake2b(key, key=self._secret, digest_size=4).hexdigest()
            clients[key] = Client(named[1].decode() if named else f"key-{digest}")
        self._clients = clients

    def __len__(self) -> int:
        return len(self._clients)

    def find(self, headers: Headers) -> Client | None:
        """Whose key ``headers`` show; ``ANYONE`` if there are no keys, None for a wrong one or none.

        Compares in constant time.
        """
        if not self._clients:
            return ANYONE
        shown = _shown_keys(headers)
        known = None
        for key, client in self._clients.items():
            for candidate in shown:
                if hmac.compare_digest(key, candidate):
                    known = client
        return known


def _shown_keys(headers: Headers) -> list[bytes]:
    """As a bearer token, as ``X-API-Key``, or as the password of a browser on our own page."""
    keys = []
    kind, _, value = headers.get("authorization", "").partition(" ")
    if kind.lower() == "bearer":
        keys.append(value.strip().encode("latin-1"))
    elif kind.lower() == "basic" and not is_cross_site(headers):
        try:
            keys.append(base64.b64decode(value.strip(), validate=True).partition(b":")[2])
        except (binascii.Error, ValueError):
            pass
    if "x-api-key" in headers:
        keys.append(headers["x-api-key"].encode("latin-1"))
    return keys


def is_cross_site(headers: Headers) -> bool:
    """Whether a browser says that a page of another site asks."""
    return headers.get("sec-fetch-site", "none") not in ("none", "same-origin")


def is_host_allowed(host: str, allowed: Sequence[str] | None) -> bool:
    """Whether the header ``host``, a name with or without a port, has one of the names ``allowed``; None is any."""
    if allowed is None or "*" in allowed:
        return True
    name = re.sub(r":\d*$", "", host).strip("[]").rstrip(".").lower()
    for pattern in allowed:
        pattern = pattern.strip("[]").lower()
        if name == pattern or (pattern.startswith("*.") and name.endswith(pattern[1:]) and len(name) >= len(pattern)):
            return True
    return "127.0.0.1" in allowed and _is_loopback(name)


def _is_loopback(name: str) -> bool:
    try:
        return ip_address(name).is_loopback
    except ValueError:
        return False
