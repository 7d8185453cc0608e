"""Response headers that list the fields of a request that had no effect."""

from __future__ import annotations

from nemo_engine.server.fields import MAX_IGNORED
from nemo_engine.server.protocol import IGNORED_FIELDS_HEADER, ApiRequest


def response_headers(request: ApiRequest) -> dict[str, str]:
    """``X-Ignored-Fields`` with the fields that had no effect, if there are any.

    ``ApiError`` for one that is refused.
    """
    ignored = request.ignored_fields()
    names = [ascii(name)[1:-1][:64].replace(",", " ") for name in ignored[:MAX_IGNORED]]
    return {IGNORED_FIELDS_HEADER: ", ".join(names)} if names else {}
