"""In vLLM's worker processes: on the path of `test_ranks.py` alone."""

import sys

if "--multiprocessing-fork" in sys.orig_argv:
    from tests.adakv_worker.gpu import interpreted

    interpreted.take_the_gpus_path()
