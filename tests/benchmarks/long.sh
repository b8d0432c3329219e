#!/usr/bin/env bash
# The longest sequences that fit on one GPU, by what saves memory: prints rows, and writes long/training.json in $1.
#     bash tests/benchmarks/long.sh RESULTS
# Rows with an error end a run's lengths, and not the script. Each has a time limit, so that one hour of waiting for a
# sequence that is too slow costs no other row.
set -uo pipefail
out=$1
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True} PYTHONUNBUFFERED=1
mkdir -p "$out"

run() { # seconds, model, flags of the plugin, lengths
    local limit=$1 model=$2 extra=$3
    shift 3
    echo "== $model, $extra, at $((SECONDS)) s"
    timeout "$limit" python3 -m tests.benchmarks.training --models "$model" --attentions lightning --recompute \
        --loss-chunk 8K --steps 3 --tokens-per-step 65536 --tokens-per-microbatch 65536 --lengths "$@" --out "$out" \
        --append --extra="--no-check-for-nan-in-loss-and-grad $extra" | grep -v '^tokens/GPU\|(max - min)'
}

chunk="--lightning-recompute-chunk 32768"
host="--lightning-offload-activations"
run 90 0.4B "" 64K 256K 512K 1M
run 100 0.4B "$chunk" 64K 256K 1M
run 100 3B "" 64K
run 200 3B "$chunk $host" 64K 512K
run 200 0.4B "$chunk $host" 64K 1M 2M
