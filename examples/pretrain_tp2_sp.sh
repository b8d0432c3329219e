#!/usr/bin/env bash
# The model of pretrain_1gpu.sh on GPUs in pairs: tensor parallelism of 2 with sequence parallelism.
#
#     bash examples/pretrain_tp2_sp.sh                    two GPUs
#     GPUS=8 bash examples/pretrain_tp2_sp.sh             four pairs, data parallel
#
# Takes the variables and arguments of pretrain_1gpu.sh. Each GPU of a pair has half of the heads of every layer, and half
# of the sequence between layers. Checkpoints know no layout, the optimizer's state included: either script goes on from those
# of the other.
set -euo pipefail

export GPUS=${GPUS:-2} MICRO_BATCH=${MICRO_BATCH:-4} # half of a layer each leaves room for twice the sequences

exec bash "$(dirname "$0")/pretrain_1gpu.sh" \
    --tensor-model-parallel-size 2 --sequence-parallel \
    --overlap-grad-reduce --overlap-param-gather "$@"
