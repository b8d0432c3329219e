#!/usr/bin/env bash
# The longest sequences that fit on one GPU, by what saves memory: prints rows, and writes them into RESULTS/training.json
# (tests/benchmarks/results/long.json holds those of the documentation).
#     bash tests/benchmarks/long.sh RESULTS [small] [large] [ladder] [two] [two-hybrid] [four]
# small: 0.4B at 64K, and at 1M and 2M tokens. large: 3B at 64K and 512K. ladder: 0.4B, one option after the other.
# two: 8B at 64K and 512K, two-hybrid: 8B with softmax in every eighth layer at 256K, over two GPUs of 141 GB; four: 8B at
# 64K and 1M over four GPUs; all with tensor and sequence parallelism. Host memory: 62 GiB a GPU at 512K over two and at
# 1M over four.
# Steps of a run have as many tokens at every length, so that the optimizer weighs the same. Every run has a time limit.
set -uo pipefail
out=$1
shift
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True} PYTHONUNBUFFERED=1
mkdir -p "$out"

tp=1 attention=lightning
run() { # limit in seconds, model, tokens of a step, tokens of a chunk (0: no chunks), yes or no (host), lengths
    local limit=$1 model=$2 tokens=$3 extra="--no-check-for-nan-in-loss-and-grad"
    [ "$4" = 0 ] || extra+=" --lightning-recompute-chunk $4"
    [ "$5" = no ] || extra+=" --lightning-offload-activations"
    shift 5
    echo "== $model, $extra, $* at $SECONDS s"
    timeout "$limit" python3 -m tests.benchmarks.training --models "$model" --attentions $attention \
        --tensor-parallel $tp --recompute --loss-chunk 8K --steps 3 --tokens-per-step "$tokens" \
        --tokens-per-microbatch 65536 --lengths "$@" --out "$out" --append --extra="$extra" |
        grep --line-buffered -E '^[0-9.]+B (lightning|hybrid) +[0-9]+K'
}

for part in ${*:-small large ladder}; do
    case $part in
    small)
        run 120 0.4B 1048576 0 no 64K
        run 120 0.4B 1048576 65536 no 1M
        run 240 0.4B 1048576 65536 yes 1M 2M
        ;;
    large)
        run 150 3B 524288 0 no 64K
        run 240 3B 524288 32768 yes 512K
        ;;
    two)
        tp=2
        run 200 8B 524288 0 no 64K
        run 270 8B 524288 65536 yes 512K
        ;;
    four)
        tp=4
        run 200 8B 1048576 0 no 64K
        run 300 8B 1048576 65536 yes 1M
        ;;
    two-hybrid)
        tp=2 attention=hybrid
        run 150 8B 262144 65536 yes 256K
        ;;
    ladder)
        run 100 0.4B 65536 0 no 256K 512K 1M
        run 120 0.4B 65536 32768 no 256K 1M
        ;;
    esac
done
