"""The warm-up with the GPU's page tables and kernels."""

from adakv_serve.kernels.gpu.device_tables import DeviceTables
from adakv_worker.config import CompressionConfig
from adakv_worker.worker.warm_up import warm_up
from tests.adakv_worker.worker.test_warm_up import make_state


def test_no_request_is_left() -> None:
    state = make_state(80, DeviceTables)
    warm_up(state, CompressionConfig(), 80)
    state.check()
    assert sorted(state.tables.open([slab]) for slab in range(4)) == [0, 1, 2, 3]
