"""lightning-generate: caches change no token, checkpoints of any layout load, and errors end with a message."""

from __future__ import annotations

import functools
import math
import re
import shutil
from argparse import Namespace
from pathlib import Path

import pytest
import sentencepiece
import torch
from megatron.core import dist_checkpointing
from megatron.core.inference.contexts import StaticInferenceContext

from lightning_megatron.config import LightningOptions
from lightning_megatron.mixer import LightningAttention
from tests.helpers.generate import EVERYTHING, HYBRID, MOE, NUMBERS, PATTERN, SCRIPT, SIZE, VOCAB, Numbers
from tests.helpers.training import LATENT
from tests.launch import ROOT, Run, run_pretrain, spawn
from tests.tolerances import LOGITS

CHECKPOINTS = {
    "everything": (1, EVERYTHING),
    "bf16": (1, f"{EVERYTHING} --bf16"),
    "defaults": (1, "--linear-attention-freq 2 --position-embedding-type learned_absolute"),
    "latent": (1, f"{EVERYTHING} {LATENT}"),
    "minimax": (1, "--lightning-model minimax-m1@tiny --num-layers 8"),
    "tnl": (
        1,
        "--lightning-model tnl-1b@tiny --num-layers 3 --untie-embeddings-and-output-weights",
    ),  # learnt angles go on where the prompt ended
    "mtp": (1, "--linear-attention-freq 2 --mtp-num-layers 1"),
    "experts": (2, f"--linear-attention-freq 4 {MOE} --expert-model-parallel-size 2"),
    "hybrid": (1, HYBRID),
    "hybrid-lightning": (1, HYBRID.replace("L-L-L-*-", "L-L-")),
    "hybrid-gqa": (1, f"{HYBRID} --group-query-attention --num-query-groups 2"),
    "hybrid-latent": (1, f"{HYBRID} {LATENT}"),
    "hybrid-lrpe": (1, f"{PATTERN} --lightning-lrpe-layers 2 --position-embedding-type learned_absolute"),
    "hybrid-experts": (2, f"--hybrid-layer-pattern LEL-L-*E {MOE} --expert-model-parallel-size 2"),
}
COPIES = {  # saved once more from another layout, after steps of length 0
    "tp2-sp": (2, "--tensor-model-parallel-size 2 --sequence-parallel"),
    "pp2-vp2": (2, "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1"),
    "pp2-uneven": (2, "--pipeline-model-parallel-size 2 --decoder-first-pipeline-num-layers 1"),
    "pp2-layout": (2, "--pipeline-model-parallel-size 2 --pipeline-model-parallel-layout Ett|t|t|L"),
    "pp3-embedding": (
        3,
        "--pipeline-model-parallel-size 3 --account-for-embedding-in-pipeline-split "
        "--account-for-loss-in-pipeline-split",
    ),
    "hybrid-tp2-sp": (2, "--tensor-model-parallel-size 2 --sequence-parallel"),
    "hybrid-pp2-vp2": (2, "--pipeline-model-parallel-size 2 --hybrid-layer-pattern L|-L-|L-|*-"),
}
GPT = (
    "--transformer-impl local --no-gradient-accumulation-fusion --no-persist-layer-norm --no-rope-fusion "
    "--no-create-attention-mask-in-dataloader --eval-interval 100"
)
PROMPT = "7 1 200 33 33 5 90 18 2"
ASK = ("--prompt", PROMPT)


def generate(folder: Path, *flags: str) -> Run:
    return run_pretrain(["--load", folder, *flags], script=SCRIPT, check=False)


@torch.inference_mode()
def check_caches(rank: int, world: int, folder: Path, count: int) -> tuple[list[int], float]:
    """Greedy tokens, the same with and without caches; and the largest relative difference of logits."""
    from lightning_megatron.inference.generate import generate
    from lightning_megatron.inference.loading import loaded_model, read_checkpoint
    from lightning_megatron.inference.sampling import Sampling

    saved = read_checkpoint(folder)
    with loaded_model(saved, vocab_size=VOCAB) as model:
        prompt = [int(x) for x in PROMPT.split()]

        def logits(tokens, context=None, start=0):
            positions = torch.arange(start, start + len(tokens))[None]
            return model(torch.tensor([tokens]), positions, None, inference_context=context)[0, -1].float()

        def tokens(vocab_size=VOCAB, **how):
            pieces = generate(model, Numbers(vocab_size), [prompt], Sampling(tokens=count, **how))
            return [piece.token for piece in pieces]

        without = list(prompt)
        for _ in range(count):
            without.append(int(logits(without)[:VOCAB].argmax()))
        cached = tokens(temperature=0)
        assert set(tokens(5, temperature=1e3)) <= set(range(5)), "a row of the table that is no token was drawn"

        context = StaticInferenceContext(max_batch_size=1, max_sequence_length=len(without))
        worst, start = 0.0, 0
        for end in range(len(prompt), len(without)):
            got, want = logits(without[start:end], context, start), logits(without[:end])
            context.sequence_len_offset = start = end
            worst = max(worst, float((got - want).norm() / want.norm()))
        if not saved.args.bf16:
            assert cached == without[len(prompt) :]
        return cached, worst


@torch.inference_mode()
def check_answers(rank: int, world: int, folder: Path, chunk: int) -> None:
    """``Asked.ask`` beside whole passes over ever longer prompts: an answer that is right, and one that is not."""
    from examples.quality.evaluate import Asked
    from lightning_megatron.inference.loading import loaded_model, read_checkpoint

    with loaded_model(read_checkpoint(folder), vocab_size=VOCAB) as model:
        prompt, answer, nll = [int(x) for x in PROMPT.split()], [], 0.0
        for _ in range(7):
            tokens = torch.tensor([prompt + answer])
            found = model(tokens, torch.arange(tokens.numel())[None], None)[0, -1, :VOCAB].double().log_softmax(-1)
            nll -= float(found.max()) / 7
            answer.append(int(found.argmax()))
        asked = Asked(model, VOCAB, None, [prompt], [], Namespace(chunk=chunk), len(prompt))
        right, got = asked.ask(prompt, answer)
        assert right == 7 and math.isclose(got, nll, rel_tol=LOGITS[torch.float32])
        answer[4] = (answer[4] + 1) % VOCAB
        assert asked.ask(prompt, answer)[0] == 4  # whatever is right behind the first wrong token
        assert asked.ask(prompt, answer[:1])[0] == 1


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """checkpoint(name): the folder that a short training of CHECKPOINTS or COPIES saved."""

    @functools.cache
    def write(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
        if name in COPIES:
            nproc, flags = COPIES[name]
            like, model = ("hybrid", HYBRID) if name.startswith("hybrid") else ("everything", EVERYTHING)
            flags = f"{model} {flags} --lr 0 --load {write(like)} --finetune --no-load-optim --no-load-rng"
        else:
            nproc, flags = CHECKPOINTS[name]
        run_pretrain([*SIZE, *NUMBERS.split(), *flags.split(), "--save", folder], nproc)
        return folder

    return write


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_caches_change_no_token(name, checkpoint):
    ((tokens, worst),) = spawn(check_caches, 1, checkpoint(name), 24)
    assert len(set(tokens)) > 3, tokens  # or the comparison would mean little
    assert worst < LOGITS[torch.bfloat16 if name == "bf16" else torch.float32]


@pytest.mark.parametrize("chunk", [3, 100])
def test_answers_are_those_of_whole_passes(chunk, checkpoint):
    spawn(check_answers, 1, checkpoint("everything"), chunk)


@pytest.mark.parametrize("name", COPIES)
def test_checkpoints_of_any_layout_are_the_same_model(name, checkpoint):
    like = "hybrid" if name.startswith("hybrid") else "everything"
    want, got = (spawn(check_caches, 1, checkpoint(x), 24)[0] for x in (like, name))
    assert got == want


def test_script_prints_what_it_generates(checkpoint):
    ((tokens, _),) = spawn(check_caches, 1, checkpoint("tp2-sp"), 10)
    run = generate(checkpoint("tp2-sp"), "--prompt", PROMPT, "--tokens", "10", "--temperature", "0")
    assert run.ok
    assert f"\n{PROMPT} {' '.join(map(str, tokens))}\n" in "\n" + run.log
    # three lightning layers of 4 heads with 16 x 16 states; one softmax layer with 18 keys and values of 4 heads
    assert "[9 prompt tokens, 10 generated," in run.log
    assert "lightning layers 12 KiB at any length, softmax layers 9 KiB at this one]" in run.log


def test_states_are_fp32_in_bf16(checkpoint):
    run = generate(checkpoint("bf16"), "--prompt", PROMPT, "--tokens", "30", "--temperature", "0.5")
    assert re.search(r"lightning layers 12 KiB at any length, softmax layers 10 KiB", run.log), (
        run.log
    )  # 38 tokens in bf16


def test_checkpoint_of_pretrain_gpt(tmp_path):
    """It holds no lightning flags, but a record of the options."""
    flags = f"--linear-attention-freq 4 {GPT} --spec lightning_megatron.spec lightning_spec"
    run_pretrain(
        [*SIZE, *NUMBERS.split(), *flags.split(), "--save", tmp_path], script=ROOT / "tests" / "pretrain_gpt.py"
    )
    ((_, worst),) = spawn(check_caches, 1, tmp_path, 10)
    assert worst < LOGITS[torch.float32]


def options_and_pattern(rank: int, world: int, folder: Path):
    """Of the model that is built."""
    from lightning_megatron.inference.loading import loaded_model, read_checkpoint

    with loaded_model(read_checkpoint(folder), vocab_size=VOCAB) as model:
        attention = [layer.self_attention for layer in model.decoder.layers]
        lightning = [isinstance(module, LightningAttention) for module in attention]
        return attention[0].options, lightning


@pytest.fixture(scope="module")
def checkpoint_of_a_spec(tmp_path_factory):
    """Trained by pretrain_gpt.py with a spec of the user's own."""
    folder = tmp_path_factory.mktemp("spec")
    flags = f"--linear-attention-freq 2 {GPT} --spec tests.specs minimax_spec"
    script = ROOT / "tests" / "pretrain_gpt.py"
    run_pretrain([*SIZE, *NUMBERS.split(), *flags.split(), "--save", folder], script=script)
    return folder


def rewrite_args(folder: Path, change) -> None:
    """Change a checkpoint's args; Megatron reads them from common.pt where there is one, as older versions wrote it."""
    (iteration,) = folder.glob("iter_*")
    state = dist_checkpointing.load_common_state_dict(iteration)
    change(state["args"])
    torch.save(state, iteration / "common.pt")


def test_options_come_from_the_record(checkpoint_of_a_spec, tmp_path):
    """... so that the spec need not be there any more."""
    shutil.copytree(checkpoint_of_a_spec, tmp_path / "run")
    rewrite_args(tmp_path / "run", lambda args: setattr(args, "spec", ["module_that_is_gone", "my_spec"]))
    wanted = (LightningOptions(decay="minimax"), [True, False, True, False])
    assert spawn(options_and_pattern, 1, tmp_path / "run") == [wanted]


def test_older_checkpoint_needs_its_spec(checkpoint_of_a_spec, tmp_path):
    """Without a record only the spec knows its options."""
    shutil.copytree(checkpoint_of_a_spec, tmp_path / "run")
    rewrite_args(tmp_path / "run", lambda args: vars(args).pop("lightning_function"))
    wanted = (LightningOptions(decay="minimax"), [True, False, True, False])
    assert spawn(options_and_pattern, 1, tmp_path / "run") == [wanted]
    rewrite_args(tmp_path / "run", lambda args: setattr(args, "spec", ["module_that_is_gone", "my_spec"]))
    message = "the spec it was trained with, module_that_is_gone my_spec, cannot be used here"
    assert_ends_with(generate(tmp_path / "run", *ASK), message)
    rewrite_args(tmp_path / "run", lambda args: setattr(args, "spec", None))
    assert_ends_with(generate(tmp_path / "run", *ASK), "it was trained without lightning_megatron")


def test_older_checkpoint_lacks_options(checkpoint, tmp_path):
    """Saved before an option existed, and before records."""
    shutil.copytree(checkpoint("everything"), tmp_path / "run")

    def age(args):
        for name in ("lightning_function", "lightning_cp_keep_states", "lightning_norm_affine", "lightning_backend"):
            delattr(args, name)
        args.lightning_cp_layout = "zigzag"

    rewrite_args(tmp_path / "run", age)
    ((options, _),) = spawn(options_and_pattern, 1, tmp_path / "run")
    assert options == LightningOptions(norm="all", qk_norm=True, rope=True, num_kv_heads=2, decay="minimax")


def test_mtp_layers_are_left_out(checkpoint):
    run = generate(checkpoint("mtp"), "--prompt", PROMPT, "--tokens", "5")
    assert run.ok and "[1 multi-token prediction layers are left out: they only help training]" in run.log
    assert "5 generated" in run.log


# ---- errors ----------------------------------------------------------------------------------------------------------


def assert_ends_with(run: Run, message: str) -> None:
    assert not run.ok and message in run.log and "Traceback" not in run.log, run.log


def test_unreadable_tracker_file(tmp_path):
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("not a number")
    assert_ends_with(
        generate(tmp_path, *ASK), "latest_checkpointed_iteration.txt says 'not a number': write the number of"
    )


def test_missing_checkpoint(tmp_path):
    message = "no latest_checkpointed_iteration.txt there; give the folder that --save of the training named"
    assert_ends_with(generate(tmp_path, *ASK), f"--load {tmp_path}: {message}")


@pytest.mark.parametrize("there", [False, True])
def test_incomplete_checkpoint(there, tmp_path):
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("7")
    if there:
        (tmp_path / "iter_0000007").mkdir()
    assert_ends_with(
        generate(tmp_path, *ASK), f"{tmp_path}/iter_0000007, which latest_checkpointed_iteration.txt names, is"
    )


def test_tokenizer_that_reads_numbers(checkpoint):
    assert_ends_with(generate(checkpoint("bf16"), "--prompt", "abc"), "give numbers, such as 1 2 3")
    assert_ends_with(
        generate(checkpoint("bf16"), *ASK, "--tokenizer-model", "a.model"), "NullTokenizer, which has no model"
    )
    assert_ends_with(
        generate(checkpoint("bf16"), *ASK, "--chat"), "--chat: the training used NullTokenizer and no --sft"
    )


def test_text_and_empty_prompt(tmp_path):
    """With a SentencePiece tokenizer, as the demo has it; the training and --tokenizer-model name different paths."""
    text = (ROOT / "lightning_megatron" / "mixer.py").read_text("utf-8").splitlines()
    for name in ("a", "b"):
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(text), model_prefix=str(tmp_path / name), vocab_size=400, byte_fallback=True,
            normalization_rule_name="identity", add_dummy_prefix=False, minloglevel=2,
        )  # fmt: skip
    flags = f"--tokenizer-type SentencePieceTokenizer --tokenizer-model {tmp_path}/a.model --save {tmp_path}/run"
    run_pretrain([*SIZE, *flags.split()])
    (tmp_path / "a.model").unlink()
    other = ("--tokenizer-model", f"{tmp_path}/b.model")
    run = generate(tmp_path / "run", *other, "--prompt", "def forward(", "--tokens", "5")
    assert run.ok and "def forward(" in run.log and "5 generated" in run.log
    (tmp_path / "c.model").write_text("none")
    for wrong in ("c.model", "d.model"):
        log = generate(tmp_path / "run", *ASK, "--tokenizer-model", f"{tmp_path}/{wrong}").log
        assert f"{wrong} cannot be used" in log and "give --tokenizer-model" in log and "Traceback" not in log
    assert_ends_with(
        generate(tmp_path / "run", *other, "--prompt", ""), "--prompt '' has no tokens; give some text to continue"
    )
