"""placeholder, to be replaced."""

from fastapi import APIRouter

from nemo_engine.server.service import Service


def monitor_routes(service: Service) -> APIRouter:
    return APIRouter()
