"""The CPU worker's name for `--worker-cls`; `adakv_worker.worker.cpu` has the code."""

from adakv_worker.worker.cpu import AdaKVCPUWorker

__all__ = ["AdaKVCPUWorker"]
