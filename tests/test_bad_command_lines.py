"""Command lines of lightning_megatron.pretrain that cannot work end in one line, before data and model are built."""

from __future__ import annotations

import json
import re
import shlex

import pytest
import torch

from lightning_megatron import pretrain
from lightning_megatron.training import run
from tests.helpers.commands import WENT_ON, checker
from tests.helpers.documents import write_equal_documents

MODEL = (
    "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --max-position-embeddings 32 "
    "--micro-batch-size 1 --train-iters 1 --lr 1e-3 --mock-data --vocab-size 255"
)
REAL = "-mock-data --tokenizer-type NullTokenizer"  # -flag takes a flag of MODEL away
MANY = ("--num-layers", "--num-attention-heads", "--num-experts", "--mtp-num-layers")
LARGE = (
    "--hidden-size", "--ffn-hidden-size", "--kv-channels", "--vocab-size", "--padded-vocab-size",
    "--make-vocab-size-divisible-by", "--micro-batch-size", "--global-batch-size", "--eval-global-batch-size",
    "--moe-ffn-hidden-size", "--q-lora-rank",
)  # fmt: skip
# What is typed, and what the line says: flag and remedy. `2|` starts two processes; {folder} holds the files below.
BAD = (
    # ---- flags and values that do not exist
    ("--num-layer 3", "--num-layer 3; did you mean --num-layers"),
    ("--params-dtypes bf16", "--params-dtypes bf16.*--help lists all"),
    ("--num-layers three", "--num-layers: invalid int value: 'three' .*--help"),
    ("--lightning-decay tln", "--lightning-decay: .*choose from 'tnl'"),
    ("--lightning-gate sigmod", "--lightning-gate: .*choose from 'none', 'sigmoid'"),
    ("--lightning-model minimax", "--lightning-model minimax is unknown; choose one of .*minimax-text-01"),
    ("--attention-backend flahs", "--attention-backend: flahs is unknown; choose from flash"),
    ("--attention-backend local", "--attention-backend local .*use --transformer-impl local"),
    ("--exit-signal TERM", "--exit-signal: TERM is unknown; choose from .*SIGTERM"),
    ("--cp-comm-type p3p", "--cp-comm-type p3p is unknown: choose from p2p"),
    ("--no-position-embedding", "--no-position-embedding .*use --position-embedding-type none"),
    ("--init-method-xavier-uniform", "--init-method-xavier-uniform ends .*leave it out"),
    (
        "--position-embedding-type mrope --mrope-section 1 1 2",
        "--position-embedding-type mrope needs positions of three axes.*use rope",
    ),
    ("--batch-size 4", "--batch-size .*use --micro-batch-size"),
    ("--checkpoint-activations", "--checkpoint-activations is no option any more: use --recompute-granularity full"),
    *(
        (f"{more}--step-batch-size-schedule '{schedule}'", f"--step-batch-size-schedule {schedule} .*{said}")
        for more, schedule, said in (
            ("", "foo", "cannot be read: give pairs TOKENS:BATCH_SIZE .*0:256,1B:512"),
            ("", "", "cannot be read: give pairs"), ("", "0:2,64:x", "cannot be read"), ("", "0:2:4", "cannot be read"),
            ("", "0:2,inf:4", "cannot be read"), ("", "0:2,M:4", "cannot be read"),
            ("", "0:2,4:4", "twice within one sample.*--seq-length 32 or more apart"),
            ("", "0:2,1K:4,1.001K:8", "twice within one sample.*--seq-length 32 or more apart"),
            ("", "0:2,1K:0", "below 1: give 1 or more"), ("", "1K:2", "begin with 0:BATCH_SIZE"),
            ("--micro-batch-size 2 ", "0:3", "no multiple of --micro-batch-size 2 x 1 .*give one"),
            ("2|", "0:3", "no multiple of --micro-batch-size 1 x 2 .*give one"),
        )
    ),
    ("--dataloader-type external", "--dataloader-type external .*use single or cyclic"),
    ("--yaml-cfg x.yaml", "--yaml-cfg: x.yaml would replace the command line.*give flags"),
    # ---- numbers that mean nothing
    *(
        (f"{flag} {value}", f"{flag} {value}[.0]* is refused: give {allowed}")
        for flag, value, allowed in (
            ("--num-layers", 0, "1 or more"), ("--num-layers", -2, "1 or more"), ("--hidden-size", 0, "1 or more"),
            ("--num-attention-heads", 0, "1 or more"), ("--seq-length", 0, "1 or more"),
            ("--micro-batch-size", 0, "1 or more"), ("--global-batch-size", 0, "1 or more"),
            ("--tensor-model-parallel-size", 0, "1 or more"), ("--pipeline-model-parallel-size", -1, "1 or more"),
            ("--context-parallel-size", 0, "1 or more"), ("--vocab-size", 0, "1 or more"),
            ("--make-vocab-size-divisible-by", 0, "1 or more"), ("--log-interval", 0, "1 or more"),
            ("--seed", 0, "1 or more"), ("--distributed-timeout-minutes", 0, "1 or more"), ("--lr", "nan", "0 or more"),
            ("--lr", -1, "0 or more"), ("--train-iters", -1, "0 or more"), ("--num-workers", -1, "0 or more"),
            ("--norm-epsilon", -1, "0 or more"), ("--hidden-dropout", 2, "0 or more, and less than 1"),
            ("--adam-beta2", 1, "0 or more, and less than 1"), ("--rotary-percent", 0, "more than 0, and at most 1"),
            ("--lightning-scale", 0, "more than 0"), ("--moe-layer-freq", 0, "1 or more"),
            # ... and those that no machine could build: Megatron would count for hours, or end in an allocation
            *((flag, 10**9, "[01] or more, up to 10000$") for flag in MANY),
            *((flag, 10**12, "(1 or more, up to|at most) 10000000$") for flag in LARGE),
            *((flag, 10**12, "1 or more, up to 2000000000$") for flag in ("--seq-length", "--max-position-embeddings")),
            *((flag, 10**20, "[01] or more, up to 100000000000$") for flag in ("--train-iters", "--eval-iters")),
            ("--num-workers", 10**6, "0 or more, up to 1000$"),
            ("--distributed-timeout-minutes", 10**20, "1 or more, up to 1000000000$"),
            ("--rotary-base", 10**26, "more than 0, up to 10{18}$"),
        )
    ),
    ("-train-iters --train-samples 100000000000000000000", "--train-samples 10{20} is refused: give 1 or more, up to"),
    ("--train-iters 10000000000 --global-batch-size 1000", "--train-iters 10{10} x --global-batch-size 1000 .*give"),
    ("-train-iters --train-samples 100000000000", "--train-samples 10{11} needs an index .*GiB.*give fewer"),
    ("--eval-iters 100000000000", "--eval-iters 10{11} x --eval-global-batch-size 1 needs an index .*give fewer"),
    (
        "--train-iters 100000 --eval-interval 1 --eval-iters 10000000",
        "--eval-iters 10{7} x --eval-global-batch-size 1, 100001 times by --eval-interval needs .*give fewer",
    ),
    ("--seed 4294967296", "--seed 4294967296 is refused: give 1 or more, up to 4000000000"),
    ("--lightning-norm-groups 3", "--lightning-norm-groups 3 .*use --lightning-norm group or leave"),
    ("--lightning-recompute-chunk 0", "--lightning-recompute-chunk 0 must be at least 1, or left out"),
    ("--lightning-decay-offset 9", "--lightning-decay tnl with --lightning-decay-offset 9 .*use a smaller"),
    ("--lightning-backend triton", "--lightning-backend triton needs a CUDA device.*use auto"),
    ("--lightning-cp-exchange direct", "--lightning-cp-exchange direct needs a CUDA device.*use auto"),
    ("--lightning-key-head-dim 24", "--lightning-key-head-dim .* 24, .*multiples of 16 .*choose one"),
    # ---- flags that are missing
    *(
        (f"-{flag}", f"--{flag} is missing: give ")
        for flag in (
            "num-layers", "hidden-size", "num-attention-heads", "seq-length", "max-position-embeddings",
            "micro-batch-size", "train-iters", "lr",
        )
    ),
    ("-vocab-size", "needs --vocab-size"),
    # ---- processes, and what is cut over them
    ("2|--tensor-model-parallel-size 3", "--tensor-model-parallel-size 3 x .*number of processes, 2: start a multiple"),
    ("--tensor-model-parallel-size 2 --context-parallel-size 2", "2 x .* 2 does not divide .*, 1: start .*--nnodes"),
    ("8|--tensor-model-parallel-size 8", "--tensor-model-parallel-size 8 does not divide --num-attention-heads 4"),
    ("2|--tensor-model-parallel-size 2 --ffn-hidden-size 65", "--tensor-model-.* does not divide --ffn-hidden-size 65"),
    ("2|--tensor-model-parallel-size 2 --lightning-num-kv-heads 1", "use a --tensor-model-parallel-size that divides"),
    ("2|--tensor-model-parallel-size 2 --sequence-parallel --seq-length 31", "--sequence-.* needs .*not 31: give"),
    ("3|--pipeline-model-parallel-size 3", "--pipeline-model-parallel-size 3 does not divide --num-layers 4: give"),
    ("3|--context-parallel-size 3", "--context-.* 3 cuts --seq-length 32 .*give a length that 2 x 3 divides"),
    ("2|--expert-model-parallel-size 2", "--expert-model-parallel-size 2 spreads experts.*or give --num-experts"),
    ("2|--expert-model-parallel-size 2 --num-experts 3", "--expert-.* 2 does not divide --num-experts 3: give a size"),
    ("2|--tensor-model-parallel-size 2 --num-experts 4", "--num-experts 4 .*trains with --sequence-parallel only: add"),
    ("2|--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 4", "--num-virtual-.* 4 x .*give"),
    ("--num-layers-per-virtual-pipeline-stage 1", "--num-layers-per-virtual.*give --pipeline-model-parallel-size 2"),
    ("2|--pipeline-model-parallel-size 2 --decoder-first-pipeline-num-layers 5", "--decoder-first.* more .*give fewer"),
    ("2|--global-batch-size 3", "--global-batch-size 3 is no multiple of --micro-batch-size 1 x 2 .*give one"),
    (
        "2|--global-batch-size 3 --decrease-batch-size-if-needed",
        "--decrease-batch-size-if-needed .*multiple of --micro-batch-size 1 .*x 2 .*give --eval-global-batch-size, too",
    ),
    ("2|--global-batch-size 1 --decrease-batch-size-if-needed --eval-global-batch-size 2", "1 is no multiple .*give"),
    # ---- the model
    ("--num-attention-heads 3", "--num-attention-heads 3 does not divide --hidden-size 64: give"),
    ("--group-query-attention --num-query-groups 3", "--num-query-groups 3 does not divide --num-attention-heads 4"),
    ("--lightning-lrpe-layers 5", "lrpe.layers.5 is above the 4 layers of the model: give fewer"),
    ("--lightning-num-kv-heads 3", "give --lightning-num-kv-heads"),
    ("--max-position-embeddings 16", "--max-position-embeddings 16 is below --seq-length 32: give"),
    ("--linear-attention-freq 0", "--linear-attention-freq 0 .*leave the flag out"),
    ("--linear-attention-freq [1,0]", "--linear-attention-freq lists 2 layers.*give one entry a layer"),
    ("--swiglu --squared-relu", "--swiglu, --squared-relu .*leave out all but one"),
    ("--bf16 --fp16", "--bf16 and --fp16 .*leave out one"),
    (  # the check speaks of the environment, and stands below one of another flag
        "--use-megatron-fsdp --data-parallel-sharding-strategy optim_grads_params --ckpt-format fsdp_dtensor "
        "--no-gradient-accumulation-fusion --use-distributed-optimizer",
        "FSDP requires CUDA_DEVICE_MAX_CONNECTIONS.*given: --use-megatron-fsdp; change",
    ),
    ("--fp16-lm-cross-entropy", "only support in fp16.*--fp16-lm-cross-entropy.*change one of them"),
    ("--mtp-num-layers 1", "--mtp-num-layers 1 .*use rope or none"),
    ("--lightning-mtp-attention lightning", "--lightning-mtp-attention lightning .*add --mtp-num-layers"),
    ("--mtp-num-layers 1 --lightning-mtp-attention sparse", "--lightning-mtp-attention: .*choose from 'softmax'"),
    (
        "2|--mtp-num-layers 1 --pipeline-model-parallel-size 2 --save {folder} --save-interval 1 "
        "--position-embedding-type rope",
        "--mtp-num-layers 1 with tied embeddings .*pass --untie-embeddings-and-output-weights",
    ),
    (
        "2|--num-experts 4 --moe-ffn-hidden-size 63 --context-parallel-size 2 --expert-tensor-parallel-size 2",
        "--expert-tensor-parallel-size 2 does not divide --moe-ffn-hidden-size 63: give a size that does",
    ),
    (
        "2|--num-experts 4 --moe-ffn-hidden-size 63 --tensor-model-parallel-size 2 --sequence-parallel",
        "--tensor-model-parallel-size 2 does not divide --moe-ffn-hidden-size 63: .*expert-tensor-parallel-size 1",
    ),
    (
        "2|--num-experts 4 --moe-shared-expert-intermediate-size 33 --tensor-model-parallel-size 2 --sequence-parallel",
        "--tensor-model-parallel-size 2 does not divide --moe-shared-expert-intermediate-size 33: give a size",
    ),
    (
        "--num-experts 4 --disable-bias-linear --moe-shared-expert-intermediate-size 0",
        r"moe_shared_expert_intermediate_size must .*\(given: --moe-shared-expert-intermediate-size 0; change",
    ),
    ("--num-experts 4 --moe-router-topk 5", "--moe-router-topk 5 is above --num-experts 4: give at most"),
    ("--num-experts 4 --moe-layer-freq [1,0]", "--moe-layer-freq .*one entry for each .*give so many"),
    ("--moe-grouped-gemm", "--moe-grouped-gemm .*leave it out, or give --num-experts"),
    ("--fp8-format hybrid --transformer-impl local", "--fp8-format hybrid .*use --transformer-impl transformer_engine"),
    ("--experimental-attention-variant gated_delta_net", "--experimental-attention-variant .*leave it out"),
    ("--hybrid-layer-pattern M*", "--hybrid-layer-pattern M. has no lightning layer"),
    ("--vocab-size 128 --padded-vocab-size 64", "--padded-vocab-size 64 .*128 tokens.*give"),
    # ---- recompute, optimizer, schedule
    ("--recompute-granularity full", "--recompute-granularity full needs --recompute-method .*add them"),
    ("--recompute-method uniform", "--recompute-method uniform .*without --recompute-granularity full: add"),
    ("--recompute-modules core_attn", "--recompute-modules core_attn .*--recompute-granularity selective alone: add"),
    ("--recompute-granularity selective --recompute-modules mpl", "recompute_modules.*mlp.*--recompute-modules mpl"),
    ("--train-iters 0", "--train-iters 0 trains nothing: give 1 or more, or --skip-train"),
    ("--train-samples 100", "--train-iters 1 and --train-samples 100 .*leave out one"),
    ("--min-lr 1", "--min-lr 1.0 is above --lr 0.001: give"),
    ("--lr-decay-style WSD", "--lr-decay-style WSD needs --lr-wsd-decay-iters"),
    ("--lr-warmup-iters 5", "--lr-warmup-iters 5 .*give fewer"),
    ("--lr-warmup-samples 4", "--lr-warmup-samples 4 is counted in samples, .*give --lr-warmup-iters"),
    ("--lr-decay-samples 4", "--lr-decay-samples 4 is counted in samples, and --train-iters .*give --lr-decay-iters"),
    ("--start-weight-decay 0.1 --end-weight-decay 0.2", "--start-weight-decay .*add --weight-decay-incr-style linear"),
    ("--lr-warmup-fraction 0.1 --lr-warmup-iters 1", "--lr-warmup-fraction .*leave out one"),
    ("--overlap-param-gather", "--overlap-param-gather only supported with distributed optimizer"),
    ("--weight-decay-incr-style linear", "--start-weight-decay not given; change"),
    ("--rampup-batch-size 1 1 8", "--rampup-batch-size 1 1 8 .*use --step-batch-size-schedule"),
    ("--full-validation", "--full-validation .*use --eval-iters N"),
    # ---- data and tokenizers
    (REAL, "no data: give --data-path"),
    (f"{REAL} --data-path {{folder}}/none", "--data-path .*: no .*/none.idx; give the path without .bin or .idx"),
    ("--data-path", "--data-path.* is given without a path: add one"),
    (f"{REAL} --data-path {{folder}}/text --train-data-path {{folder}}/text", "exclude each other: use --data-path"),
    (f"{REAL} --data-path {{folder}}/text --split a,b,c", "--split a,b,c is no split: give .*969,30,1"),
    (f"{REAL} --train-data-path {{folder}}/text --split 9,1", "--split 9,1 .*leave it out"),
    (f"{REAL} --data-path {{folder}}/text --split 1,0,0 --eval-iters 3", "--eval-iters 3, but no validation.*give"),
    (f"{REAL} --data-path {{folder}}/text --split 0,9,1", "no training data.*give --train-data-path, or a --split"),
    (f"{REAL} --valid-data-path {{folder}}/text", "no training data.*give --train-data-path, or a --split"),
    *(
        (f"{REAL} --train-data-path {words}", f"--train-data-path .*{said}")
        for words, said in (
            ("0 {folder}/text 0 {folder}/text", "a weight before each path, no weight below 0"),
            ("-1 {folder}/text 2 {folder}/text", "a weight before each path, no weight below 0"),
            ("1 {folder}/text {folder}/text", "no 1.idx; give the path"),
            ("{folder}/nothing", "nothing.bin.*copy it again"),
            ("{folder}/empty", "empty.idx is no index of a dataset; copy it again"),
            ("{folder}/index", "index.idx is cut off: it has .*; copy it again"),
            ("{folder}/short", "short.bin is cut off: it has 9 of .*; copy it again"),
            ("{folder}/other", "other.bin has tokens from .* and this model those below .*: give the tokenizer that"),
        )
    ),
    (f"{REAL} --data-args-path {{folder}}/paths", "--data-args-path .*: no .*/gone.idx; give"),
    (f"{REAL} --per-split-data-args-path {{folder}}/paths", "--per-split-data-.*give a file with JSON such as"),
    ("--tokenizer-type HuggingFaceTokenizer", "--tokenizer-type HuggingFaceTokenizer needs --tokenizer-model"),
    (
        "--tokenizer-type HuggingFaceTokenizer --tokenizer-model {folder}",
        "--tokenizer-type HuggingFaceTokenizer --tokenizer-model .*cannot be read .*give the file or folder",
    ),
    (
        "--tokenizer-type SentencePieceTokenizer --tokenizer-model {folder}/paths",
        "--tokenizer-model .*cannot be read .*give the file or folder",
    ),
    ("--tokenizer-type HuggingFaceTokenizer --tokenizer-model /no/such", "--tokenizer-model /no/such: no such file"),
    ("--vocab-file /no/such", "--vocab-file /no/such: no such file.*every node"),
    ("--sft", "--sft .*--mock-data.*give --data-path FILE.jsonl"),
    (f"{REAL} --sft --data-path {{folder}}/paths", "--sft needs --tokenizer-type SFTTokenizer"),
    # ---- checkpoints and folders
    ("--load /no/such", "--load /no/such: no latest_checkpointed_iteration.txt .*leave --load out"),
    ("--pretrained-checkpoint /no/such", "--pretrained-checkpoint /no/such: .*give the folder"),
    ("--use-checkpoint-args", "--use-checkpoint-args requires --load"),
    ("--ckpt-step 5", "--ckpt-step 5 .*give --load, or leave it out"),
    ("--save {folder}/new", "--save .* needs --save-interval N.*give it"),
    ("--save {folder}/paths --save-interval 1", "--save .*/paths: cannot be written .*give another folder"),
    ("--data-cache-path {folder}/paths/x", "--data-cache-path .*: cannot be written .*give another folder"),
    ("--tensorboard-dir {folder}/paths", "--tensorboard-dir .*: cannot be written .*give another folder"),
    ("--save {folder} --save-interval 2 --save-retain-interval 3", "--save-retain-interval 3 must be a multiple.*give"),
    ("--async-save --ckpt-format torch", "--async-save .*use torch_dist, or leave"),
    (
        "--override-opt-param-scheduler --use-checkpoint-opt-param-scheduler",
        "--override-opt-param-scheduler and --use-checkpoint-opt-param-scheduler .*leave out one",
    ),
    ("--log-memory-interval 3 --log-interval 2", "--log-memory-interval 3, --log-interval 2; change one"),
    ("--profile --profile-step-start 5 --profile-step-end 3", "--profile-step-end 3 .*give a later step"),
)  # fmt: skip
GOOD = (
    "2|--global-batch-size 3 --decrease-batch-size-if-needed --eval-global-batch-size 2",
    "", "--sequence-parallel", "2|--tensor-model-parallel-size 2 --sequence-parallel",
    "--num-experts 4 --disable-bias-linear",
    "2|--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2 --position-embedding-type rope",
    "2|--pipeline-model-parallel-size 2 --decoder-last-pipeline-num-layers 1", "--skip-train -lr -train-iters",
    "--save {folder}/new/er --save-interval 1", "--lr 0 --train-iters 0 --skip-train",
    "--lightning-decay-offset -9",
    f"{REAL} --data-path 0.5 {{folder}}/text 5e-1 {{folder}}/text --split 9,1", "--num-experts 0 --mtp-num-layers 0",
    f"{REAL} --per-split-data-args-path {{folder}}/splits.json", "--recompute-granularity selective",
    "--train-iters 1000000 --global-batch-size 100", "--num-workers 64 --vocab-size 1000000 --eval-iters 1000",
    "--log-interval {never} --eval-interval {never} --exit-interval {never} --lr-decay-iters {never}",
    "--step-batch-size-schedule 0:2,32:4", "--step-batch-size-schedule '1e3:8 0:1,.1K:2'",
    "2|--step-batch-size-schedule 5:2,1M:3",
    "--num-experts 4 --moe-layer-freq [0]*4",
    "2|--num-experts 4 --moe-layer-freq [0]*4 --disable-bias-linear --tensor-model-parallel-size 2",
    "--linear-attention-freq [0]*4 --kv-channels 8",  # no lightning layer has these channels
)  # fmt: skip


@pytest.fixture(scope="module")
def check(tmp_path_factory):
    """check(line): how it ends."""
    folder = tmp_path_factory.mktemp("given")
    write_equal_documents(folder)
    index, data = (folder / "text.idx").read_bytes(), (folder / "text.bin").read_bytes()
    for name, idx, bin_ in (
        ("nothing", index, None), ("empty", b"", data), ("index", index[:-9], data), ("short", index, data[:9]),
        ("other", index, b"\x7f" * len(data)),
    ):  # fmt: skip
        (folder / f"{name}.idx").write_bytes(idx)
        if bin_ is not None:
            (folder / f"{name}.bin").write_bytes(bin_)
    (folder / "paths").write_text(f"1 {folder}/gone")
    (folder / "splits.json").write_text(json.dumps({"train": f"1 {folder}/text", "valid": None, "test": None}))

    def one(line: str, **env: str):
        world, bar, flags = line.rpartition("|")
        words, given = shlex.split(flags.format(folder=folder, never=10**20)), MODEL.split()
        for word in [word for word in words if re.match(r"-[a-z]", word)]:
            words.remove(word)
            at = given.index("-" + word)
            del given[at : at + 1 + (not given[at + 1 : at + 2] or not given[at + 1].startswith("--"))]
        return checked(given + words, int(world) if bar else 1, **env)

    with checker() as checked:
        yield one


@pytest.mark.parametrize("line, words", BAD, ids=[line[:60] for line, _ in BAD])
def test_bad_command_line(line, words, check):
    end = check(line)
    said = [text for text in end.err.splitlines() if "UserWarning: " not in text and "warnings.warn(" not in text]
    assert end.status == 2, f"status {end.status}\n{end.out}\n{end.err}"
    assert len(said) == 1 and said[0].startswith("lightning-pretrain: "), end.err
    assert re.search(words, said[0]), said[0]
    assert "--" in said[0] and "building" not in end.out


@pytest.mark.parametrize("line", GOOD)
def test_good_command_line(line, check):
    end = check(line)
    assert end.status == WENT_ON, f"status {end.status}\n{end.err}"


@pytest.mark.parametrize("env, words", [
    ({"RANK": "1"}, "RANK=1, which is not below the number of processes .*start with torchrun"),
    ({"RANK": "one"}, "RANK=one, which is no number: unset it"),
])  # fmt: skip
def test_half_of_the_variables_of_torchrun(env, words, check):
    """Such a rank would wait for others that never come."""
    end = check("", **env)
    assert end.status == 2 and re.search(words, end.err) and "Traceback" not in end.err


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without GPU")
def test_a_machine_without_gpu(monkeypatch, capsys):
    """Runs of other tests have the shim, and so its permission."""
    monkeypatch.setattr(run, "configure", lambda: (None, None))
    with pytest.raises(SystemExit, match="2"):
        pretrain.main()
    assert "lightning-pretrain: torch finds no CUDA device" in capsys.readouterr().err
