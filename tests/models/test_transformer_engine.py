"""Models on TransformerEngine's layers compute what they compute on Megatron's local ones, on one GPU in bf16.

One set of weights, by the names of checkpoints, in three models: on local layers in fp32, the reference; on local
layers in bf16; and on TransformerEngine's in bf16, which may be as wrong as the second, or a little more.
"""

from __future__ import annotations

import dataclasses
import functools
import traceback
from argparse import Namespace

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import Float16Module

from lightning_megatron.compat import importable
from lightning_megatron.models.presets import preset_config
from lightning_megatron.training.models import saved_args
from tests import layers
from tests.conftest import SEED
from tests.helpers import released
from tests.helpers.copied import copy, draw
from tests.helpers.model_cases import MEGATRON, difference
from tests.helpers.released import LARGER
from tests.helpers.training import RECOMPUTE
from tests.launch import spawn

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not importable("transformer_engine.pytorch"), reason="TransformerEngine does not import"),
]

MORE, FLOOR = 1.5, 2e-3  # of the errors of local layers in bf16
LENGTH, DOCUMENTS = 256, [0, 40, 41, 168, 256]
SMALL = (
    "--num-layers 4 --hidden-size 256 --ffn-hidden-size 512 --num-attention-heads 4 --kv-channels 64 "
    f"--seq-length {LENGTH} --max-position-embeddings {LENGTH} --vocab-size 512 --position-embedding-type rope "
    "--hidden-dropout 0 --attention-dropout 0 --untie-embeddings-and-output-weights --norm-epsilon 1e-3"
)
GATED = "--normalization RMSNorm --swiglu --disable-bias-linear"
LIGHTNING = "--lightning-norm all --lightning-qk-norm --lightning-rope --lightning-num-kv-heads 2"
GROUPED = "--linear-attention-freq 4 --group-query-attention --num-query-groups 2 --qk-layernorm --rotary-percent 0.5"
ALL, HYBRID = f"{GATED} {LIGHTNING}", f"{GATED} {LIGHTNING} {GROUPED}"
SIZES = "--kv-lora-rank 64 --qk-head-dim 64 --qk-pos-emb-head-dim 32 --v-head-dim 64 --qk-layernorm"
LATENTS = f"{ALL} --linear-attention-freq 2 --multi-latent-attention {SIZES}"
NO_RANK = f"{LATENTS} --rope-type rope --lightning-rotary-percent 0.5"
LATENT = f"{NO_RANK} --q-lora-rank 64"
BAILING = LARGER["ring-mini-linear-2.0"]
FP8 = "--fp8-format hybrid --fp8-recipe delayed --fp8-amax-history-len 4 --fp8-amax-compute-algo max"


@dataclasses.dataclass(frozen=True)
class Case:
    flags: str
    te: str = ""  # of TransformerEngine's layers alone
    model: str = ""  # a released one, at test size
    packed: bool = False


CASES = {
    "lightning": Case(ALL),
    "hybrid": Case(HYBRID),
    "hybrid-bias-1p": Case(f"--normalization LayerNorm --apply-layernorm-1p {LIGHTNING} {GROUPED}"),
    "hybrid-residual": Case(f"{HYBRID} --apply-residual-connection-post-layernorm --lightning-softmax-alpha 1.5"),
    "latent": Case(LATENT),
    "latent-no-rank": Case(NO_RANK),
    "latent-down-fusion": Case(LATENT, te="--mla-down-proj-fusion"),
    "latent-up-recompute": Case(
        LATENT, te="--recompute-granularity selective --recompute-modules mla_up_proj core_attn"
    ),
    "latent-yarn-fusion": Case(
        f"{LATENTS} --rope-type yarn --q-lora-rank 64 --rotary-scaling-factor 4 --no-lightning-rope"
    ),
    "mtp-lightning": Case(f"{ALL} --mtp-num-layers 2 {MEGATRON}"),
    "mtp-of-lightning": Case(f"{HYBRID} --mtp-num-layers 2 --lightning-mtp-attention lightning {MEGATRON}"),
    "mtp-hybrid": Case(f"{HYBRID} --mtp-num-layers 1 {MEGATRON}"),
    "packed-lightning": Case(ALL, packed=True),
    "packed-hybrid": Case(HYBRID, packed=True),
    "packed-latent": Case(LATENT, packed=True),
    "recompute": Case(f"{HYBRID} {RECOMPUTE}"),
    "recompute-layernorm": Case(HYBRID, te="--recompute-granularity selective --recompute-modules layernorm mlp"),
    "chunks-lightning": Case(f"{ALL} {RECOMPUTE} --lightning-recompute-chunk 100"),
    "chunks-hybrid-host": Case(f"{HYBRID} {RECOMPUTE} --lightning-recompute-chunk 100 --lightning-offload-activations"),
    "chunks-latent": Case(f"{LATENT} {RECOMPUTE} --lightning-recompute-chunk 100"),
    **{
        name: Case(MEGATRON, model=name)
        for name in ("ring-mini-linear-2.0", "ring-flash-linear-2.0", "ling-2.6-flash", "minimax-m1", "tnl-1b")
    },
}
FP8_CASES = {
    "lightning": Case(ALL, te=FP8),
    "hybrid": Case(HYBRID, te=FP8),
    "latent": Case(LATENT, te=FP8),
    "recompute": Case(HYBRID, te=f"{FP8} {RECOMPUTE}"),
}
Results = dict[str, float]


def args_of(case: Case, implementation: str, more: str) -> Namespace:
    flags = f"{case.flags} --transformer-impl {implementation} {more}"
    if case.model:
        return released.args_of(preset_config(f"{case.model}@tiny") | LARGER.get(case.model, BAILING), flags)
    return saved_args(f"{SMALL} {flags}".split())


@dataclasses.dataclass
class Outcome:
    states: dict[int, torch.Tensor]
    logits: torch.Tensor
    loss: float
    grads: dict[str, torch.Tensor]


def step(model: torch.nn.Module, case: Case, tokens: torch.Tensor, weight: torch.Tensor) -> Outcome:
    """Forward and backward of <logits, weight>; loss is the mean cross entropy of the next tokens."""
    packed, places = None, torch.arange(LENGTH, device="cuda")[None]
    if case.packed:
        bounds = torch.tensor(DOCUMENTS, dtype=torch.int32, device="cuda")
        longest = int(bounds.diff().max())
        packed = PackedSeqParams(
            qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds, max_seqlen_q=longest, max_seqlen_kv=longest
        )
    mask = torch.ones(tokens.shape, device="cuda")
    run = functools.partial(model, tokens, places, None, loss_mask=mask, packed_seq_params=packed)
    module = getattr(model, "module", model)
    states, logits = released.hidden_states(module, run)
    logits = logits.float()
    (logits * weight).sum().backward()
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    grads = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    assert all(x.isfinite().all() for x in (logits, *grads.values()))
    return Outcome(states, logits.detach(), float(loss), grads)


def prepared(case: Case, implementation: str, more: str, reference: torch.nn.Module | None = None):
    """A model on the GPU, with the names of its weights in ``reference``, whose weights it takes."""
    args = args_of(case, implementation, more)
    model = released.build(args).cuda()
    names = {} if reference is None else copy(reference, model)
    return (Float16Module(model.config, model) if args.bf16 else model), names, args


def errors(case: Case, seed: int) -> tuple[Results, Results]:
    """Of local layers in bf16, and of TransformerEngine's."""
    rng = torch.Generator().manual_seed(seed)
    reference, _, args = prepared(case, "local", "--no-rope-fusion --lightning-backend torch")
    draw(reference, rng)
    shape = (1 if case.packed else 2, LENGTH)
    tokens = torch.randint(0, args.padded_vocab_size, shape, generator=rng).cuda()
    weight = torch.randn(*shape, args.padded_vocab_size, generator=rng).bfloat16().float().cuda()
    want = step(reference, case, tokens, weight)
    found = []
    for implementation, more in (("local", "--no-rope-fusion"), ("transformer_engine", case.te)):
        model, names, _ = prepared(case, implementation, f"--bf16 {more}", reference)
        got = step(model, case, tokens, weight)
        assert any(map(_is_te, model.modules())) == (implementation == "transformer_engine")
        compared = {name: theirs for name, theirs in names.items() if name in got.grads}
        assert case.te or len(compared) == len(got.grads) == len(want.grads)
        assert want.states.keys() == got.states.keys()
        found.append(
            {
                "states": max(difference(x.float(), want.states[number]) for number, x in got.states.items()),
                "logits": difference(got.logits, want.logits),
                "loss": abs(got.loss - want.loss) / want.loss,
                "gradients": max(difference(got.grads[a].float(), want.grads[b]) for a, b in compared.items()),
            }
        )
    return found[0], found[1]


def _is_te(module: torch.nn.Module) -> bool:
    return any(base.__module__.startswith("transformer_engine") for base in type(module).__mro__)


def in_fp8(case: Case, seed: int) -> Results:
    """How far logits and loss in fp8 are from those in bf16, after steps in which scales were found."""
    rng = torch.Generator().manual_seed(seed)
    plain, _, args = prepared(case, "transformer_engine", "--bf16")
    draw(plain.module, rng)
    tokens = torch.randint(0, args.padded_vocab_size, (2, LENGTH), generator=rng).cuda()
    weight = torch.randn(2, LENGTH, args.padded_vocab_size, generator=rng).cuda()
    want = step(plain, case, tokens, weight)
    model, _, _ = prepared(case, "transformer_engine", f"--bf16 {case.te}", plain.module)
    for _ in range(3):
        got = step(model, case, tokens, weight)
    return {"logits": difference(got.logits, want.logits), "loss": abs(got.loss - want.loss) / want.loss}


def measure(rank: int, world: int, seed: int) -> dict[str, tuple | Results | str]:
    """All cases in one process, since starting it takes longer; of a case that fails, why."""
    layers.start()
    found: dict[str, tuple | Results | str] = {}
    for function, cases, prefix in ((errors, CASES, ""), (in_fp8, FP8_CASES, "fp8-")):
        for i, (name, case) in enumerate(cases.items()):
            try:
                found[prefix + name] = function(case, seed + i)
            except Exception:
                found[prefix + name] = traceback.format_exc()
    return found


@pytest.fixture(scope="module")
def measured() -> dict[str, tuple | Results | str]:
    print(f"LIGHTNING_TEST_SEED={SEED}")
    return spawn(measure, 1, SEED % 2**30, gpus=True, timeout=400)[0]


@pytest.mark.parametrize("name", CASES)
def test_as_exact_as_local_layers(name, measured):
    assert not isinstance(measured[name], str), measured[name]
    local, te = measured[name]
    lines = [f"{what}: {te[what]:.1e}, local layers {error:.1e}" for what, error in local.items()]
    print("\n".join(lines))
    for what, error in local.items():
        assert te[what] <= MORE * error + FLOOR, "\n".join(lines)


@pytest.mark.parametrize("name", FP8_CASES)
def test_fp8_is_close_to_bf16(name, measured):
    """And is not the same, which it would be without fp8."""
    found = measured[f"fp8-{name}"]
    assert not isinstance(found, str), found
    print(found)
    assert 1e-3 < found["logits"] < 0.3 and found["loss"] < 0.05
