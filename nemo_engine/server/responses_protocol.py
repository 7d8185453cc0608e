"""placeholder, to be replaced."""

from nemo_engine.server.protocol import ApiRequest


class ResponsesRequest(ApiRequest):
    """The body of /v1/responses."""
