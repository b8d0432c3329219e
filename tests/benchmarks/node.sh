#!/usr/bin/env bash
# What needs all GPUs of a node: prints rows, and writes them into RESULTS/PART/training.json.
#     bash tests/benchmarks/node.sh RESULTS [exact] [weak-small] [weak-large] [longest-small] [longest-large] [softmax] [train]
# exact: errors, bits and losses of eight ranks (tests/test_eight_gpus.py). weak: 8K, 32K and 128K tokens a GPU over 1, 2, 4
# and 8, of 0.4B (small) and 3B (large), and what each exchange costs. longest: 64K on one GPU, and the longest sequences of
# 0.4B (small), 3B and 8B (large) over all; of 8B, 248 KiB a token are in host memory. softmax: softmax and hybrid layers
# over ranks with Megatron's and TransformerEngine's layers. train: 8B at 8K with TP 2 x CP 2 x DP 2, a checkpoint of
# TP 8 that goes on as TP 2 x CP 4, with 110 GB of disk.
# GPUS=4 does it with four. REHEARSE=1 does it with a toy model on CPUs: that all commands run.
set -uo pipefail
out=$1
shift
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True} PYTHONUNBUFFERED=1
all=${GPUS:-8} unit=1024 more=()
[ -z "${REHEARSE:-}" ] || { unit=8 more=(--cpu); }

run() { # part, model, attention, parallel sizes, tokens a microbatch and a step, lengths; all in K tokens; then options
    local part=$1 model=$2 attention=$3 tp=$4 cp=$5 dp=$6 micro=$7 step=$8 lengths=()
    for n in $9; do lengths+=($((n * unit))); done
    shift 9
    [ -z "${REHEARSE:-}" ] || { model=toy tp=$((tp > 2 ? 2 : tp)); } # it has two heads
    echo "== $part $model $attention, TP $tp CP $cp DP $dp, ${lengths[*]} tokens, $* at $SECONDS s"
    timeout "${LIMIT:-400}" python3 -m tests.benchmarks.training --models $model --attentions $attention --steps ${STEPS:-4} \
        --tensor-parallel $tp --context-parallel $cp --data-parallel $dp --tokens-per-microbatch $((micro * unit)) \
        --tokens-per-step $((step * unit)) --lengths "${lengths[@]}" --out "$out/$part" --append "${more[@]}" "$@" |
        grep --line-buffered -E '^(toy|[0-9.]+B) (lightning|hybrid|softmax) '
}

long() { # as run, with what long sequences need: inputs of layers on the host, layers and loss in chunks
    run "$@" --recompute --loss-chunk $((8 * unit)) \
        --extra="--no-check-for-nan-in-loss-and-grad --lightning-recompute-chunk $((chunk * unit)) --lightning-offload-activations"
}

weak() { # model, tokens a step of one GPU in K
    for ranks in 1 2 4 8; do
        [ $ranks -gt $all ] || run weak $1 lightning 1 $ranks 1 $((128 * ranks)) $(($2 * ranks)) \
            "$((8 * ranks)) $((32 * ranks)) $((128 * ranks))" --recompute --loss-chunk $((8 * unit)) \
            --extra="--no-check-for-nan-in-loss-and-grad --manual-gc"
    done
}

for part in ${*:-exact weak-small weak-large longest-small longest-large softmax train}; do
    case $part in
    exact) python3 -m pytest -q -p no:cacheprovider -m gpu tests/test_eight_gpus.py ;;
    weak-small)
        STEPS=6 weak 0.4B 256
        [ -n "${REHEARSE:-}" ] || python3 -m torch.distributed.run --standalone --nproc-per-node "$all" \
            -m tests.benchmarks.context_parallel --tokens 8K 32K 128K --heads 8 20 --out "$out/weak"
        ;;
    weak-large) weak 3B 128 ;;
    longest-small)
        chunk=64
        long longest 0.4B lightning 1 1 1 64 512 "64"
        for n in 4096 8192; do long longest 0.4B lightning 1 $all 1 $n $n "$n"; done
        ;;
    longest-large)
        chunk=32
        long longest 3B lightning 1 1 1 64 128 "64"
        long longest 3B lightning 1 $all 1 4096 4096 "4096"
        chunk=64
        long longest 8B lightning $all 1 1 64 512 "64"
        for n in 1024 2048; do long longest 8B lightning $all 1 1 $n $n "$n"; done
        long longest 8B hybrid $all 1 1 1024 1024 "1024"
        ;;
    softmax)
        for layers in local te; do
            [ -z "${REHEARSE:-}" ] || [ $layers = local ] || continue
            for attention in lightning hybrid softmax; do
                run softmax 0.4B $attention 1 $all 1 $((128 * all)) $((256 * all)) "$((32 * all)) $((128 * all))" \
                    --recompute --loss-chunk $((8 * unit)) --layers $layers --extra=--no-check-for-nan-in-loss-and-grad
            done
        done
        ;;
    train)
        run train 8B lightning 2 2 $((all / 4)) 16 $((64 * all)) "8" --recompute core_attn
        save="--save $out/checkpoint --no-check-for-nan-in-loss-and-grad"
        run train 8B lightning $all 1 1 16 128 "8" --no-in-process --extra="$save --save-interval 4"
        STEPS=8 run train 8B lightning 2 $((all / 2)) 1 16 128 "8" --no-in-process \
            --extra="--load $out/checkpoint --override-opt-param-scheduler"
        ;;
    *) echo "$part is none of exact, weak-small, weak-large, longest-small, longest-large, softmax, train" >&2; exit 2 ;;
    esac
done
