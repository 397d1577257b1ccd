"""The schedulers' names for `--scheduler-cls`; `adakv_worker.core.scheduler` has the code."""

from adakv_worker.core.scheduler import AdaKVAsyncScheduler, AdaKVScheduler

__all__ = ["AdaKVAsyncScheduler", "AdaKVScheduler"]
