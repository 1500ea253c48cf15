#!/usr/bin/env bash
# One prompt at three expert counts, with curl: sh examples/counts.sh [ADDRESS]
# What differs between the requests is `num_experts`; `usage.num_experts` says what was used.
set -euo pipefail
address=${1:-http://localhost:8000}

for count in 1 4 8; do
    echo "K = $count"
    curl -sS --fail-with-body "$address/v1/completions" -H 'content-type: application/json' -d '{
        "prompt": "Once upon a time", "max_tokens": 32, "temperature": 0, "num_experts": '"$count"'
    }'
    echo
done

# A count that the model does not have is refused: the answer names the field, the value and the range.
curl -sS "$address/v1/completions" -H 'content-type: application/json' -d '{"prompt": "Once", "num_experts": 1000}'
echo
