#!/usr/bin/env bash
# Trains on sequences of a million tokens, spread over all GPUs of one or several nodes that pass states to each other.
#
#     bash examples/long_context.sh                                                 one node of 8 GPUs
#     NODES=4 NODE_RANK=0 MASTER_ADDR=10.0.0.1 bash examples/long_context.sh        on each node, with its own NODE_RANK
#
# Data as of pretrain_1gpu.sh. With several nodes, DATA, VALID, TOKENIZER and SAVE are the same paths on every node, on
# a shared file system. Data and tokenizer may be copies on local disks, but then pass --data-cache-path with a shared
# folder: only rank 0 writes the index that all ranks read.
#
# What is sent per layer is one state per head, whatever SEQUENCE is; twice the GPUs hold twice the sequence. SEQUENCE
# must be a multiple of 2 x the context-parallel size. Arguments are appended to the command, and win:
#     bash examples/long_context.sh --linear-attention-freq 8     a hybrid: softmax layers gather k and v of all ranks
#     bash examples/long_context.sh --linear-attention-freq 8 --pretrained-checkpoint checkpoints/0.4b
#                                                                   begin with the weights of pretrain_1gpu.sh's model
# Started again with the same SAVE, it goes on from the last checkpoint there. To train longer than the first
# ITERATIONS, pass --override-opt-param-scheduler: Megatron refuses another schedule otherwise.
set -euo pipefail

DATA=${DATA:-data/train_text_document}             # Megatron's indexed dataset, without .bin or .idx
VALID=${VALID:-data/valid_text_document}
TOKENIZER=${TOKENIZER:-data/tokenizer.model}
TOKENIZER_TYPE=${TOKENIZER_TYPE:-SentencePieceTokenizer}
SAVE=${SAVE:-checkpoints/0.4b-long}
GPUS=${GPUS:-8}                                    # of this node
NODES=${NODES:-1}
NODE_RANK=${NODE_RANK:-0}
MASTER_ADDR=${MASTER_ADDR:-localhost}              # of node 0
MASTER_PORT=${MASTER_PORT:-29500}
SEQUENCE=${SEQUENCE:-1048576}                      # tokens
CONTEXT_PARALLEL=${CONTEXT_PARALLEL:-$((GPUS * NODES))} # GPUs that share a sequence
GLOBAL_BATCH=${GLOBAL_BATCH:-$((GPUS * NODES / CONTEXT_PARALLEL))} # sequences per step
ITERATIONS=${ITERATIONS:-1000}

export CUDA_DEVICE_MAX_CONNECTIONS=1
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}

MODEL=(
    --num-layers 24 --hidden-size 1024 --num-attention-heads 8 --ffn-hidden-size 2816
    --seq-length "$SEQUENCE" --max-position-embeddings "$SEQUENCE"
    --position-embedding-type rope --rotary-base 10000000 # of softmax layers, where there are any
    --normalization RMSNorm --swiglu --disable-bias-linear --untie-embeddings-and-output-weights
    --attention-dropout 0 --hidden-dropout 0
)
LONG=(
    --context-parallel-size "$CONTEXT_PARALLEL"
    --dataloader-inter-document-masking            # documents of a sequence do not see each other
    --lightning-loss-chunk 8192                    # logits in chunks of 8192 tokens: all of them take 64 KB a token
    --recompute-granularity full --recompute-method uniform --recompute-num-layers 1
    # where it does not fit: --lightning-recompute-chunk 65536 and --lightning-offload-activations (docs/memory.md)
)
TRAINING=(
    --micro-batch-size 1 --global-batch-size "$GLOBAL_BATCH" --train-iters "$ITERATIONS"
    --lr 1e-4 --min-lr 1e-5 --lr-decay-style cosine --lr-warmup-iters 50
    --weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.95 --clip-grad 1.0
    --bf16 --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather
    --manual-gc --manual-gc-interval 100           # a pause of Python's collector on one rank is a pause of all
)
DATASETS=(
    --tokenizer-type "$TOKENIZER_TYPE" --tokenizer-model "$TOKENIZER"
    --train-data-path "$DATA" --valid-data-path "$VALID" --num-workers 2
)
OUTPUT=(
    --log-interval 1 --log-throughput --eval-interval 500 --eval-iters 2
    --save "$SAVE" --load "$SAVE" --save-interval 100
    --dist-ckpt-optim-fully-reshardable            # when saving: goes on at any tensor and pipeline parallel size
)

exec torchrun --nnodes "$NODES" --node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT" \
    --nproc-per-node "$GPUS" -m lightning_megatron.pretrain \
    "${MODEL[@]}" "${LONG[@]}" "${TRAINING[@]}" "${DATASETS[@]}" "${OUTPUT[@]}" "$@"
