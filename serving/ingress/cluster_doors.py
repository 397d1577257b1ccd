"""Doors of the cluster that the application relies on: TLS to clients, and Ray's own ports."""

import logging
from collections.abc import Mapping

from ray.serve.config import HTTPOptions


def refuse_tls_options(options: HTTPOptions, *, has_haproxy: bool) -> None:
    """Refuse Serve's options of TLS if HAProxy answers clients.

    HAProxy would answer in plain text all the same, and fail to reach the front doors, which would
    expect TLS of it.

    Raises:
        ValueError: they are set, and HAProxy is in front.
    """
    if not has_haproxy or not (options.ssl_keyfile or options.ssl_certfile):
        return
    raise ValueError(
        "http_options.ssl_keyfile and ssl_certfile do not work with HAProxy: give HAProxy the "
        "certificate and its key in one file, which ADAKV_TLS_CERTIFICATE names in the environment "
        "of `ray start` or `serve run`, or set RAY_SERVE_ENABLE_HA_PROXY=0"
    )


def warn_of_open_cluster(environment: Mapping[str, str], logger: logging.Logger) -> None:
    """Log a warning if whoever reaches Ray's ports can run code on this cluster.

    Args:
        environment: of a process that Ray has started.
    """
    has_token = environment.get("RAY_AUTH_MODE", "").lower() == "token"
    if not has_token and environment.get("RAY_USE_TLS", "0").lower() not in ("1", "true"):
        logger.warning(
            "Ray's ports ask for no token: whoever reaches them can run code here. Set "
            "RAY_AUTH_MODE=token for `ray start`, see docs/security.md"
        )
