"""Ask a running server (`make serve`) about a long text, with a budget for this request.

Usage: python examples/chat.py [URL]
"""

import sys

from openai import OpenAI

TEXT = "The lighthouse keeper wrote down the name of every ship that passed the cape. " * 100
QUESTION = "What did the lighthouse keeper write down?"


def main() -> None:
    url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
    # Use the server's key here if it has one.
    client = OpenAI(base_url=f"{url}/v1", api_key="none")
    model = client.models.list().data[0].id
    answer = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": f"{TEXT}\n\n{QUESTION}"}],
        max_tokens=40,
        temperature=0,
        extra_body={"vllm_xargs": {"adakv_budget_tokens": 128}},
    )
    print(answer.choices[0].message.content)
    print(answer.model_extra["kv_compression"])


if __name__ == "__main__":
    main()
