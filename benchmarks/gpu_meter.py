"""Clocks, power and energy of the GPU that this process uses, through nvidia-ml-py; nothing where there is none."""

from __future__ import annotations

import os
from typing import Any, Self


class GpuMeter:
    """Reads the first NVIDIA device that this process sees. ``nvml``: the library, for tests."""

    def __init__(self, nvml: Any = None) -> None:
        self._nvml: Any = None
        try:
            if nvml is None:
                import pynvml as nvml
            nvml.nvmlInit()
            visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
            find = nvml.nvmlDeviceGetHandleByIndex if visible.isdigit() else nvml.nvmlDeviceGetHandleByUUID
            self._device = find(int(visible) if visible.isdigit() else visible)
            self._nvml = nvml
        except Exception:  # the library is missing, or the driver, or the device
            return

    def joules(self) -> float | None:
        """Energy that the device has used since its driver was loaded, if it counts that."""
        if self._nvml is None:
            return None
        try:
            return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._device)) / 1000
        except Exception:
            return None

    def state(self) -> dict[str, float]:
        """{"sm_mhz", "memory_mhz", "watts", "celsius"} at this moment, what can be read of them."""
        nvml = self._nvml
        if nvml is None:
            return {}
        readers = {
            "sm_mhz": lambda: nvml.nvmlDeviceGetClockInfo(self._device, nvml.NVML_CLOCK_SM),
            "memory_mhz": lambda: nvml.nvmlDeviceGetClockInfo(self._device, nvml.NVML_CLOCK_MEM),
            "watts": lambda: nvml.nvmlDeviceGetPowerUsage(self._device) / 1000,
            "celsius": lambda: nvml.nvmlDeviceGetTemperature(self._device, nvml.NVML_TEMPERATURE_GPU),
        }
        readings: dict[str, float] = {}
        for name, read in readers.items():
            try:
                readings[name] = float(read())
            except Exception:  # this device does not tell
                continue
        return readings


class EnergySpan:
    """Entered and left around what is measured; then ``facts`` tells what it cost."""

    def __init__(self, meter: GpuMeter) -> None:
        self._meter = meter
        self._before: float | None = None
        self._after: float | None = None
        self._state: dict[str, float] = {}

    def __enter__(self) -> Self:
        self._before = self._meter.joules()
        return self

    def __exit__(self, *_: object) -> None:
        self._state, self._after = self._meter.state(), self._meter.joules()

    def facts(self, num_tokens: int) -> dict[str, object]:
        """The state of the GPU at the end and, if it counts energy, joules in all and for each of ``num_tokens``
        tokens; {} without a GPU.
        """
        fields: dict[str, object] = {"gpu_state": self._state} if self._state else {}
        if self._before is not None and self._after is not None:
            joules = self._after - self._before
            fields |= {"joules": joules, "joules_per_token": joules / num_tokens}
        return fields
