"""Softmax layers in the dynamic engine: attention to blocks against its formula, and served models against themselves.

The reference attends in fp64 to keys and values that it lays into blocks itself.
"""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.inference.config import InferenceConfig, MambaInferenceStateConfig
from megatron.core.inference.contexts.dynamic_context import DynamicInferenceContext
from megatron.core.inference.engines.dynamic_engine import DynamicInferenceEngine
from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import GPTInferenceWrapper
from megatron.core.inference.sampling_params import SamplingParams
from megatron.core.inference.text_generation_controllers.text_generation_controller import TextGenerationController
from megatron.core.inference.utils import InferenceMode
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.training.models.gpt import GPTModelBuilder, GPTModelConfig

from lightning_megatron.config import LightningOptions
from lightning_megatron.ops.triton import paged as kernels
from lightning_megatron.runtime import prepare
from lightning_megatron.softmax.paged import attend, decode, refuse_unserved
from lightning_megatron.spec import get_hybrid_block_spec
from tests import layers
from tests.launch import spawn
from tests.layers import latent_config, transformer_config
from tests.tolerances import LOGITS, TOLERANCES

# ---- attention -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
    H: int = 4
    Hkv: int = 2
    K: int = 32
    V: int = 32
    block: int = 64
    max_blocks: int = 3
    prefix: bool = False  # values are the first V channels of the keys
    programs: int = kernels.PROGRAMS


CASES = {
    "grouped": Case(),
    "one part": Case(programs=1),
    "other dims": Case(H=3, Hkv=3, K=48, V=24, block=96),
    "many heads": Case(H=70, Hkv=1, K=16, V=16, max_blocks=2),
    "long": Case(H=2, Hkv=1, K=16, V=16, block=256, max_blocks=5),
    "latent": Case(H=20, Hkv=1, K=40, V=32, max_blocks=9, prefix=True),
}


class Blocks:
    """Requests of given lengths in shuffled blocks; what no request holds is NaN."""

    def __init__(self, case: Case, lengths: list[int], rng: torch.Generator, dtype=torch.float32, device="cpu"):
        self.case, self.lengths = case, lengths
        used = [-(-n // case.block) for n in lengths]
        blocks = sum(used) + 2
        order = torch.randperm(blocks, generator=rng).tolist()
        unused = order.pop()
        cache = torch.full((blocks, case.block, case.Hkv, case.K + case.V), torch.nan, dtype=torch.float64)
        table = torch.full((len(lengths), case.max_blocks), unused)
        self.keys, self.values = [], []
        for i, n in enumerate(lengths):
            new = torch.randn(n, case.Hkv, case.K + case.V, generator=rng, dtype=torch.float64).to(dtype).double()
            for j in range(used[i]):
                table[i, j] = order.pop()
                part = new[j * case.block : (j + 1) * case.block]
                cache[table[i, j], : len(part)] = part
            if n == 0:
                table[i] = -1  # as Megatron marks padding
            k, v = new.split([case.K, case.V], -1)
            self.keys.append(k)
            self.values.append(k[..., : case.V] if case.prefix else v)
        k, v = (x.contiguous().to(device, dtype) for x in cache.split([case.K, case.V], -1))
        self.caches = k, case.V if case.prefix else v
        self.table = table.to(device, torch.int32)
        self.seqused = torch.tensor(lengths, dtype=torch.int32, device=device)

    def expected(self, q: torch.Tensor, tokens: list[int], scale: float) -> torch.Tensor:
        """o of the last ``tokens[i]`` tokens of request i, from its formula; zeros for rows of q that are no tokens."""
        o, at = torch.zeros(*q.shape[:2], self.case.V, dtype=torch.float64), 0
        for n, length, k, v in zip(tokens, self.lengths, self.keys, self.values, strict=True):
            for i in range(n):
                seen = length - n + i + 1
                for h in range(self.case.H):
                    g = h // (self.case.H // self.case.Hkv)
                    weights = torch.softmax(scale * (k[:seen, g] @ q[at].cpu().double()[h]), 0)
                    o[at, h] = weights @ v[:seen, g]
                at += 1
        return o


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Relative RMS of the worst row that is no padding, whose rows are zeros."""
    got, norms = got.cpu().double(), want.flatten(1).norm(dim=1)
    assert not got[norms == 0].any()
    return float(((got - want).flatten(1).norm(dim=1)[norms > 0] / norms[norms > 0]).max())


def draw_lengths(case: Case, rng: torch.Generator) -> list[int]:
    """One, around a block's bounds, all that fits, anything, and padding last."""
    most = case.block * case.max_blocks
    some = torch.randint(1, most + 1, (2,), generator=rng).tolist()
    return [1, case.block, case.block + 1, most, *some, 0, 0]


@pytest.mark.parametrize("kernel", [True, False], ids=["triton", "torch"])
@pytest.mark.parametrize("name", CASES)
def test_decode(name, kernel, rng, monkeypatch):
    case = CASES[name]
    monkeypatch.setattr(kernels, "PROGRAMS", case.programs)
    lengths = draw_lengths(case, rng)
    blocks = Blocks(case, lengths, rng)
    q = torch.randn(len(lengths), 2 * case.H, case.K, generator=rng)[:, : case.H]
    got = decode(q, *blocks.caches, blocks.table, blocks.seqused, scale=0.3, kernel=kernel)
    want = blocks.expected(q, [min(n, 1) for n in lengths], 0.3)
    assert error(got, want) < TOLERANCES["triton", torch.float32]["o"]


@pytest.mark.parametrize("tokens", [[1, 1, 5, 130, 1, 64, 0], [70, 1, 0], [1, 1, 0, 0], [3]], ids=str)
def test_steps_of_any_kind(tokens, rng):
    """Decoding first, then prompts in whole or in part, even of one token; padding behind them."""
    case = CASES["grouped"]
    most = case.block * case.max_blocks
    lengths = [n and n + int(torch.randint(0, most - n + 1, (), generator=rng)) for n in tokens]
    blocks = Blocks(case, lengths, rng)
    q = torch.randn(sum(tokens) + 3, case.H, case.K, generator=rng)
    bounds = torch.tensor([0, *tokens]).cumsum(0).int()
    got = attend(q, *blocks.caches, blocks.table, bounds, blocks.seqused, scale=0.3, decode_only=False)
    assert error(got, blocks.expected(q, tokens, 0.3)) < TOLERANCES["torch", torch.float32]["o"]


def test_parts_do_not_depend_on_lengths(rng, monkeypatch):
    """Other lengths are other numbers on the device, not another launch: a captured CUDA graph stays right."""
    launches = []
    launch = kernels.launch
    monkeypatch.setattr(
        kernels, "launch", lambda *args, **how: (launches.append((args[1], args[3:], how)), launch(*args, **how))
    )
    case = CASES["latent"]
    for lengths in ([1, 1], [case.block * case.max_blocks, 70]):
        blocks = Blocks(case, lengths, rng)
        q = torch.randn(2, case.H, case.K, generator=rng)
        decode(q, *blocks.caches, blocks.table, blocks.seqused, scale=0.3, kernel=True)
    assert len(launches) == 4 and launches[:2] == launches[2:]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "case",
    [
        Case(H=32, Hkv=4, K=128, V=128, max_blocks=40),
        Case(H=8, Hkv=8, K=256, V=256, block=256, max_blocks=9),
        Case(H=6, Hkv=2, K=96, V=64, block=96, max_blocks=7),
        Case(H=64, Hkv=1, K=576, V=512, max_blocks=40, prefix=True),
        Case(H=16, Hkv=1, K=576, V=512, max_blocks=9, prefix=True),
    ],
    ids=str,
)
@pytest.mark.gpu
def test_decode_on_gpu(case, dtype, rng):
    lengths = draw_lengths(case, rng)
    blocks = Blocks(case, lengths, rng, dtype, "cuda")
    q = torch.randn(len(lengths), case.H, case.K, generator=rng).to("cuda", dtype)
    scale = case.K**-0.5
    got = decode(q, *blocks.caches, blocks.table, blocks.seqused, scale=scale)
    want = blocks.expected(q, [min(n, 1) for n in lengths], scale)
    assert got.dtype == dtype and error(got, want) < TOLERANCES["triton", dtype]["o"]


@pytest.mark.gpu
def test_prompts_on_gpu(rng):
    case = Case(H=8, Hkv=2, K=64, V=64)
    tokens, lengths = [1, 5, 130, 64, 0], [100, 20, 192, 64, 0]
    blocks = Blocks(case, lengths, rng, torch.bfloat16, "cuda")
    q = torch.randn(sum(tokens) + 3, case.H, case.K, generator=rng).to("cuda", torch.bfloat16)
    bounds = torch.tensor([0, *tokens], device="cuda").cumsum(0).int()
    got = attend(q, *blocks.caches, blocks.table, bounds, blocks.seqused, scale=0.125, decode_only=False)
    assert error(got, blocks.expected(q, tokens, 0.125)) < TOLERANCES["triton", torch.bfloat16]["o"]


@pytest.mark.parametrize("prefix", [False, True], ids=["keys and values", "latents"])
@pytest.mark.gpu
def test_cuda_graph_serves_other_lengths(prefix, rng):
    case = Case(H=8, Hkv=1, K=96 if prefix else 64, V=64, max_blocks=20, prefix=prefix)
    lengths = draw_lengths(case, rng)
    q = torch.randn(len(lengths), case.H, case.K, generator=rng).to("cuda", torch.bfloat16)
    first = Blocks(case, lengths, rng, torch.bfloat16, "cuda")
    sizes = [x.shape for x in first.caches if not isinstance(x, int)]
    room = [torch.zeros(2 * size[0], *size[1:], dtype=torch.bfloat16, device="cuda") for size in sizes]
    caches = (room[0], case.V if prefix else room[1])

    def fill(blocks: Blocks) -> None:
        for cache, new in zip(room, blocks.caches, strict=False):
            cache[: len(new)] = new
        table.copy_(blocks.table)
        seqused.copy_(blocks.seqused)

    table, seqused = torch.empty_like(first.table), torch.empty_like(first.seqused)
    fill(first)
    decode(q, *caches, table, seqused, scale=0.1)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = decode(q, *caches, table, seqused, scale=0.1)
    for _ in range(3):
        other = Blocks(case, lengths := [*draw_lengths(case, rng)[::-1][2:], 0, 7], rng, torch.bfloat16, "cuda")
        fill(other)
        graph.replay()
        want = other.expected(q, [min(n, 1) for n in lengths], 0.1)
        assert error(got, want) < TOLERANCES["triton", torch.bfloat16]["o"]


# ---- models ----------------------------------------------------------------------------------------------------------

VOCABULARY, BLOCK, CHUNK = 64, 32, 64
PROMPTS = (1, 5, 31, 32, 33, 100, 64, 65, 7, 150, 2)  # more than MOST at a time; some end at a block's bound
MOST, NEW = 4, 12
EXPERTS = dict(
    num_moe_experts=4, moe_router_topk=2, moe_ffn_hidden_size=32, moe_router_load_balancing_type="none",
    moe_token_dispatcher_type="alltoall",
)  # fmt: skip
GROUPED = dict(num_query_groups=2, linear_attention_freq=2)
YARN = dict(rope_type="yarn", rotary_scaling_factor=4.0, original_max_position_embeddings=32, mscale_all_dim=0.7)
MODELS = {  # tensor-parallel size, config, model
    "grouped": (1, GROUPED, {}),
    "grouped, experts": (1, GROUPED | EXPERTS, {}),
    "gate, norms, softmax first": (
        1,
        dict(num_query_groups=1, linear_attention_freq=[0, 1, 1, 0], attention_output_gate=True, qk_layernorm=True),
        {},
    ),
    "part of the channels turns": (1, GROUPED | dict(no_rope_freq=[0, 0, 0, 1]), dict(rotary_percent=0.5)),
    "scale": (1, GROUPED | dict(softmax_scale=0.5), {}),
    "grouped, tp2": (2, GROUPED | dict(tensor_model_parallel_size=2), {}),
    "latent": (1, dict(), {}),
    "latent, experts": (1, EXPERTS, {}),
    "latent, yarn, no latent of queries": (1, YARN | dict(q_lora_rank=None), {}),
    "latent, tp2": (2, dict(tensor_model_parallel_size=2), {}),
    "latent, tp2, sp": (2, dict(tensor_model_parallel_size=2, sequence_parallel=True), {}),
}


class Numbers:
    """A tokenizer of numbers."""

    vocab_size, eod, bos = VOCABULARY, VOCABULARY - 1, None

    def tokenize(self, text: str) -> list[int]:
        return [int(x) for x in text.split()]

    def detokenize(self, tokens: list[int], **_) -> str:
        return " ".join(map(str, tokens))


def build(latent: bool, tp: int, changes: dict, model: dict, dtype=torch.float32):
    layers.start(tp=tp)
    make = latent_config if latent else transformer_config
    config = make(**dict(params_dtype=dtype, init_method_std=0.2, bf16=dtype == torch.bfloat16) | changes)
    options = LightningOptions()
    prepare(config, options)
    wanted = GPTModelConfig(
        transformer=config, transformer_layer_spec=get_hybrid_block_spec(config, options), vocab_size=VOCABULARY,
        seq_length=256, position_embedding_type="rope", **model,
    )  # fmt: skip
    groups = ProcessGroupCollection.use_mpu_process_groups()
    return GPTModelBuilder(wanted).build_model(groups).eval().to("cuda" if torch.cuda.is_available() else "cpu"), config


def serve(rank: int, world: int, latent: bool, changes: dict, model: dict, seed: int, dtype=torch.float32):
    """Greedy tokens of all prompts from one engine.

    Returns the kinds of steps that were seen, and the largest relative difference between the logits of a position in
    the engine and in a forward of its request alone.
    """
    from lightning_megatron.patches import dynamic_inference

    gpt, config = build(latent, world, changes, model, dtype)
    dynamic_inference.apply()
    context = DynamicInferenceContext(
        config,
        InferenceConfig(
            max_sequence_length=256, buffer_size_gb=0.02, max_requests=MOST, max_tokens=CHUNK, block_size_tokens=BLOCK,
            enable_chunked_prefill=True, materialize_only_last_token_logits=False,
            mamba_inference_state_config=MambaInferenceStateConfig.from_model(gpt),
        ),
    )  # fmt: skip
    wrapped = GPTInferenceWrapper(gpt, context)
    controller = TextGenerationController(inference_wrapped_model=wrapped, tokenizer=Numbers())
    engine = DynamicInferenceEngine(controller=controller, context=context)
    seen, kinds = {}, set()

    def note(module, args, logits):
        n = context.active_token_count
        requests = context.request_ids[context.paused_request_count + context.token_to_request_idx[:n].long()]
        positions = context.token_to_pos_ids[:n]
        rows = logits.flatten(0, -2)
        seen.update(
            {at: row for at, row in zip(zip(requests.tolist(), positions.tolist(), strict=True), rows, strict=False)}
        )
        kinds.add((context.num_decode_requests > 0, context.num_prefill_requests > 0))

    rng = torch.Generator().manual_seed(seed)
    prompts = [torch.randint(0, VOCABULARY - 1, (n,), generator=rng).tolist() for n in PROMPTS]
    handle = gpt.register_forward_hook(note)
    how = SamplingParams(num_tokens_to_generate=NEW, top_k=1, termination_id=-1)
    with torch.inference_mode():
        records = engine.generate([" ".join(map(str, p)) for p in prompts], how)
        handle.remove()
        InferenceMode.unset_active()
        worst = 0.0
        for record in records:
            request = record.merge() if hasattr(record, "merge") else record
            prompt, new = prompts[request.request_id], list(request.generated_tokens)
            assert len(new) == NEW
            tokens = torch.tensor([prompt + new[:-1]], device=gpt.decoder.layers[0].mlp.parameters().__next__().device)
            missing = -tokens.shape[1] % world  # as sequence parallelism needs it; what follows changes nothing
            padded = torch.nn.functional.pad(tokens, (0, missing))
            positions = torch.arange(padded.shape[1], device=tokens.device)[None]
            alone = gpt(padded, positions, None)[0, : tokens.shape[1]].float()
            if world > 1:  # each rank has a part of the vocabulary; the engine gathers it
                parts = [torch.empty_like(alone) for _ in range(world)]
                torch.distributed.all_gather(parts, alone, group=parallel_state.get_tensor_model_parallel_group())
                alone = torch.cat(parts, -1)
            served = torch.stack([seen[request.request_id, i] for i in range(tokens.shape[1])]).float()
            worst = max(worst, float(((served - alone).norm(dim=1) / alone.norm(dim=1)).max()))
            assert alone[len(prompt) - 1 :, :VOCABULARY].argmax(-1).tolist() == new or dtype != torch.float32
    return kinds, worst


@pytest.mark.parametrize("name", MODELS)
def test_served(name, rng):
    tp, changes, model = MODELS[name]
    for kinds, worst in spawn(serve, tp, name.startswith("latent"), changes, model, rng.initial_seed()):
        assert kinds == {(False, True), (True, True), (True, False)}, "prompts alone, with decoding, and that alone"
        assert worst < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["grouped", "latent"])
@pytest.mark.gpu
def test_served_on_gpu(name, dtype, rng):
    tp, changes, model = MODELS[name]
    ((_, worst),) = spawn(serve, tp, name == "latent", changes, model, rng.initial_seed(), dtype, gpus=True)
    assert worst < LOGITS[dtype]


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(window_size=(8, 0)), "--window-size .8, 0.: softmax layer 2 cannot be served .* without flash-attn"),
        (dict(multi_latent_attention=True, kv_lora_rank=640), "--kv-lora-rank 640 .* nor with flash-attn"),
        (dict(softmax_type="off-by-one"), "--softmax-type off-by-one: .* install flash-attn"),
        (dict(kv_channels=320), "--kv-channels 320"),
    ],
    ids=str,
)
def test_refused(changes, message):
    config = SimpleNamespace(**vars(transformer_config()) | changes)
    with pytest.raises(ValueError, match=message):
        refuse_unserved(config, 2)


def test_windows_elsewhere_are_not_refused():
    refuse_unserved(
        SimpleNamespace(**vars(transformer_config()) | dict(window_size=(8, 0), window_attn_skip_freq=2)), 2
    )


def refuse_megatrons_latents(rank: int, world: int) -> str:
    from lightning_megatron.patches import dynamic_inference

    gpt, _ = build(True, 1, {}, {})
    dynamic_inference.apply()
    gpt.decoder.layers[1].self_attention.__class__ = MLASelfAttention
    with pytest.raises(ValueError) as refused:
        MambaInferenceStateConfig.from_model(gpt)
    return str(refused.value)


def test_megatrons_latent_layers_are_refused():
    (message,) = spawn(refuse_megatrons_latents, 1)
    assert "layer 2 is Megatron's MLASelfAttention" in message and "--transformer-impl local" in message
