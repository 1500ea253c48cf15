#!/usr/bin/env bash
# Load with mixed expert counts: sh examples/load_test.sh [ADDRESS] [REQUESTS]
# Half of the requests ask for one expert, half for eight. Each rung doubles what runs at once; where the tokens per second stop
# growing and the time to the first token begins to, the server is full.
set -euo pipefail
address=${1:-http://localhost:8000}
requests=${2:-64}

for concurrency in 1 4 16; do
    echo "## $concurrency at once"
    moedial bench serve --url "$address" --requests "$requests" --concurrency "$concurrency" --mix 1:50,8:50 --max-tokens 32
done
