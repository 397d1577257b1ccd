"""The CPU worker with compression."""

from typing import Any

from vllm.v1.worker.cpu_worker import CPUWorker

from adakv_worker.config import compression_config
from adakv_worker.refusals import refuse_unsupported
from adakv_worker.worker.base import AdaKVWorkerMixin
from adakv_worker.worker.cpu_runner import AdaKVCPUModelRunner, AdaKVCPUModelRunnerV2


class AdaKVCPUWorker(AdaKVWorkerMixin, CPUWorker):
    def init_device(self) -> None:
        if compression_config(self.vllm_config.additional_config) is not None:
            refuse_unsupported(self.vllm_config)
        super().init_device()
        if compression_config(self.vllm_config.additional_config) is not None:
            # vLLM's CPU worker makes its runner itself and asks nobody for the class.
            runner: Any = AdaKVCPUModelRunnerV2 if self.use_v2_model_runner else AdaKVCPUModelRunner
            self.model_runner.__class__ = runner
