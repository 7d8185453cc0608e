"""The host half: requests, pages and what each step computes. Pure Python: never imports torch, knows no text."""

from nemo_engine.scheduler.request import Request, RequestStatus
from nemo_engine.scheduler.scheduled_step import StepOutput
from nemo_engine.scheduler.scheduler import Scheduler

__all__ = ["StepOutput", "Request", "RequestStatus", "Scheduler"]
