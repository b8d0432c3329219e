#!/bin/bash
# CUDA graphs and selective recompute on one GPU: tests first, then speed, idle time and memory in one table.
#
#     bash tests/benchmarks/graphs.sh RESULTS [tests] [graphs] [recompute]
#
# RESULTS/training.json has the rows, RESULTS/graphs-tests.txt what the tests say. About 8 minutes on one H200, or only
# the parts that are named. Each command may fail without those after it.
results=${1:?a folder for the results}
parts=${*:2}
wants() { [[ " ${parts:-tests graphs recompute} " == *" $1 "* ]]; }
python=${PYTHON:-python}
mkdir -p "$results"
run="$python -m tests.benchmarks.training --models 0.4B --attentions lightning --out $results --append --steps 8"
micro="--tokens-per-microbatch 2048 --tokens-per-step 32768 --profile"
workers=""
$python -c "import xdist" 2> /dev/null && workers="-n 5"

if wants tests; then
echo "== tests"
timeout -s INT -k 8 300 $python -m pytest -q -p no:cacheprovider -m gpu $workers -rfEsP tests/test_cuda_graphs_gpu.py tests/test_sharded_training.py \
    > "$results/graphs-tests.txt" 2>&1
grep -E "^graphs |^(FAILED|ERROR|SKIPPED)|^E  |passed|failed" "$results/graphs-tests.txt" | cut -c1-400 | head -80
fi

if wants graphs; then
echo "== CUDA graphs: 2K, 4K and 8K tokens in a microbatch"
$run $micro --lengths 2K 4K 8K > "$results/graphs.log" 2>&1
$run $micro --lengths 2K 4K 8K --cuda-graph local >> "$results/graphs.log" 2>&1
$run $micro --lengths 2K 4K 8K --cuda-graph >> "$results/graphs.log" 2>&1
grep -E "failed|exit status|Error" "$results/graphs.log" | head -20
fi

if wants recompute; then
echo "== recompute: 8K tokens a sequence, 32K in a microbatch"
for modules in "" core_attn core_attn,qkv core_attn,qkv,mlp mlp full; do
    $run --lengths 16K --tokens-per-microbatch 32768 --tokens-per-step 131072 ${modules:+--recompute $modules} \
        > "$results/recompute.log" 2>&1 || tail -n 25 "$results/recompute.log"
done
fi
[ -e "$results/training.json" ] && $python - "$results" << 'END'
import json, pathlib, sys
from tests.benchmarks.training import describe, table
rows = json.loads(pathlib.Path(sys.argv[1], "training.json").read_text())["rows"]
for row in rows:
    print(row["recompute"], row["cuda_graph"], describe(row, profile=False))
print(table(rows))
END
