"""Exactly the configured keys open the front door."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adakv_serve.serving.http.api_keys import ApiKeys

KEY = "Sk-Right0-c4fe"
KEYS = ApiKeys((KEY, "other"))


def _opens(key: str, path: str = "/v1/models") -> bool:
    return KEYS.caller(path, {"authorization": f"Bearer {key}"}) is not None


@pytest.mark.parametrize(
    "near_miss",
    [
        KEY.lower(), KEY.upper(), KEY.swapcase(), KEY[:5], KEY[:-1], KEY[1:], KEY + "x", KEY + " ",
        " " + KEY, KEY[:5] + "x" * 9, "x" + KEY[1:], KEY[::-1], KEY.replace("0", "O"),
        f"{KEY},other", "",
    ],
)  # fmt: skip
def test_a_near_miss_is_refused(near_miss: str) -> None:
    assert _opens(KEY)
    assert not _opens(near_miss)


def test_keys_are_compared_by_more_than_a_part_of_a_digest() -> None:
    # Two thousand keys share every single byte of a digest with the right ones several times.
    assert not any(_opens(f"key-{number}") for number in range(2000))


@given(key=st.text())
def test_any_other_text_is_refused(key: str) -> None:
    assert _opens(key) == (key in (KEY, "other"))


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
def test_the_scheme_is_compared_without_case(scheme: str) -> None:
    assert KEYS.caller("/v1/models", {"authorization": f"{scheme} {KEY}"})


@pytest.mark.parametrize("header", [KEY, f"Basic {KEY}", f"Token {KEY}", f"Bearer:{KEY}", "Bearer"])
def test_another_scheme_is_refused(header: str) -> None:
    assert not KEYS.caller("/v1/models", {"authorization": header})


@pytest.mark.parametrize("path", ["/health", "/version"])
def test_health_and_version_need_no_key(path: str) -> None:
    assert _opens("", path)


@pytest.mark.parametrize(
    "path",
    [
        "/health/",
        "/healthz",
        "/version2",
        "/",
        "/docs",
        "/openapi.json",
        "/ping",
        "/load",
        "/metrics",
    ],
)
def test_paths_like_the_open_ones_need_a_key(path: str) -> None:
    assert not _opens("", path)


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
def test_a_key_may_have_any_characters(encoding: str) -> None:
    sent = "schlüssel-ñ".encode(encoding).decode("latin-1")
    headers = {"authorization": f"Bearer {sent}"}
    assert ApiKeys(("schlüssel-ñ",)).caller("/v1/models", headers)
    assert not ApiKeys(("schlussel-n",)).caller("/v1/models", headers)
    japanese = "鍵".encode().decode("latin-1")
    assert ApiKeys(("鍵",)).caller("/v1/models", {"authorization": f"Bearer {japanese}"})


def test_without_keys_everything_is_open() -> None:
    assert ApiKeys(()).caller("/v1/models", {})
