"""The GPU worker with compression."""

from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.gpu_worker import Worker

from adakv_worker.config import compression_config
from adakv_worker.support import refuse_unsupported
from adakv_worker.worker import AdaKVWorkerMixin


class AdaKVGPUWorker(AdaKVWorkerMixin, Worker):
    def init_device(self) -> None:
        if compression_config(self.vllm_config.additional_config) is not None:
            refuse_unsupported(self.vllm_config)
        super().init_device()

    def _make_model_runner(self) -> GPUModelRunner:
        if compression_config(self.vllm_config.additional_config) is None:
            return super()._make_model_runner()
        from adakv_worker.gpu_runner import AdaKVGPUModelRunner

        return AdaKVGPUModelRunner(self.vllm_config, self.device)
