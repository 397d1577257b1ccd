"""The CPU worker's name for `--worker-cls`; `adakv_worker.worker.cpu_worker` has the code."""

from adakv_worker.worker.cpu_worker import AdaKVCPUWorker

__all__ = ["AdaKVCPUWorker"]
