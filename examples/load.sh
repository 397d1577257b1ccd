#!/usr/bin/env bash
# Put a short load on a running server (`make serve`): eight users with long documents, 24 requests.
# Usage: examples/load.sh [URL]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
"${VENV:-.venv}/bin/locust" --headless -f loadtest/locustfile.py --host "${1:-http://127.0.0.1:8000}" \
  --workload long-document-qa --prompt-tokens 1500 --output-tokens 64 -u 8 --requests 24
