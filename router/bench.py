"""`python -m router.bench`: the cost of a decision and of a report.

The real chooser decides while replicas report and requests are booked. Memory is what the reports
of a thousand replicas add to a process.
"""

import argparse
import json
import multiprocessing
import random
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from adakv_serve.router.chooser import Chooser
from adakv_serve.router.footprint import Budget, predict
from adakv_serve.router.ledger.occupancy import Occupancy
from adakv_serve.router.local_view import LocalView

SIZES = (8, 64, 1000)
_PROMPT_TOKENS = 2000
_REPORTS_PER_DECISION = 4


def report(index: int, sequence: int, rng: random.Random) -> Occupancy:
    free = rng.randrange(545)
    return Occupancy(
        replica_id=f"replica-{index:04}",
        model="bench",
        epoch=1,
        sequence=sequence,
        block_size_tokens=32,
        blocks_total=545,
        blocks_free=free,
        blocks_reserved_growth=rng.randrange(100),
        running=rng.randrange(16),
        waiting=rng.randrange(4),
        waiting_blocks=rng.randrange(200),
        prefill_tokens_queued=rng.randrange(4000),
    )


def filled_view(replicas: int, rng: random.Random) -> LocalView:
    view = LocalView()
    for index in range(replicas):
        view.receive(report(index, 0, rng).model_dump_json(), time.monotonic())
    return view


def decision_times_s(replicas: int, decisions: int) -> list[float]:
    """Return the seconds of each decision, prefix look-up and booking included."""
    rng = random.Random(replicas)
    view = filled_view(replicas, rng)
    chooser = Chooser(view, rng=rng)
    ids = [f"replica-{index:04}" for index in range(replicas)]
    times = []
    for number in range(decisions):
        now = time.monotonic()
        for _ in range(_REPORTS_PER_DECISION):
            view.accept(report(rng.randrange(replicas), number + 1, rng), now)
        conversation = rng.randrange(50)
        hashes = tuple(hash((conversation, block)) for block in range(_PROMPT_TOKENS // 32))
        footprint = predict(_PROMPT_TOKENS, 200, Budget(256, 0.5), 32, hashes)
        started = time.perf_counter()
        decision = chooser.choose(number, ids, footprint, now)
        assert decision is not None
        chooser.sent(number, decision.replica_ids[0], footprint, now)
        times.append(time.perf_counter() - started)
        # Replicas without a fresh report would drop out of the measurement.
        if number % 200 == 0:
            for index in range(replicas):
                view.accept(report(index, number + 2, rng), now)
    return times


def report_cost_s(reports: int) -> tuple[float, float]:
    """Return the seconds to write a report and to read one."""
    rng = random.Random(1)
    ready = [report(index % 8, index, rng) for index in range(reports)]
    started = time.process_time()
    payloads = [one.model_dump_json() for one in ready]
    written = time.process_time()
    view = LocalView()
    for payload in payloads:
        view.receive(payload, 0.0)
    read = time.process_time()
    return (written - started) / reports, (read - written) / reports


def added_rss_mib(replicas: int) -> float:
    """Return the MiB that replicas add to a process, with reports, bookings and prefixes."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_added_rss_mib, (replicas,))


def _added_rss_mib(replicas: int) -> float:
    rng = random.Random(0)
    filled_view(1, rng)
    before = _rss_mib()
    view = filled_view(replicas, rng)
    chooser = Chooser(view, rng=rng)
    for index in range(replicas):
        hashes = tuple(hash((index, block)) for block in range(_PROMPT_TOKENS // 32))
        footprint = predict(_PROMPT_TOKENS, 200, None, 32, hashes)
        chooser.sent(index, f"replica-{index:04}", footprint, time.monotonic())
    return _rss_mib() - before


def _rss_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def run(decisions: int) -> dict[str, Any]:
    p50, p99 = {}, {}
    for size in SIZES:
        times = decision_times_s(size, decisions)
        p50[str(size)] = round(statistics.median(times) * 1000, 4)
        p99[str(size)] = round(statistics.quantiles(times, n=100)[98] * 1000, 4)
    write_s, read_s = report_cost_s(20_000)
    return {
        "decision_p50_ms": p50,
        "decision_p99_ms": p99,
        "added_rss_mib_1000": round(added_rss_mib(1000), 1),
        "report_write_us": round(write_s * 1e6, 1),
        "report_read_us": round(read_s * 1e6, 1),
        # A replica reports ten times a second at most.
        "report_share_of_a_core": round(10 * write_s, 6),
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m router.bench", description=__doc__)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--decisions", type=int, default=5000)
    args = parser.parse_args(argv)
    result = run(args.decisions)
    for size in SIZES:
        p50, p99 = (result[f"decision_{which}_ms"][str(size)] for which in ("p50", "p99"))
        print(f"{size:5} replicas: a decision takes p50 {p50} ms, p99 {p99} ms")
    print(f"1000 replicas' reports add {result['added_rss_mib_1000']} MiB")
    print(
        f"a report takes {result['report_write_us']} us to write and {result['report_read_us']} us "
        f"to read; ten a second take a replica {result['report_share_of_a_core']:.4%} of a core"
    )
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
