"""The GPU worker's name for `--worker-cls`; `adakv_worker.worker.gpu_worker` has the code."""

from adakv_worker.worker.gpu_worker import AdaKVGPUWorker

__all__ = ["AdaKVGPUWorker"]
