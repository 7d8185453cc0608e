"""Memory, power and energy of the GPU, through nvidia-ml-py where it is installed and there is one; else nothing."""

from __future__ import annotations

from typing import Any


class GpuReader:
    """Reads one NVIDIA device, the first that this process sees."""

    def __init__(self) -> None:
        self._nvml: Any = None
        self._device: Any = None
        self._first_energy: float | None = None
        try:
            import pynvml

            pynvml.nvmlInit()
            self._device = pynvml.nvmlDeviceGetHandleByIndex(0)
            self._nvml = pynvml
        except Exception:  # the library is missing, or the driver, or the device
            return
        self._first_energy = self._energy()

    def read(self, num_tokens: int) -> list[tuple[str, str, bool, float]]:
        """(name, text, whether it is a counter, value) of what can be read. ``num_tokens`` were generated so far."""
        nvml = self._nvml
        if nvml is None:
            return []
        readings: list[tuple[str, str, bool, float]] = []
        try:
            memory = nvml.nvmlDeviceGetMemoryInfo(self._device)
            readings.append(("gpu_memory_used_bytes", "Memory of the GPU in use.", False, memory.used))
            readings.append(("gpu_memory_total_bytes", "Memory of the GPU.", False, memory.total))
            watts = nvml.nvmlDeviceGetPowerUsage(self._device) / 1000
            readings.append(("gpu_power_watts", "Power that the GPU draws.", False, watts))
        except nvml.NVMLError:
            pass
        energy = self._energy()
        if energy is not None and self._first_energy is not None:
            joules = energy - self._first_energy
            readings.append(("gpu_energy_joules", "Energy that the GPU has used since the start.", True, joules))
            if joules > 0:
                text = "Tokens generated per joule of the GPU since the start."
                readings.append(("tokens_per_joule", text, False, num_tokens / joules))
        return readings

    def _energy(self) -> float | None:
        """Joules since the driver was loaded, if the device counts them."""
        try:
            return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._device)) / 1000
        except Exception:
            return None
