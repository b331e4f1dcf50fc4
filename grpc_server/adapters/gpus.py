"""NVIDIA's GPUs by its management library (NVML). Without a driver there are none, which is no error."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, TypeVar

import pynvml

from grpc_server.domain.ports import Gpu, GpuDetail

log = logging.getLogger(__name__)
Read = TypeVar("Read")


class Gpus:
    """Asked now and then, in a thread: a driver may take its time. `nvml` is the library."""

    def __init__(self, nvml: Any = pynvml) -> None:
        self._nvml = nvml
        self._there = False
        try:
            nvml.nvmlInit()
            self._there = True
        except nvml.NVMLError as error:
            log.debug("no GPU is watched", extra={"reason": str(error)})

    @property
    def there(self) -> bool:
        """Whether there is a driver to ask."""
        return self._there

    def read(self) -> list[Gpu]:
        """Every GPU that answers; one that fell off the bus does not."""
        return self._each(self._gpu)

    def details(self) -> list[GpuDetail]:
        """The same, with name, temperature and processes."""
        return self._each(self._detail)

    def _each(self, read: Callable[[Any], Read]) -> list[Read]:
        if not self._there:
            return []
        found = []
        try:
            count = self._nvml.nvmlDeviceGetCount()
        except self._nvml.NVMLError as error:
            log.warning("the GPUs cannot be counted", extra={"reason": str(error)})
            return []
        for index in range(count):
            try:
                found.append(read(self._nvml.nvmlDeviceGetHandleByIndex(index)))
            except self._nvml.NVMLError as error:
                log.warning("a GPU does not answer", extra={"gpu": index, "reason": str(error)})
        return found

    def _detail(self, handle: Any) -> GpuDetail:
        running = [
            *self._told(lambda: self._nvml.nvmlDeviceGetComputeRunningProcesses(handle), ()),
            *self._told(lambda: self._nvml.nvmlDeviceGetGraphicsRunningProcesses(handle), ()),
        ]
        # A process that computes and draws is in both lists, with the same memory.
        held = {each.pid: each.usedGpuMemory or 0 for each in running}
        name = self._told(lambda: self._nvml.nvmlDeviceGetName(handle), "GPU")
        return GpuDetail(
            self._gpu(handle),
            name.decode() if isinstance(name, bytes) else name,
            self._told(lambda: self._nvml.nvmlDeviceGetTemperature(handle, 0), None),
            tuple(sorted(held.items(), key=lambda each: -each[1])),
        )

    def _told(self, ask: Callable[[], Any], otherwise: Any) -> Any:
        """What not every driver tells."""
        try:
            return ask()
        except self._nvml.NVMLError:
            return otherwise

    def _gpu(self, handle: Any) -> Gpu:
        memory = self._nvml.nvmlDeviceGetMemoryInfo(handle)
        busy = self._nvml.nvmlDeviceGetUtilizationRates(handle).gpu  # whole percents
        return Gpu(self._nvml.nvmlDeviceGetUUID(handle), busy / 100, memory.used, memory.total)

    def close(self) -> None:
        """Let go of the driver."""
        if self._there:
            self._there = False
            self._nvml.nvmlShutdown()
