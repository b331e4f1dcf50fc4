"""GPUs by NVIDIA's library: with a driver, without one, and with one that loses a GPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from grpc_server.adapters.gpus import Gpus
from grpc_server.domain.ports import Gpu, GpuDetail


class NVMLError(Exception):
    """As the library's."""


class Nvml:
    """Two GPUs; `broken` is the method that fails, `lost` the index of a GPU that does not answer."""

    NVMLError = NVMLError

    def __init__(self, broken: str = "", lost: int | None = None) -> None:
        self.broken = broken
        self.lost = lost
        self.open = False

    def nvmlInit(self) -> None:  # noqa: N802 - the library's names
        self._may("nvmlInit")
        self.open = True

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.open = False

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        self._may("nvmlDeviceGetCount")
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        if index == self.lost:
            raise NVMLError("GPU is lost")
        return index

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Any:  # noqa: N802
        return SimpleNamespace(used=handle + 1, total=80)

    def nvmlDeviceGetUtilizationRates(self, handle: int) -> Any:  # noqa: N802
        return SimpleNamespace(gpu=90, memory=10)

    def nvmlDeviceGetUUID(self, handle: int) -> str:  # noqa: N802
        return f"GPU-{handle}"

    def nvmlDeviceGetName(self, handle: int) -> bytes:  # noqa: N802
        return f"Card {handle}".encode()

    def nvmlDeviceGetTemperature(self, handle: int, sensor: int) -> int:  # noqa: N802
        assert sensor == 0
        self._may("nvmlDeviceGetTemperature")
        return 60 + handle

    def nvmlDeviceGetComputeRunningProcesses(self, handle: int) -> list[Any]:  # noqa: N802
        return [SimpleNamespace(pid=1, usedGpuMemory=10), SimpleNamespace(pid=7, usedGpuMemory=30)]

    def nvmlDeviceGetGraphicsRunningProcesses(self, handle: int) -> list[Any]:  # noqa: N802
        self._may("nvmlDeviceGetGraphicsRunningProcesses")
        return [SimpleNamespace(pid=7, usedGpuMemory=30), SimpleNamespace(pid=9, usedGpuMemory=None)]

    def _may(self, method: str) -> None:
        if method == self.broken:
            raise NVMLError("Driver Not Loaded")


def test_every_gpu_is_read() -> None:
    nvml = Nvml()
    gpus = Gpus(nvml)
    assert gpus.there
    assert gpus.read() == [Gpu("GPU-0", 0.9, 1, 80), Gpu("GPU-1", 0.9, 2, 80)]
    gpus.close()
    assert not nvml.open
    assert gpus.read() == []


def test_without_a_driver_there_are_none() -> None:
    gpus = Gpus(Nvml(broken="nvmlInit"))
    assert not gpus.there
    assert gpus.read() == []
    gpus.close()


def test_a_gpu_that_is_lost_leaves_the_others() -> None:
    assert [gpu.id for gpu in Gpus(Nvml(lost=0)).read()] == ["GPU-1"]


def test_a_driver_that_stops_answering_leaves_none() -> None:
    assert Gpus(Nvml(broken="nvmlDeviceGetCount")).read() == []


def test_an_operator_sees_name_temperature_and_processes_the_largest_first() -> None:
    first, second = Gpus(Nvml()).details()
    assert first == GpuDetail(Gpu("GPU-0", 0.9, 1, 80), "Card 0", 60, ((7, 30), (1, 10), (9, 0)))
    assert second.temperature == 61
    assert [each.gpu.id for each in Gpus(Nvml(lost=0)).details()] == ["GPU-1"]


def test_what_a_driver_does_not_tell_is_left_out() -> None:
    assert Gpus(Nvml(broken="nvmlDeviceGetTemperature")).details()[0].temperature is None
    fewer = Gpus(Nvml(broken="nvmlDeviceGetGraphicsRunningProcesses")).details()[0].processes
    assert fewer == ((7, 30), (1, 10))
    assert Gpus(Nvml(broken="nvmlInit")).details() == []


def test_the_real_library_says_whether_there_is_a_driver() -> None:
    gpus = Gpus()
    assert bool(gpus.read()) is gpus.there
    gpus.close()
