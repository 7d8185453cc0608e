"""placeholder, to be replaced."""

from collections.abc import Mapping

from nemo_engine.outputs import RequestOutput


class Tracing:
    def __init__(self, endpoint: str | None) -> None:
        assert endpoint is None

    def request_done(self, output: RequestOutput, request_id: str, model_name: str, headers: Mapping[str, str]) -> None:
        pass
