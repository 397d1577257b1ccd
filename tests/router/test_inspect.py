import json

import pytest
import redis

from adakv_serve.router import DEFAULT_APPLICATION, DEFAULT_KEY_PREFIX, inspect
from adakv_serve.router.ledger.redis_ledger import LedgerKeys, LedgerWriter
from tests.router.occupancies import occupancy


@pytest.fixture
async def reported(store_url: str, client: redis.Redis) -> str:
    writer = LedgerWriter(store_url, LedgerKeys(DEFAULT_KEY_PREFIX, DEFAULT_APPLICATION), ttl_s=600)
    await writer.publish(occupancy("abc"))
    await writer.close()
    return store_url


async def test_json_names_every_replica(reported: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect.main(["--url", reported, "--json"]) == 0
    (replica,) = json.loads(capsys.readouterr().out)["replicas"]
    expected = {"id": "abc", "blocks_total": 100, "blocks_free": 40, "running": 2, "waiting": 1}
    assert expected.items() <= replica.items()
    assert replica["age_s"] == 0.0


async def test_the_table_shows_use(reported: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect.main(["--url", reported]) == 0
    header, row = capsys.readouterr().out.splitlines()
    assert header.split()[0] == "replica"
    assert row.split()[:4] == ["abc", "100", "40", "60%"]


def test_an_unreachable_store_is_one_line_and_exit_1(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert inspect.main(["--url", "redis://:secret@127.0.0.1:1"]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert "secret" not in printed.err


async def test_watching_draws_bars(
    store_url: str, client: redis.Redis, capsys: pytest.CaptureFixture[str]
) -> None:
    writer = LedgerWriter(store_url, LedgerKeys(DEFAULT_KEY_PREFIX, DEFAULT_APPLICATION), ttl_s=600)
    await writer.publish(
        occupancy("abc", blocks_compressed=25, blocks_uncompressed=35, blocks_reserved_growth=90)
    )
    await writer.close()
    assert inspect.main(["--url", store_url, "--watch", "--draws", "2", "--interval", "0"]) == 0
    first, second = capsys.readouterr().out.split(inspect.CLEAR)[1:]
    assert first.split("\n")[1].split()[:4] == second.split("\n")[1].split()[:4]
    (bar,) = [word for word in first.split() if word.startswith("##")]
    assert bar == "#" * 8 + "=" * 11 + "+" * 13


async def test_watching_outlives_the_store(capsys: pytest.CaptureFixture[str]) -> None:
    url = "redis://127.0.0.1:1"
    assert inspect.main(["--url", url, "--watch", "--draws", "2", "--interval", "0"]) == 0
    assert capsys.readouterr().out.count("cannot read the store") == 2


async def test_watching_as_json_is_an_object_a_line(
    reported: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--url", reported, "--json", "--watch", "--draws", "2", "--interval", "0"]
    assert inspect.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [json.loads(line)["replicas"][0]["id"] for line in lines] == ["abc", "abc"]
