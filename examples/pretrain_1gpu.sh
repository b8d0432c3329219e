#!/usr/bin/env bash
# Pretrains a 0.4B hybrid on one GPU of 80 GB: 24 layers, 7 lightning to 1 softmax, sequences of 8192 tokens, bf16.
#
#     . .venv/bin/activate
#     python examples/prepare_data.py --out data --vocab-size 32000 --text my_texts/
#     bash examples/pretrain_1gpu.sh
#
# Every variable below can be set outside: SAVE=/scratch/run1 ITERATIONS=5000 bash examples/pretrain_1gpu.sh
# Arguments are appended to the command, and win: bash examples/pretrain_1gpu.sh --lr 1e-3 --lightning-decay minimax
# Started again with the same SAVE, it goes on from the last checkpoint there; with another ITERATIONS, that needs
# --override-opt-param-scheduler too.
set -euo pipefail

DATA=${DATA:-data/train_text_document}             # Megatron's indexed dataset, without .bin or .idx
VALID=${VALID:-data/valid_text_document}
TOKENIZER=${TOKENIZER:-data/tokenizer.model}
TOKENIZER_TYPE=${TOKENIZER_TYPE:-SentencePieceTokenizer} # for a tokenizer of transformers: HuggingFaceTokenizer
SAVE=${SAVE:-checkpoints/0.4b}
GPUS=${GPUS:-1}
MICRO_BATCH=${MICRO_BATCH:-2}                      # sequences per GPU and pass: what fits into memory
GLOBAL_BATCH=${GLOBAL_BATCH:-64}                   # sequences per step: 64 x 8192 are half a million tokens
ITERATIONS=${ITERATIONS:-20000}                    # 10 billion tokens

export CUDA_DEVICE_MAX_CONNECTIONS=1               # Megatron asks for it with tensor parallelism before Blackwell

MODEL=(
    --num-layers 24 --hidden-size 1024 --num-attention-heads 8 --ffn-hidden-size 2816
    --linear-attention-freq 8                      # every 8th layer is softmax; without it, all are lightning
    --seq-length 8192 --max-position-embeddings 8192
    --position-embedding-type rope --rotary-base 500000 # of the softmax layers; the others need none
    --normalization RMSNorm --swiglu --disable-bias-linear --untie-embeddings-and-output-weights
    --attention-dropout 0 --hidden-dropout 0
)
TRAINING=(
    --micro-batch-size "$MICRO_BATCH" --global-batch-size "$GLOBAL_BATCH" --train-iters "$ITERATIONS"
    --lr 6e-4 --min-lr 6e-5 --lr-decay-style cosine --lr-warmup-iters 500
    --weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.95 --clip-grad 1.0
    --bf16 --use-distributed-optimizer --cross-entropy-loss-fusion
)
DATASETS=(
    --tokenizer-type "$TOKENIZER_TYPE" --tokenizer-model "$TOKENIZER"
    --train-data-path "$DATA" --valid-data-path "$VALID" --num-workers 4
)
OUTPUT=(
    --log-interval 10 --log-throughput --eval-interval 1000 --eval-iters 10
    --save "$SAVE" --load "$SAVE" --save-interval 1000
)

exec torchrun --standalone --nproc-per-node "$GPUS" -m lightning_megatron.pretrain \
    "${MODEL[@]}" "${TRAINING[@]}" "${DATASETS[@]}" "${OUTPUT[@]}" "$@"
