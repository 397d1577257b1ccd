"""`python -m loadtest.offline`: stock vLLM against compression at the same KV bytes, without HTTP.

Every arm is an engine in a process of its own, all with the same vLLM, model, thread count and KV
bytes; rounds alternate between the arms. An arm that compresses gets fewer KV bytes, by what it
holds beside the KV blocks. With `--out` it writes the same report as `loadtest.compare`.
"""

import argparse
import json
import shlex
import statistics
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from adakv_serve.loadtest.comparison.bound import bound
from adakv_serve.loadtest.comparison.order import interleaved
from adakv_serve.loadtest.comparison.page import Page, Section, write_page
from adakv_serve.loadtest.comparison.plots import throughput
from adakv_serve.loadtest.comparison.provenance import environment
from adakv_serve.loadtest.engines.folded_attention import folded_over_dense
from adakv_serve.loadtest.engines.process import EngineProcess
from adakv_serve.serving.models.embedded import embedded_model_path
from adakv_worker.config import check_policy_name

KV_BYTES = 190 << 20
# Page tables and scores of the arms that compress: three blocks of the default model. The report
# shows the bytes that they took.
RESERVED_BYTES = 3 * 1_474_560
# With the queries of evictions, which all requests of a mix collect at the same time.
RESERVED_EVICTING_BYTES = 19 * 1_474_560
ENGINE = {
    "dtype": "float32", "max_model_len": 3072, "block_size": 32, "enforce_eager": True,
    "max_num_batched_tokens": 2048, "enable_prefix_caching": True,
}  # fmt: skip
REQUESTS = 12
# Engines run at least so many requests at once.
LEAST_SEQUENCES = 16
MIXES = ("1500/192", "512/512")
# Long answers, whose caches shrink while they are written; not part of the default run.
EVICTING_MIXES = ("256/2000",)
BUDGETS = (512, 256, 128)
# The policy of the comparisons in the docs.
POLICY = "ada_snapkv"
_COLUMNS = {
    "name": "arm", "tokens_per_s": "tokens/s", "ratio_to_stock": "ratio", "bound": "bound",
    "peak_running": "running", "blocks_per_request": "blocks/request", "preemptions": "preempted",
    "prefill_s": "prefill", "compress_s": "compress", "decode_s": "decode",
    "agreement": "agreement",
}  # fmt: skip


class Arm(NamedTuple):
    """One engine of a comparison.

    policy: None for vLLM without our plug-in.
    budget_tokens: None where nothing is compressed.
    cache_dtype: vLLM's `kv_cache_dtype`. page_dtype: of the pages of compressed prompts.
    """

    policy: str | None = None
    budget_tokens: int | None = None
    cache_dtype: str = "auto"
    page_dtype: str = "auto"

    @property
    def name(self) -> str:
        """`stock`, `off` or the budget, behind whatever else is not as usual."""
        known = {None: "stock", "full": "off", POLICY: str(self.budget_tokens)}
        name = known.get(self.policy, f"{self.policy}-{self.budget_tokens}")
        if self.page_dtype != "auto":
            name = f"{self.page_dtype}-pages-{name}"
        return name if self.cache_dtype == "auto" else f"{self.cache_dtype}-{name}"

    def start(
        self, threads: int, requests: int, reserved_bytes: int, log: IO[str]
    ) -> EngineProcess:
        """Start the engine for so many requests at once."""
        compression: dict[str, Any] | None = None
        if self.policy is not None:
            compression = {"policy": self.policy}
        if self.budget_tokens is not None:
            assert compression is not None
            compression |= {
                "budget_tokens": self.budget_tokens,
                "keep_ratio": 0,
                "page_dtype": self.page_dtype,
            }
        engine = {
            **ENGINE,
            "max_num_seqs": max(LEAST_SEQUENCES, requests),
            "kv_cache_memory_bytes": KV_BYTES - (reserved_bytes if self.budget_tokens else 0),
            "kv_cache_dtype": self.cache_dtype,
        }
        settings = {
            "model": str(embedded_model_path()),
            "engine": engine,
            "compression": compression,
            "text": True,
        }
        return EngineProcess(self.name, settings, threads, log)


def _bound(stock: dict[str, Any], ours: dict[str, Any]) -> float:
    gain = ours["decode_tokens_per_s"] / stock["decode_tokens_per_s"]
    return bound(stock["prefill_s"] + stock["decode_s"], stock["prefill_s"], gain)


def run_mix(
    engines: dict[Arm, EngineProcess], mix: str, requests: int, repeat: int
) -> dict[str, Any]:
    """Measure all arms on one mix."""
    prompt_tokens, output_tokens = (int(part) for part in mix.split("/"))
    by_name = {arm.name: arm for arm in engines}
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in by_name}
    answers: dict[str, list[list[int]]] = {name: [] for name in by_name}
    width = max(map(len, by_name))
    for turn, name in interleaved(by_name, repeat):
        budget = by_name[name].budget_tokens
        done = engines[by_name[name]].ask(
            {
                "requests": requests,
                "prompt_tokens": prompt_tokens,
                "output_tokens": output_tokens,
                "seed": turn,
                "decode_budget_tokens": budget if mix in EVICTING_MIXES else None,
            }
        )
        answers[name] += done.pop("answers")
        rounds[name].append(done)
        rate = f"{done['tokens_per_s']:6.1f} tokens/s"
        print(f"{mix}, round {turn + 1}/{repeat}, {name:{width}}: {rate}", flush=True)
    summary = _summary(rounds, [name for name, arm in by_name.items() if arm.budget_tokens])
    for name, mine in answers.items():
        summary[name]["agreement"] = round(agreement(mine, answers["stock"]), 3)
    return summary


def agreement(answers: list[list[int]], others: list[list[int]]) -> float:
    """Return the mean share of an answer's tokens before the first that differs."""
    shares = []
    for one, other in zip(answers, others, strict=True):
        pairs = zip(one, other, strict=False)
        same = next((i for i, (a, b) in enumerate(pairs) if a != b), len(other))
        shares.append(same / len(other))
    return statistics.mean(shares)


def _summary(rounds: dict[str, list[dict[str, Any]]], names: list[str]) -> dict[str, Any]:
    """Return the medians of all rounds, and what the arms `names`, which compress, gain."""
    summary: dict[str, Any] = {name: _medians(done) for name, done in rounds.items()}
    stock = summary.get("stock")
    if stock is not None:
        summary["bound"] = {name: round(_bound(stock, summary[name]), 3) for name in names}
        ratios = {
            name: _ratios(rounds[name], rounds["stock"]) for name in rounds if name != "stock"
        }
        summary["ratio"] = {
            name: round(statistics.median(each), 3) for name, each in ratios.items()
        }
        summary["ratio_range"] = {
            name: [round(min(each), 3), round(max(each), 3)] for name, each in ratios.items()
        }
        summary["ratio_of_bound"] = {
            name: round(summary["ratio"][name] / summary["bound"][name], 3) for name in names
        }
    totals = {done["output_tokens"] for turns in rounds.values() for done in turns}
    summary["output_tokens_equal"] = len(totals) == 1
    summary["extra_bytes"] = max(done["extra_bytes"] for turns in rounds.values() for done in turns)
    return summary


def _ratios(ours: list[dict[str, Any]], stock: list[dict[str, Any]]) -> list[float]:
    return [a["tokens_per_s"] / b["tokens_per_s"] for a, b in zip(ours, stock, strict=True)]


def _medians(turns: list[dict[str, Any]]) -> dict[str, Any]:
    medians: dict[str, Any] = {
        key: round(statistics.median(turn[key] for turn in turns), 4) for key in turns[0]
    }
    rates = [turn["tokens_per_s"] for turn in turns]
    medians["tokens_per_s_range"] = [round(min(rates), 4), round(max(rates), 4)]
    return medians


def _reserved_bytes(mixes: Iterable[str]) -> int:
    """Return the bytes taken off the KV memory of the arms that compress."""
    return RESERVED_EVICTING_BYTES if set(mixes) & set(EVICTING_MIXES) else RESERVED_BYTES


def _print(
    mix: str, requests: int, summary: dict[str, Any], names: list[str], reserved_bytes: int
) -> None:
    print(f"\n{mix}: {requests} requests, {KV_BYTES >> 20} MiB of KV")
    width = max(map(len, names))
    figures = "tok/s   ratio  bound  running  blocks/req  preempt  prefill  compress  decode  agree"
    print(f"{'arm':{width}}  {figures}")
    for name in names:
        row = summary[name]
        ratio = summary.get("ratio", {}).get(name, 1.0 if name == "stock" else float("nan"))
        limit = summary.get("bound", {}).get(name)
        print(
            f"{name:{width}} {row['tokens_per_s']:6.1f} {ratio:7.2f} "
            f"{'' if limit is None else format(limit, '.2f'):>6} {row['peak_running']:8.0f} "
            f"{row['blocks_per_request']:11.1f} {row['preemptions']:8.0f} {row['prefill_s']:7.1f}s "
            f"{row['compress_s']:8.2f}s {row['decode_s']:6.1f}s {row['agreement']:6.2f}"
        )
    equal = "equal" if summary["output_tokens_equal"] else "NOT equal"
    print(
        f"output tokens of all arms: {equal}; held beside KV: {summary['extra_bytes']} bytes, "
        f"{reserved_bytes} taken off the compressing arms' KV"
    )


def run(
    mixes: list[str],
    ours: list[Arm],
    repeat: int,
    threads: int,
    *,
    requests: int = REQUESTS,
    cache_dtypes: Sequence[str] = ("auto",),
) -> dict[str, Any]:
    """Measure stock vLLM, with each dtype of its cache, and our arms on each mix."""
    # The price of the arm that keeps everything shows in the other mixes.
    off = [Arm("full")] if set(mixes) - set(EVICTING_MIXES) else []
    others = [Arm(cache_dtype=dtype) for dtype in cache_dtypes if dtype != "auto"]
    arms = [Arm(), *others, *off, *ours]
    names = [arm.name for arm in arms]
    result: dict[str, Any] = {"mixes": {}}
    with tempfile.NamedTemporaryFile(
        "w", prefix="adakv-offline-", suffix=".log", delete=False
    ) as log:
        print(f"starting the engines, their log is {log.name}", flush=True)
        reserved = _reserved_bytes(mixes)
        engines = {arm: arm.start(threads, requests, reserved, log) for arm in arms}
        try:
            for arm, engine in engines.items():
                engine.ask({"requests": 2, "prompt_tokens": 300, "output_tokens": 8, "seed": -1})
                print(f"{arm.name}: engine ready", flush=True)
            for mix in mixes:
                result["mixes"][mix] = run_mix(engines, mix, requests, repeat)
                _print(mix, requests, result["mixes"][mix], names, reserved)
        finally:
            for engine in engines.values():
                engine.stop()
    figures = [mix[arm.name] for mix in result["mixes"].values() for arm in ours]
    result["compress_share_of_prefill"] = round(max(f["compress_share"] for f in figures), 4)
    result["prepare_share_of_decode_step"] = round(max(f["prepare_share"] for f in figures), 4)
    result["folded_over_dense"] = round(folded_over_dense(), 3)
    for key in ("compress_share_of_prefill", "prepare_share_of_decode_step", "folded_over_dense"):
        print(f"{key}: {result[key]}")
    return result


def write_report(result: dict[str, Any], repeat: int, folder: Path, command: list[str]) -> None:
    """Write the result of `run` as `results.json`, `report.md`, `report.html` and plots."""
    folder.mkdir(parents=True, exist_ok=True)
    sections = []
    for mix, summary in result["mixes"].items():
        rows = _rows(summary)
        picture = f"{mix.replace('/', '-')}.throughput.png"
        throughput(mix, "stock", rows).savefig(folder / picture)
        remarks = [f"held beside KV: {summary['extra_bytes']} bytes"]
        equal = summary["output_tokens_equal"]
        sections.append(Section(mix, rows, equal, remarks, [picture]))
    arms = [{"workload": one.name, **row} for one in sections for row in one.rows]
    where = environment()
    figures = {"arms": arms, **result, "environments": [where], "command": command}
    (folder / "results.json").write_text(json.dumps(figures, indent=2) + "\n")
    page = Page(KV_BYTES, repeat, "stock", True, _COLUMNS, sections, [where], command)
    write_page(page, folder)


def _rows(summary: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the arms of a mix with the values of the report's columns."""
    rows = []
    for name, figures in summary.items():
        if not isinstance(figures, dict) or "tokens_per_s" not in figures:
            continue
        ratio = 1.0 if name == "stock" else summary["ratio"][name]
        spread = [1.0, 1.0] if name == "stock" else summary["ratio_range"][name]
        row = {"name": name, "ratio_to_stock": ratio, "ratio_range": spread}
        rows.append({**figures, **row, "bound": summary["bound"].get(name)})
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtest.offline", description=__doc__)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--out", type=Path, help="a folder for the report")
    parser.add_argument("--mix", nargs="+", choices=(*MIXES, *EVICTING_MIXES), default=list(MIXES))
    parser.add_argument("--budgets", type=int, nargs="+", default=list(BUDGETS))
    parser.add_argument("--policies", nargs="+", default=[POLICY], help="each at every budget")
    parser.add_argument("--requests", type=int, default=REQUESTS, help="of each round")
    parser.add_argument(
        "--cache-dtypes", nargs="+", default=["auto"], help="vLLM's kv_cache_dtype, for each arm"
    )
    parser.add_argument(
        "--page-dtypes", nargs="+", default=["auto"],
        help="page_dtype of our arms, each where the cache's dtype is auto",
    )  # fmt: skip
    parser.add_argument("--repeat", type=int, default=3, help="rounds for each arm")
    parser.add_argument("--threads", type=int, default=1, help="threads of each engine")
    args = parser.parse_args(argv)
    try:
        for policy in args.policies:
            check_policy_name(policy)
    except ValueError as error:
        parser.error(str(error))
    ours = [
        Arm(policy, budget, dtype, pages)
        for dtype in args.cache_dtypes
        for pages in args.page_dtypes
        if "auto" in (dtype, pages)
        for policy in args.policies
        for budget in args.budgets
    ]
    try:
        result = run(
            args.mix, ours, args.repeat, args.threads,
            requests=args.requests, cache_dtypes=args.cache_dtypes,
        )  # fmt: skip
    except RuntimeError as error:
        print(f"loadtest.offline: {error}", file=sys.stderr)
        return 1
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    if args.out:
        command = ["adakv", "bench", "offline", *map(shlex.quote, argv or sys.argv[1:])]
        write_report(result, args.repeat, args.out, command)
        print(f"report: {args.out / 'report.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
