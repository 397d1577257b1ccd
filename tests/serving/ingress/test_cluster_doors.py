"""TLS to clients, which Serve's options give only without HAProxy, and Ray's own ports."""

import logging

import pytest
from ray.serve.config import HTTPOptions

from adakv_serve.serving.ingress.cluster_doors import refuse_tls_options, warn_of_open_cluster

TLS = HTTPOptions(ssl_keyfile="/key.pem", ssl_certfile="/cert.pem")


def test_tls_options_that_haproxy_ignores_are_refused_with_the_way() -> None:
    with pytest.raises(ValueError, match=r"http_options\.ssl_keyfile.*ADAKV_TLS_CERTIFICATE"):
        refuse_tls_options(TLS, has_haproxy=True)


@pytest.mark.parametrize(("options", "has_haproxy"), [(TLS, False), (HTTPOptions(), True)])
def test_others_are_served(options: HTTPOptions, has_haproxy: bool) -> None:
    refuse_tls_options(options, has_haproxy=has_haproxy)


@pytest.mark.parametrize(
    ("environment", "is_open"),
    [
        ({}, True),
        ({"RAY_AUTH_MODE": "disabled", "RAY_USE_TLS": "0"}, True),
        ({"RAY_AUTH_MODE": "token"}, False),
        ({"RAY_USE_TLS": "1"}, False),
    ],
)
def test_a_cluster_that_anyone_can_use_is_worth_a_warning(
    environment: dict[str, str], is_open: bool, caplog: pytest.LogCaptureFixture
) -> None:
    warn_of_open_cluster(environment, logging.getLogger("test"))
    assert ("RAY_AUTH_MODE=token" in caplog.text) is is_open
