"""The host half: requests, pages and what each step computes. Pure Python: never imports torch, knows no text."""

from nemo_engine.scheduler.request import Request, RequestStatus
from nemo_engine.scheduler.scheduled_step import Committed
from nemo_engine.scheduler.scheduler import Scheduler

__all__ = ["Committed", "Request", "RequestStatus", "Scheduler"]
