"""The GPU worker's name for `--worker-cls`; `adakv_worker.worker.gpu` has the code."""

from adakv_worker.worker.gpu import AdaKVGPUWorker

__all__ = ["AdaKVGPUWorker"]
