"""Served hybrids with softmax layers: their logits and tokens against a forward of each request alone."""

from __future__ import annotations

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
from lightning_megatron.runtime import prepare
from lightning_megatron.spec import get_hybrid_block_spec
from tests import layers
from tests.launch import spawn
from tests.layers import latent_config, transformer_config
from tests.tolerances import LOGITS

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
    gpt = GPTModelBuilder(wanted).build_model(groups).eval().to("cuda" if torch.cuda.is_available() else "cpu")
    return gpt.to(dtype), config  # as Float16Module does


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
    # Experts: prompts in which no router's choice is a matter of rounding.
    seed = 1 if "experts" in name else rng.initial_seed()
    for kinds, worst in spawn(serve, tp, name.startswith("latent"), changes, model, seed):
        assert kinds == {(False, True), (True, True), (True, False)}, "prompts alone, with decoding, and that alone"
        assert worst < 1e-5


@pytest.mark.parametrize("name", ["grouped", "latent"])
@pytest.mark.gpu
def test_served_on_gpu(name, rng):
    """In fp32; test_dynamic_inference_gpu compares the error in bf16 with that of a pass without caches."""
    tp, changes, model = MODELS[name]
    ((_, worst),) = spawn(serve, tp, name == "latent", changes, model, rng.initial_seed(), gpus=True)
    assert worst < LOGITS[torch.float32]


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
