"""The options that the load test adds to Locust's."""

from locust.argument_parser import LocustArgumentParser

from adakv_serve.loadtest.traffic.workloads import WORKLOADS


def add_options(parser: LocustArgumentParser) -> None:
    """Add every option of the load test.

    They are not a group: the web UI shows only what the parser itself has. It sends every option
    back with the type of its default, so no default is None.
    """
    add = parser.add_argument
    add("--workload", choices=list(WORKLOADS), default="long-document-qa")
    add("--trace", default="", help="replay this JSONL file instead (ours or Mooncake's format)")
    add("--trace-scale", type=float, default=0.0, help="factor on a trace's lengths (0: it fits)")
    add("--prompt-tokens", type=int, default=0, help="0: five eighths of the context")
    add("--output-tokens", type=int, default=0, help="0: an eighth of the context")
    add("--context-tokens", type=int, default=0, help="0: as the server reports")
    add("--tokenizer", default="", help="folder or hub id (default: the model's, if it is local)")
    add("--model", default="", help="default: the server's first")
    add("--seed", type=int, default=0)
    add("--sessions", type=int, default=0, help="end after so many sessions, warm-up left out")
    add("--requests", type=int, default=0, help="end after so many requests, warm-up left out")
    add("--warmup", type=int, default=0, help="requests that are answered before the test begins")
    add("--rate", type=float, default=0.0, help="open loop: sessions a second, a Poisson process")
    add("--limit-ttft-s", type=float, default=0.0, help="of a request that counts for goodput")
    add("--limit-tpot-s", type=float, default=0.0, help="of a request that counts for goodput")
    add("--records", default="", help="write a line of JSON for each request")
    add("--xargs", default="", help="JSON for vllm_xargs, such as '{\"adakv_budget_tokens\": 128}'")
    add("--no-ignore-eos", action="store_true", help="for servers without ignore_eos")
