"""The host half: requests, pages and what each step computes. Pure Python: never imports torch, knows no text."""

from nemo_engine.scheduler.request import Request, RequestStatus
from nemo_engine.scheduler.scheduled_step import StepOutput
from nemo_engine.scheduler.scheduler import Scheduler
from nemo_engine.scheduler.speculation import Speculation

__all__ = ["Request", "RequestStatus", "Scheduler", "Speculation", "StepOutput"]
