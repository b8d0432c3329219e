"""Megatron's static inference: any cut into steps, rows, beams and prompts of different length equal one forward."""

from __future__ import annotations

import dataclasses
import warnings

import pytest
import torch
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.inference.engines import StaticInferenceEngine
from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import GPTInferenceWrapper
from megatron.core.inference.sampling_params import SamplingParams
from megatron.core.inference.text_generation_controllers.text_generation_controller import TextGenerationController
from megatron.core.inference.utils import InferenceMode
from megatron.core.tokenizers.text.libraries.null_tokenizer import NullTokenizer

from lightning_megatron import cpu
from lightning_megatron.config import LightningOptions
from lightning_megatron.ops.reference import recurrent_lightning_attn
from lightning_megatron.spec import get_hybrid_block_spec
from tests import layers
from tests.helpers.generate import DEVICES
from tests.helpers.models import gpt, hybrid
from tests.launch import spawn
from tests.layers import Variant, latent_config, transformer_config

VOCAB, LENGTH = 64, 24
TOLERANCE = 1e-5  # of the largest logit, in fp32
EVERYTHING = dict(rope=True, qk_norm=True, norm="all", num_kv_heads=2, decay="minimax")
MODELS = {
    "lightning": (transformer_config, {}, {}),
    "lrpe": (transformer_config, {}, dict(lrpe_layers=1)),
    "gqa": (transformer_config, dict(linear_attention_freq=2, num_query_groups=2), EVERYTHING),
    "latent": (latent_config, {}, EVERYTHING),
    "experts": (
        transformer_config,
        dict(linear_attention_freq=2, num_moe_experts=4, moe_ffn_hidden_size=32, moe_router_load_balancing_type="none"),
        dict(rope=True),
    ),
    "hybrid": (transformer_config, dict(num_layers=8, num_query_groups=2), EVERYTHING),
}
PATTERNS = {"hybrid": "L-L-*-L-"}  # of HybridModel


def build(name: str, rng: torch.Generator, **changes):
    """A model of MODELS with random weights, in evaluation mode.

    Where the values of a head almost cancel, its norm makes much of rounding: a large epsilon keeps that small.
    """
    make, fields, options = MODELS[name]
    config, options = make(**fields | changes), LightningOptions(norm_eps=3e-2, **options)
    if name in PATTERNS:
        model = hybrid(config, options, PATTERNS[name]).eval()
    else:
        model = gpt(config, get_hybrid_block_spec(config, options)).eval()
    layers.set_parameters(model, layers.draw_parameters(model, 1, rng), 0, 1)
    return model


def read(model, context: StaticInferenceContext | None, tokens: torch.Tensor, mask=None) -> torch.Tensor:
    """Logits [b, s, vocabulary] of the next tokens [b, s]."""
    start = 0 if context is None else context.sequence_len_offset
    positions = torch.arange(start, start + tokens.shape[1], device=tokens.device)[None].expand_as(tokens)
    logits = model(tokens, positions, mask, inference_context=context)
    if context is not None:
        context.increment_sequence_len_offset(tokens.shape[1])
    return logits


def check(got: torch.Tensor, want: torch.Tensor) -> None:
    error = float((got - want).abs().max() / want.abs().max())
    assert error < TOLERANCE, error


# ---- steps -----------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def check_steps(rank: int, world: int, name: str, seed: int) -> None:
    layers.start()
    rng = torch.Generator().manual_seed(seed)
    model = build(name, rng)
    tokens = torch.randint(VOCAB, (3, LENGTH), generator=rng)
    want = read(model, None, tokens)
    other = tokens.clone()
    other[:, 9] = (other[:, 9] + 1) % VOCAB
    changed = (read(model, None, other) - want)[:, 9:].abs().amax((0, 2))
    assert changed.min() > 10 * TOLERANCE * want.abs().max()  # later tokens depend on it, or nothing would be compared
    for size in (3, 5):  # rows of the context
        context = StaticInferenceContext(max_batch_size=size, max_sequence_length=LENGTH)
        for cut in ([LENGTH], [7, 5, 1, 1, 4, 1, 5], [1] * LENGTH, [1, 2, LENGTH - 3]):
            check(torch.cat([read(model, context, piece) for piece in tokens.split(cut, 1)], 1), want)
            context.reset()  # the states of the batch before are still there


@pytest.mark.parametrize("name", MODELS)
def test_any_cut_into_steps_equals_the_whole(name, rng):
    spawn(check_steps, 1, name, rng.initial_seed())


@torch.inference_mode()
def rounding(rank: int, world: int, name: str, seed: int) -> tuple[float, float]:
    """Relative errors of logits to fp32: of bf16 steps, and of a bf16 pass without caches; the worst row counts."""
    layers.start()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    rng = torch.Generator().manual_seed(seed)
    rough = build(name, rng, params_dtype=torch.bfloat16, bf16=True).bfloat16().cuda()  # as Float16Module does
    exact = build(name, rng).cuda()
    for want, have in zip(exact.parameters(), rough.parameters(), strict=True):
        want.copy_(have)
    tokens = torch.randint(VOCAB, (3, 150), generator=rng).cuda()
    want, alone = (read(model, None, tokens).float() for model in (exact, rough))
    context = StaticInferenceContext(max_batch_size=3, max_sequence_length=150)
    steps = torch.cat([read(rough, context, x).float() for x in tokens.split([70, 17, 1, 1, 30, *[1] * 31], 1)], 1)
    return tuple(float(((x - want).norm(dim=(1, 2)) / want.norm(dim=(1, 2))).max()) for x in (steps, alone))


@pytest.mark.parametrize("gpus", DEVICES)
@pytest.mark.parametrize("name", ["lightning", "lrpe", "gqa", "latent"])  # rounding changes the choice of experts
def test_bf16_is_as_exact_as_without_caches(name, gpus, rng):
    ((steps, alone),) = spawn(rounding, 1, name, rng.initial_seed(), gpus=gpus)
    print(steps, alone)
    assert 0 < steps < 1.5 * alone + 1e-4


# ---- rows ------------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def check_beams(rank: int, world: int, name: str, seed: int) -> None:
    layers.start()
    rng = torch.Generator().manual_seed(seed)
    model = build(name, rng)
    tokens = torch.randint(VOCAB, (4, LENGTH), generator=rng)
    context = StaticInferenceContext(max_batch_size=4, max_sequence_length=LENGTH)
    with pytest.raises(ValueError, match="should not swap"):  # Megatron's own: nothing to swap yet
        context.swap_key_value_dict([0, 1, 2, 3])
    read(model, context, tokens[:, :9])
    histories = tokens[:, :9]
    for start, end, beams in ((9, 10, [2, 0, 0, 3]), (10, 14, [1, 1, 3, 0]), (14, 15, [3, 2, 1, 0]), (15, 19, [1] * 4)):
        context.swap_key_value_dict(torch.tensor(beams))
        histories = torch.cat((histories[beams], tokens[:, start:end]), 1)
        got = read(model, context, tokens[:, start:end])
        alone = torch.cat([read(model, None, row[None])[:, start:] for row in histories])
        check(got, alone)
    assert len({tuple(row.tolist()) for row in histories}) == 4  # beams differ, or a wrong order would show nothing


@pytest.mark.parametrize("name", ["lightning", "gqa", "latent"])
def test_swapped_beams_equal_their_own_sequences(name, rng):
    spawn(check_beams, 1, name, rng.initial_seed())


@torch.inference_mode()
def check_rows(rank: int, world: int, name: str, seed: int) -> None:
    """Micro-batches of one batch, as pipeline stages read them, then fewer rows; and a beam swap over all of them."""
    layers.start()
    rng = torch.Generator().manual_seed(seed)
    model = build(name, rng)
    tokens = torch.randint(VOCAB, (5, LENGTH), generator=rng)
    want = read(model, None, tokens)
    context = StaticInferenceContext(max_batch_size=5, max_sequence_length=LENGTH)
    beams, start = [0, 1, 2, 3, 4], 0
    for length in (6, 1, 3, 1, 1):
        for rows in ([0, 1], [2, 3], [4]):
            context.batch_size_offset = rows[0]
            context.sequence_len_offset = start  # read moves it, and every micro-batch begins where the last step ended
            which = [beams[row] for row in rows]
            check(read(model, context, tokens[which, start : start + length]), want[which, start : start + length])
        start += length
        order = [3, 1, 4, 0, 2]
        beams = [beams[row] for row in order]
        context.swap_key_value_dict(order)
    context.reset_batch_size_offset()
    check(read(model, context, tokens[beams[:3], start : start + 2]), want[beams[:3], start : start + 2])
    with pytest.raises(
        ValueError, match="offset is 12, but the state of lightning layer 1 holds 14 tokens, and a state cannot go back"
    ):
        context.sequence_len_offset = start  # back over two tokens
        read(model, context, tokens[beams[:3], start : start + 1])


@pytest.mark.parametrize("name", ["lightning", "gqa"])
def test_micro_batches_of_one_context(name, rng):
    spawn(check_rows, 1, name, rng.initial_seed())


def check_operator(rank: int, world: int, seed: int) -> None:
    """The state that is left is the definition's, row by row, whatever the steps and micro-batches."""
    layers.start()
    rng = torch.Generator().manual_seed(seed)
    variant = Variant(dict(feature_map="none", norm="none", gate="none"))
    mixer = layers.build_mixer(variant).eval()
    whole = layers.draw_parameters(mixer, 1, rng)
    layers.set_parameters(mixer, whole, 0, 1)
    x = torch.randn(LENGTH, 3, 64, generator=rng)
    q, k, v = (x.double() @ whole["linear_qkv.weight"].T).unflatten(-1, (4, 48)).split(16, -1)
    decay = layers.decay_of(variant.values, 4, variant.layer, 4)
    o, _ = recurrent_lightning_attn(*(y.transpose(0, 1) for y in (q, k, v)), decay)
    want = o.transpose(0, 1).flatten(2) @ whole["linear_proj.weight"].T
    context = StaticInferenceContext(max_batch_size=4, max_sequence_length=LENGTH)
    start = 0
    for length in (5, 1, 8, 1, 1, 7, 1):
        context.sequence_len_offset = start
        for rows in (slice(0, 2), slice(2, 3)):
            context.batch_size_offset = rows.start
            with torch.no_grad():
                check(mixer(x[start : start + length, rows], None, inference_context=context)[0].double(),
                      want[start : start + length, rows])  # fmt: skip
        start += length
        _, state = recurrent_lightning_attn(*(y.transpose(0, 1)[:, :start] for y in (q, k, v)), decay)
        states, known = context.key_value_memory_dict[variant.layer]
        check(states[0, :3].double(), state)
        assert not states[0, 3].any() and known.numel() == 0


def test_states_are_those_of_the_definition(rng):
    spawn(check_operator, 1, rng.initial_seed())


# ---- the engine ------------------------------------------------------------------------------------------------------


def check_refusals(rank: int, world: int, seed: int) -> None:
    layers.start()
    mixer = layers.build_mixer(Variant(), linear_attention_freq=2).eval()
    x = torch.randn(LENGTH, 3, 64, generator=torch.Generator().manual_seed(seed))
    context = StaticInferenceContext(max_batch_size=4, max_sequence_length=LENGTH)

    def step(start: int, end: int, rows: int = 2):
        context.sequence_len_offset = start
        return mixer(x[start:end, :rows], None, inference_context=context)[0]

    def refused(message: str, *args) -> None:
        with pytest.raises(ValueError, match=message):
            step(*args)

    refused("offset is 5, but the context holds no state of lightning layer 2; begin with the prompt", 5, 6)
    step(0, 5)
    refused("offset is 4, but the state .* holds 5 tokens, and a state cannot go back", 4, 6)
    refused("offset is 6, but the state .* holds 5 tokens", 6, 7)
    refused("3 rows go on after a prompt of 2: the others have no state", 5, 6, 3)
    kept = dict(context.key_value_memory_dict)  # how a speculative block goes back
    want = step(5, 8)
    step(8, 9)
    context.key_value_memory_dict = dict(kept)
    assert torch.equal(step(5, 8), want)

    config = mixer.config
    for field, value, message in (
        ("sequence_parallel", True, "do not generate with --sequence-parallel.*leave it out"),
        ("transformer_impl", "transformer_engine", "3 tokens after 8 in one step: .*generate one token at a time, or"),
    ):
        mixer.config = dataclasses.replace(config)
        setattr(mixer.config, field, value)
        refused(message, 8, 11)
    step(8, 9)  # one token with TransformerEngine
    mixer.config = dataclasses.replace(config, linear_attention_freq=None)
    mixer.config.transformer_impl = "transformer_engine"
    step(9, 12)  # without softmax layers
    mixer.config.cuda_graph_impl = "local"
    step(12, 14)  # Megatron captures no prompt
    context.enable_decode_mode()
    refused("--cuda-graph-impl local captures steps .*use --cuda-graph-impl none", 14, 15)


def test_steps_that_states_cannot_serve_are_refused(rng):
    spawn(check_refusals, 1, rng.initial_seed())


class Numbers(NullTokenizer):
    """Megatron's tokenizer of numbers under the names that its generation calls."""

    tokenize, detokenize = NullTokenizer.text_to_ids, NullTokenizer.ids_to_text
    eod, bos, vocab_size = VOCAB - 1, -1, VOCAB


def sampling(count: int, **how) -> SamplingParams:
    """``count`` likeliest tokens; the padding token is one like any other."""
    params = SamplingParams(num_tokens_to_generate=count, top_k=1, **how)
    params.add_attributes({"no_early_termination": True})
    return params


def engine_of(model, rows: int, **how) -> StaticInferenceEngine:
    wrapped = GPTInferenceWrapper(model, StaticInferenceContext(max_batch_size=rows, max_sequence_length=64))
    with warnings.catch_warnings(action="ignore"):
        return StaticInferenceEngine(TextGenerationController(wrapped, Numbers(VOCAB)), legacy=True, **how)


def check_engine(rank: int, world: int, name: str, seed: int) -> None:
    layers.start()
    rng = torch.Generator().manual_seed(seed)
    model = build(name, rng)

    @torch.inference_mode()
    def alone(prompt: list[int], count: int) -> list[int]:
        found = list(prompt)
        for _ in range(count):
            found.append(int(read(model, None, torch.tensor([found]))[0, -1].argmax()))
        return found[len(prompt) :]

    for _ in range(50):  # until the continuations differ, or a mistake would not show
        prompts = [torch.randint(VOCAB, (length,), generator=rng).tolist() for length in (9, 4, 13, 4)]
        want = [alone(prompt, 12) for prompt in prompts]
        if len({tuple(tokens) for tokens in want}) == 4 and min(len(set(tokens)) for tokens in want) > 2:
            break
    else:
        raise AssertionError("all continuations are alike")
    texts = [" ".join(map(str, prompt)) for prompt in prompts]
    for rows in (4, 8, 3):  # all at once, with rows to spare, and with one prompt left for a batch of its own
        engine = engine_of(model, rows)
        assert InferenceMode.is_active()
        requests = engine.generate(prompts=texts, sampling_params=sampling(12, return_log_probs=True))
        assert [request.generated_tokens.tolist() for request in requests] == want
        InferenceMode.unset_active()
    for request, prompt, tokens in zip(requests, prompts, want, strict=True):
        with torch.inference_mode():
            logs = read(model, None, torch.tensor([prompt + tokens]))[0].log_softmax(-1)
        logs = logs[torch.arange(len(prompt + tokens) - 1), (prompt + tokens)[1:]]
        check(torch.tensor(request.prompt_log_probs + request.generated_log_probs), logs)
    # all prompts whole, with a causal mask
    scored = engine_of(model, 4).generate(prompts=texts, sampling_params=sampling(0, return_log_probs=True))
    for request, again in zip(requests, scored, strict=True):
        check(torch.tensor(again.prompt_log_probs), torch.tensor(request.prompt_log_probs))


@pytest.mark.parametrize("name", MODELS)
def test_engine_generates_for_prompts_of_different_length(name, rng):
    spawn(check_engine, 1, name, rng.initial_seed())


def check_engine_over_ranks(rank: int, world: int, name: str, sizes: dict, changes: dict, seed: int) -> None:
    cpu.enable_inference()
    layers.start(**sizes)
    rng = torch.Generator().manual_seed(seed)
    fields = dict(
        tensor_model_parallel_size=sizes.get("tp", 1), pipeline_model_parallel_size=sizes.get("pp", 1),
        expert_model_parallel_size=sizes.get("ep", 1), expert_tensor_parallel_size=sizes.get("etp"),
        pipeline_dtype=torch.float32,
    )  # fmt: skip
    model = build(name, rng, **fields | changes)
    prompts = [torch.randint(VOCAB, (length,), generator=rng).tolist() for length in (9, 4, 13)]
    engine = engine_of(model, 4)
    requests = engine.generate(
        prompts=[" ".join(map(str, prompt)) for prompt in prompts],
        sampling_params=sampling(6),
    )
    wrapped = engine.controller.inference_wrapped_model
    for prompt, request in zip(prompts, requests, strict=True):
        tokens = request.generated_tokens.tolist()
        for i in range(6):  # every time from the first token on
            wrapped.inference_context.reset()
            known = torch.tensor([prompt + tokens[:i]])
            positions = torch.arange(known.shape[1])[None]
            logits = wrapped.run_one_forward_step(dict(tokens=known, position_ids=positions, attention_mask=None))
            if logits is not None:  # on the last stage
                assert int(logits[0, -1].argmax()) == tokens[i]


@pytest.mark.parametrize(
    ("name", "sizes", "changes"),
    [
        ("gqa", dict(tp=2), {}),
        ("gqa", dict(pp=2), {}),
        ("hybrid", dict(pp=2), {}),
        ("experts", dict(tp=2, ep=2, etp=1), dict(sequence_parallel=True)),  # Megatron's engine turns it off again
    ],
    ids=["tp2", "pp2", "pp2-hybrid", "tp2-ep2-sp"],
)
def test_engine_over_ranks(name, sizes, changes, rng):
    spawn(check_engine_over_ranks, 2, name, sizes, changes, rng.initial_seed())
