"""The released models from their formulas, token by token and in any dtype, on the tensors of a Hugging Face folder.

Written from the technical reports (Ling and Ring: arXiv 2510.19338; MiniMax: 2501.08313; TransNormerLLM: 2307.14995;
multi-latent attention: DeepSeek-V2, 2405.04434, section 2.1), and without anything of the layers, operators, units and
flags that are verified with them: tensors are read by Hugging Face's names, sizes from config.json.

Every model is a function ``(config, tensors, tokens [b, t]) -> (output of every layer [b, t, h], logits [b, t, V])`` in
the dtype of the tensors.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Config = dict[str, Any]
Tensors = Mapping[str, Tensor]
Outputs = tuple[list[Tensor], Tensor]
_margins: list[Tensor] | None = None


@contextlib.contextmanager
def choice_margins() -> Iterator[list[Tensor]]:
    """Collects by how much the last expert chosen beat the next, for every token ``[t]``: rounding turns over small
    ones.
    """
    global _margins
    before, _margins = _margins, []
    try:
        yield _margins
    finally:
        _margins = before


def model_of(config: Config) -> Callable[[Config, Tensors, Tensor], Outputs]:
    """The function of a config.json.

    Raises:
        ValueError: none is here.
    """
    kind = str(config.get("model_type")).lower()
    for prefix, function in (("bailing", bailing), ("minimax", minimax), ("transnormer", tnl)):
        if kind.startswith(prefix):
            return function
    raise ValueError(
        f"config.json: model_type {kind!r} has no reference; it may be bailing..., minimax... or transnormer..."
    )


def alibi(heads: int) -> list[float]:
    """Slopes of ALiBi, interpolated where ``heads`` is no power of two."""
    if heads & (heads - 1) == 0:
        return [2.0 ** (-8.0 * (h + 1) / heads) for h in range(heads)]
    power = 1 << (heads.bit_length() - 1)
    return alibi(power) + alibi(2 * power)[0::2][: heads - power]


def linear_attention(q: Tensor, k: Tensor, v: Tensor, slopes: list[float], scale: float) -> Tensor:
    """[b, t, H, K], [b, t, H, K], [b, t, H, V] -> [b, t, H, V]: S = exp(-slope) S + k v^T, o = scale q S."""
    decay = torch.exp(-torch.tensor(slopes, dtype=q.dtype))[:, None, None]
    state = q.new_zeros(q.shape[0], *q.shape[2:], v.shape[-1])
    outputs = []
    for t in range(q.shape[1]):
        state = decay * state + k[:, t, :, :, None] * v[:, t, :, None, :]
        outputs.append(scale * (q[:, t, :, None, :] @ state).squeeze(-2))
    return torch.stack(outputs, 1)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """[b, t, H, d], [b, t, G, d], [b, t, G, e] -> [b, t, H, e], causal."""
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * scale
    t = q.shape[1]
    hidden = torch.ones(t, t, dtype=torch.bool).triu(1)
    return torch.einsum("bhij,bjhe->bihe", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)


def rms(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return y if weight is None else y * weight


def rotate(x: Tensor, dims: int, base: float, *, neighbours: bool = False) -> Tensor:
    """The first ``dims`` channels of [b, t, H, d]; pairs are half of them apart, or neighbours."""
    frequencies = base ** (-torch.arange(0, dims, 2, dtype=torch.float64) / dims)
    angles = (torch.arange(x.shape[1], dtype=torch.float64)[:, None] * frequencies)[None, :, None]
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    y = x[..., :dims]
    a, b = (y[..., 0::2], y[..., 1::2]) if neighbours else y.chunk(2, -1)
    turned = (a * cos - b * sin, b * cos + a * sin)
    y = torch.stack(turned, -1).flatten(-2) if neighbours else torch.cat(turned, -1)
    return torch.cat((y, x[..., dims:]), -1)


def note_margin(scores: Tensor, chosen: int) -> None:
    """For ``choice_margins``, of scores of which the best so many are chosen."""
    if _margins is not None and chosen < scores.shape[-1]:
        best = scores.detach().topk(chosen + 1, -1).values
        _margins.append((best[..., -2] - best[..., -1]).flatten())


def gated_mlp(x: Tensor, p: Tensors, names: str) -> Tensor:
    gate, up, down = (p[f"{names}{part}_proj.weight"] for part in ("gate", "up", "down"))
    return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T


# ---- Ling and Ring ---------------------------------------------------------------------------------------------------


def _of(c: Config, name: str, default: Any) -> Any:
    """A field, or the default of Hugging Face's class where it is missing or null."""
    return default if c.get(name) is None else c[name]


def bailing(c: Config, p: Tensors, tokens: Tensor, *, offset: int = 0) -> Outputs:
    """``offset`` is added to the layer in the slopes: 0 as in Hugging Face's code, 1 as in vLLM's.

    Behind the layers' outputs are those of multi-token prediction: of layer k the states at token i, whose logits are
    of token i + k + 1 (arXiv 2412.19437, section 2.2).
    """
    x, states, eps = p["model.word_embeddings.weight"][tokens], [], c["rms_norm_eps"]
    layers, group = c["num_hidden_layers"], c["layer_group_size"]
    for layer in range(layers):
        softmax = (layer + 1) % group == 0 or layer >= layers // group * group
        x = _layer(c, p, layer, x, None if softmax else layer + offset)
        states.append(x)
    n = h = rms(x, p["model.norm.weight"], eps)
    for layer in range(layers, layers + _of(c, "num_nextn_predict_layers", 0)):
        norm = lambda name, x, names=f"model.layers.{layer}.": rms(x, p[f"{names}{name}.weight"], eps)
        tokens = F.pad(tokens[:, 1:], (0, 1))
        e = norm("enorm", p["model.word_embeddings.weight"][tokens])
        x = torch.cat((e, norm("hnorm", h)), -1) @ p[f"model.layers.{layer}.eh_proj.weight"].T
        h = norm("final_layernorm", _layer(c, p, layer, x, None))
        states.append(h)
    return states, n @ p[output_weight(c)].T


def output_weight(c: Config) -> str:
    """Name of the output layer's weight."""
    return "model.word_embeddings.weight" if c.get("tie_word_embeddings") else "lm_head.weight"


def _layer(c: Config, p: Tensors, layer: int, x: Tensor, slopes: int | None) -> Tensor:
    """``slopes``: the layer in them; None for softmax."""
    names, eps = f"model.layers.{layer}.", c["rms_norm_eps"]
    n = rms(x, p[f"{names}input_layernorm.weight"], eps)
    if slopes is None:
        attention = _latent if c.get("kv_lora_rank") else _grouped
        x = x + attention(c, p, names + "attention.", n)
    else:
        x = x + _lightning(c, p, names + "attention.", n, slopes)
    n = rms(x, p[f"{names}post_attention_layernorm.weight"], eps)
    if c.get("num_experts") and layer >= _of(c, "first_k_dense_replace", 0):
        return x + _experts(c, p, names + "mlp.", n)
    return x + gated_mlp(n, p, names + "mlp.")


def _theta(c: Config) -> float:
    return float((c.get("rope_parameters") or {}).get("rope_theta") or _of(c, "rope_theta", 10000))


def _head_norms(c: Config, p: Tensors, names: str, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    if not _of(c, "use_qk_norm", True):
        return q, k
    eps = c["rms_norm_eps"]
    return rms(q, p[f"{names}query_layernorm.weight"], eps), rms(k, p[f"{names}key_layernorm.weight"], eps)


def _half_rotated(c: Config, x: Tensor) -> Tensor:
    part = (c.get("rope_parameters") or {}).get("partial_rotary_factor") or _of(c, "partial_rotary_factor", 1.0)
    return rotate(x, int(x.shape[-1] * part), _theta(c))


def _lightning(c: Config, p: Tensors, names: str, n: Tensor, layer: int) -> Tensor:
    heads, eps = c["num_attention_heads"], c["rms_norm_eps"]
    d = c["hidden_size"] // heads
    qkv = n @ p[f"{names}query_key_value.weight"].T
    if _of(c, "linear_silu", _of(c, "use_linear_silu", False)):
        qkv = F.silu(qkv)
    q, k, v = (x.unflatten(-1, (heads, d)) for x in qkv.chunk(3, -1))
    q, k = (_half_rotated(c, x) for x in _head_norms(c, p, names, q, k))
    depth = 1 - (layer - 1) / (c["num_hidden_layers"] - 1) + 1e-5
    o = linear_attention(q, k, v, [slope * depth for slope in alibi(heads)], d**-0.5).flatten(2)
    o = rms(o.unflatten(-1, (_of(c, "group_norm_size", 1), -1)), None, eps).flatten(2) * p[f"{names}g_norm.weight"]
    return (o * (n @ p[f"{names}g_proj.weight"].T).sigmoid()) @ p[f"{names}dense.weight"].T


def _grouped(c: Config, p: Tensors, names: str, n: Tensor) -> Tensor:
    heads = c["num_attention_heads"]
    groups, d = _of(c, "num_key_value_heads", heads), _of(c, "head_dim", c["hidden_size"] // heads)
    qkv = (n @ p[f"{names}query_key_value.weight"].T).unflatten(-1, (heads + 2 * groups, d))
    q, k, v = qkv.split((heads, groups, groups), 2)
    q, k = (_half_rotated(c, x) for x in _head_norms(c, p, names, q, k))
    return softmax_attention(q, k, v, d**-0.5).flatten(2) @ p[f"{names}dense.weight"].T


def _latent(c: Config, p: Tensors, names: str, n: Tensor) -> Tensor:
    heads, eps, base = c["num_attention_heads"], c["rms_norm_eps"], _theta(c)
    fixed, turned, e = c["qk_nope_head_dim"], c["qk_rope_head_dim"], c["v_head_dim"]
    if c.get("q_lora_rank"):
        latent = rms(n @ p[f"{names}q_a_proj.weight"].T, p[f"{names}q_a_layernorm.weight"], eps)
        q = latent @ p[f"{names}q_b_proj.weight"].T
    else:
        q = n @ p[f"{names}q_proj.weight"].T
    q = q.unflatten(-1, (heads, fixed + turned))
    latent, r = (n @ p[f"{names}kv_a_proj_with_mqa.weight"].T).split((c["kv_lora_rank"], turned), -1)
    latent = rms(latent, p[f"{names}kv_a_layernorm.weight"], eps)
    k, v = (latent @ p[f"{names}kv_b_proj.weight"].T).unflatten(-1, (heads, fixed + e)).split((fixed, e), -1)
    r = rotate(r.unsqueeze(2), turned, base, neighbours=True).expand(*k.shape[:-1], turned)
    q = torch.cat((q[..., :fixed], rotate(q[..., fixed:], turned, base, neighbours=True)), -1)
    o = softmax_attention(q, torch.cat((k, r), -1), v, (fixed + turned) ** -0.5)
    return o.flatten(2) @ p[f"{names}dense.weight"].T


def _experts(c: Config, p: Tensors, names: str, n: Tensor) -> Tensor:
    """Scores; the groups with the two best experts, and of these the best; weights of all chosen sum to 1."""
    experts, chosen, groups = c["num_experts"], c["num_experts_per_tok"], _of(c, "n_group", 1)
    x = n.flatten(0, 1)
    scores = x @ p[f"{names}gate.weight"].T
    scores = scores.sigmoid() if _of(c, "score_function", "softmax") == "sigmoid" else scores.softmax(-1)
    ranked = scores
    if _of(c, "moe_router_enable_expert_bias", False):
        ranked = scores + p[f"{names}gate.expert_bias"]
    if groups > 1:
        of_groups = ranked.unflatten(-1, (groups, -1)).topk(2, -1).values.sum(-1)
        note_margin(of_groups, c["topk_group"])
        best = of_groups.topk(c["topk_group"], -1).indices
        allowed = torch.zeros(x.shape[0], groups, dtype=torch.bool).scatter(1, best, True)
        ranked = ranked.masked_fill(~allowed.repeat_interleave(experts // groups, 1), -torch.inf)
    note_margin(ranked, chosen)
    picked = torch.zeros_like(scores).scatter(1, ranked.topk(chosen, -1).indices, 1.0)
    weights = scores * picked
    weights = weights / (weights.sum(-1, keepdim=True) + 1e-20) * _of(c, "routed_scaling_factor", 1.0)
    y = _sum_of_experts(x, weights, lambda x, e: gated_mlp(x, p, f"{names}experts.{e}."))
    if _of(c, "num_shared_experts", 0):
        y = y + gated_mlp(x, p, f"{names}shared_experts.")
    return y.view_as(n)


def _sum_of_experts(x: Tensor, weights: Tensor, expert: Callable[[Tensor, int], Tensor]) -> Tensor:
    """[n, h], [n, experts] -> [n, h]: only the experts that a token chose are computed."""
    y = torch.zeros_like(x)
    for e in range(weights.shape[1]):
        rows = weights[:, e].detach().nonzero()[:, 0]
        if len(rows):
            y = y.index_add(0, rows, weights[rows, e, None] * expert(x[rows], e))
    return y


# ---- MiniMax ---------------------------------------------------------------------------------------------------------


def minimax(c: Config, p: Tensors, tokens: Tensor) -> Outputs:
    """Text-01 and M1, with the names of the released checkpoints and of transformers, which are the same."""
    x, states, eps = p["model.embed_tokens.weight"][tokens], [], c["rms_norm_eps"]
    for layer, lightning in enumerate(_lightning_layers(c)):
        names = f"model.layers.{layer}."
        n = rms(x, p[f"{names}input_layernorm.weight"], eps)
        kind, attention = ("linear", _minimax_lightning) if lightning else ("full", _minimax_full)
        alpha, beta = _factors(c, f"{kind}_attn", f"{kind}_attention")
        x = alpha * n + beta * attention(c, p, names + "self_attn.", n, layer)
        n = rms(x, p[f"{names}post_attention_layernorm.weight"], eps)
        alpha, beta = _factors(c, "mlp", "mlp")
        x = alpha * n + beta * _minimax_experts(c, p, names + "block_sparse_moe.", n)
        states.append(x)
    n = rms(x, p["model.norm.weight"], eps)
    head = "model.embed_tokens.weight" if c.get("tie_word_embeddings") else "lm_head.weight"
    return states, n @ p[head].T


def _lightning_layers(c: Config) -> list[bool]:
    if c.get("layer_types") is not None:
        return [kind == "linear_attention" for kind in c["layer_types"]]
    return [kind == 0 for kind in c["attn_type_list"]]


def _factors(c: Config, ours: str, released: str) -> tuple[float, float]:
    """alpha and beta of y = alpha n + beta f(n), by transformers' names or those of the released config.json."""
    alpha, beta = (_of(c, f"{ours}_{x}_factor", _of(c, f"layernorm_{released}_{x}", 1.0)) for x in ("alpha", "beta"))
    return float(alpha), float(beta)


def _minimax_dim(c: Config) -> int:
    return int(_of(c, "head_dim", c["hidden_size"] // c["num_attention_heads"]))


def _minimax_lightning(c: Config, p: Tensors, names: str, n: Tensor, layer: int) -> Tensor:
    heads, layers = c["num_attention_heads"], c["num_hidden_layers"]
    qkv = F.silu(n @ p[f"{names}qkv_proj.weight"].T).unflatten(-1, (heads, 3 * _minimax_dim(c)))
    q, k, v = qkv.chunk(3, -1)
    depth = 1 - layer / (layers - 1 + 1e-5) + 1e-5
    slopes = [2.0 ** (-8.0 * (h + 1) / heads) * depth for h in range(heads)]  # not interpolated
    o = rms(linear_attention(q, k, v, slopes, 1.0).flatten(2), p[f"{names}norm.weight"], 1e-6)
    return ((n @ p[f"{names}output_gate.weight"].T).sigmoid() * o) @ p[f"{names}out_proj.weight"].T


def _minimax_full(c: Config, p: Tensors, names: str, n: Tensor, layer: int) -> Tensor:
    d = _minimax_dim(c)
    q, k, v = ((n @ p[f"{names}{x}_proj.weight"].T).unflatten(-1, (-1, d)) for x in "qkv")
    q, k = (rotate(x, int(_of(c, "rotary_dim", d)), _theta(c)) for x in (q, k))
    return softmax_attention(q, k, v, d**-0.5).flatten(2) @ p[f"{names}o_proj.weight"].T


def _minimax_experts(c: Config, p: Tensors, names: str, n: Tensor) -> Tensor:
    x, chosen = n.flatten(0, 1), c["num_experts_per_tok"]
    scores = (x @ p[f"{names}gate.weight"].T).softmax(-1)
    note_margin(scores, chosen)
    weights = scores * torch.zeros_like(scores).scatter(1, scores.topk(chosen, -1).indices, 1.0)
    weights = weights / weights.sum(-1, keepdim=True)

    def expert(x: Tensor, e: int) -> Tensor:
        w1, w2, w3 = (p[f"{names}experts.{e}.w{i}.weight"] for i in (1, 2, 3))
        return (F.silu(x @ w1.T) * (x @ w3.T)) @ w2.T

    return _sum_of_experts(x, weights, expert).view_as(n)


# ---- TransNormerLLM --------------------------------------------------------------------------------------------------


def tnl(c: Config, p: Tensors, tokens: Tensor) -> Outputs:
    """Norms have no weights; q and k of the first layers are turned by learnt angles (LRPE)."""
    heads, layers, eps = c["decoder_attention_heads"], c["decoder_layers"], 1e-6
    d = _of(c, "hidden_dim", c["decoder_embed_dim"]) // heads
    x, states = p["model.embed_tokens.weight"][tokens], []
    if not _of(c, "no_scale_embedding", False):
        x = x * math.sqrt(c["decoder_embed_dim"])
    for layer in range(layers):
        mixer, mlp = f"model.layers.{layer}.token_mixer.", f"model.layers.{layer}.channel_mixer."
        q, k, v, u = (rms(x, None, eps) @ p[f"{mixer}qkvu_proj.weight"].T).chunk(4, -1)
        q, k, v = (y.unflatten(-1, (heads, d)) for y in (F.silu(q), F.silu(k), v))
        if (c.get("linear_use_lrpe_list") or [0] * layers)[layer]:
            places = torch.arange(x.shape[1], dtype=x.dtype)[:, None, None]
            angles = places * p[f"{mixer}lrpe.theta"].squeeze(1)
            q, k = (torch.cat((y * angles.cos(), y * angles.sin()), -1) for y in (q, k))
        depth = 1 - layer / (layers - 1) + 1e-5
        o = linear_attention(q, k, v, [slope * depth for slope in alibi(heads)], 1.0).flatten(2)
        x = x + (u * rms(o, None, eps)) @ p[f"{mixer}out_proj.weight"].T
        n = rms(x, None, eps)
        x = x + ((n @ p[f"{mlp}l1.weight"].T) * (n @ p[f"{mlp}l2.weight"].T)) @ p[f"{mlp}l3.weight"].T
        states.append(x)
    head = "model.embed_tokens.weight" if _of(c, "tie_word_embeddings", True) else "lm_head.weight"
    return states, rms(x, None, eps) @ p[head].T
