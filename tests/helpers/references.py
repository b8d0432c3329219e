"""Ling/Ring linear and TransNormerLLM from their formulas, for any dtype, on the tensors of a Hugging Face checkpoint.

Written from the formulas in the technical reports (arXiv 2510.19338, 2307.14995) and DeepSeek-V2 (2405.04434, section
2.1), token by token where there is a state, and without anything of the package under test.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

Tensors = dict[str, torch.Tensor]
MARGINS: list[float] = []  # of every choice of experts: by how much the last one chosen beat the next


def alibi(heads: int) -> list[float]:
    """Slopes of ALiBi, interpolated where ``heads`` is no power of two."""
    if heads & (heads - 1) == 0:
        return [2.0 ** (-8.0 * (h + 1) / heads) for h in range(heads)]
    power = 1 << (heads.bit_length() - 1)
    return alibi(power) + alibi(2 * power)[0::2][: heads - power]


def linear_attention(q, k, v, slopes: list[float], scale: float) -> torch.Tensor:
    """[b, t, H, K], [b, t, H, K], [b, t, H, V] -> [b, t, H, V]: S = exp(-slope) S + k v^T, o = scale q S."""
    decay = torch.exp(-torch.tensor(slopes, dtype=q.dtype))[:, None, None]
    state, outputs = 0, []
    for t in range(q.shape[1]):
        state = decay * state + k[:, t, :, :, None] * v[:, t, :, None, :]
        outputs.append(scale * (q[:, t, :, None, :] @ state).squeeze(-2))
    return torch.stack(outputs, 1)


def softmax_attention(q, k, v, scale: float) -> torch.Tensor:
    """[b, t, H, d], [b, t, G, d], [b, t, G, e] -> [b, t, H, e], causal."""
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * scale
    t = q.shape[1]
    hidden = torch.ones(t, t, dtype=torch.bool).triu(1)
    return torch.einsum("bhij,bjhe->bihe", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)


def rms(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return y if weight is None else y * weight


def rotate(x: torch.Tensor, dims: int, base: float, *, neighbours: bool = False) -> torch.Tensor:
    """The first ``dims`` channels of [b, t, H, d]; pairs are half of them apart, or neighbours."""
    frequencies = base ** (-torch.arange(0, dims, 2, dtype=torch.float64) / dims)
    angles = (torch.arange(x.shape[1], dtype=torch.float64)[:, None] * frequencies)[None, :, None]
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    y = x[..., :dims]
    a, b = (y[..., 0::2], y[..., 1::2]) if neighbours else y.chunk(2, -1)
    turned = (a * cos - b * sin, b * cos + a * sin)
    y = torch.stack(turned, -1).flatten(-2) if neighbours else torch.cat(turned, -1)
    return torch.cat((y, x[..., dims:]), -1)


def note_margin(scores: torch.Tensor, chosen: int) -> None:
    if chosen < scores.shape[-1]:
        best = scores.detach().topk(chosen + 1, -1).values
        MARGINS.append(float((best[..., -2] - best[..., -1]).min()))


def gated_mlp(x: torch.Tensor, p: Tensors, names: str) -> torch.Tensor:
    gate, up, down = (p[f"{names}{part}_proj.weight"] for part in ("gate", "up", "down"))
    return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T


# ---- Ling and Ring ---------------------------------------------------------------------------------------------------


def bailing(c: dict[str, Any], p: Tensors, tokens: torch.Tensor, *, offset: int = 0):
    """-> (output of every layer, logits [b, t, vocabulary]). ``offset`` is added to the layer in the slopes.

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
    for layer in range(layers, layers + c.get("num_nextn_predict_layers", 0)):
        norm = lambda name, x, names=f"model.layers.{layer}.": rms(x, p[f"{names}{name}.weight"], eps)
        tokens = F.pad(tokens[:, 1:], (0, 1))
        e = norm("enorm", p["model.word_embeddings.weight"][tokens])
        x = torch.cat((e, norm("hnorm", h)), -1) @ p[f"model.layers.{layer}.eh_proj.weight"].T
        h = norm("final_layernorm", _layer(c, p, layer, x, None))
        states.append(h)
    return states, n @ p[output_weight(c)].T


def output_weight(c: dict[str, Any]) -> str:
    return "model.word_embeddings.weight" if c.get("tie_word_embeddings") else "lm_head.weight"


def _layer(c: dict[str, Any], p: Tensors, layer: int, x: torch.Tensor, slopes: int | None) -> torch.Tensor:
    """``slopes``: the layer in them; None for softmax."""
    names, eps = f"model.layers.{layer}.", c["rms_norm_eps"]
    n = rms(x, p[f"{names}input_layernorm.weight"], eps)
    if slopes is None:
        attention = _latent if c.get("kv_lora_rank") else _grouped
        x = x + attention(c, p, names + "attention.", n)
    else:
        x = x + _lightning(c, p, names + "attention.", n, slopes)
    n = rms(x, p[f"{names}post_attention_layernorm.weight"], eps)
    if c.get("num_experts") and layer >= c["first_k_dense_replace"]:
        return x + _experts(c, p, names + "mlp.", n)
    return x + gated_mlp(n, p, names + "mlp.")


def _lightning(c, p: Tensors, names: str, n: torch.Tensor, layer: int) -> torch.Tensor:
    heads, eps = c["num_attention_heads"], c["rms_norm_eps"]
    d = c["hidden_size"] // heads
    qkv = n @ p[f"{names}query_key_value.weight"].T
    if c["linear_silu"]:
        qkv = F.silu(qkv)
    q, k, v = (x.unflatten(-1, (heads, d)) for x in qkv.chunk(3, -1))
    if c["use_qk_norm"]:
        q, k = (rms(x, p[f"{names}{y}_layernorm.weight"], eps) for x, y in ((q, "query"), (k, "key")))
    q, k = (rotate(x, int(d * c["partial_rotary_factor"]), c["rope_theta"]) for x in (q, k))
    depth = 1 - (layer - 1) / (c["num_hidden_layers"] - 1) + 1e-5
    o = linear_attention(q, k, v, [slope * depth for slope in alibi(heads)], d**-0.5).flatten(2)
    o = rms(o.unflatten(-1, (c["group_norm_size"], -1)), None, eps).flatten(2) * p[f"{names}g_norm.weight"]
    return (o * (n @ p[f"{names}g_proj.weight"].T).sigmoid()) @ p[f"{names}dense.weight"].T


def _grouped(c, p: Tensors, names: str, n: torch.Tensor) -> torch.Tensor:
    heads, groups, d, eps = c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"], c["rms_norm_eps"]
    qkv = (n @ p[f"{names}query_key_value.weight"].T).unflatten(-1, (heads + 2 * groups, d))
    q, k, v = qkv.split((heads, groups, groups), 2)
    if c["use_qk_norm"]:
        q, k = (rms(x, p[f"{names}{y}_layernorm.weight"], eps) for x, y in ((q, "query"), (k, "key")))
    q, k = (rotate(x, int(d * c["partial_rotary_factor"]), c["rope_theta"]) for x in (q, k))
    return softmax_attention(q, k, v, d**-0.5).flatten(2) @ p[f"{names}dense.weight"].T


def _latent(c, p: Tensors, names: str, n: torch.Tensor) -> torch.Tensor:
    heads, eps, base = c["num_attention_heads"], c["rms_norm_eps"], c["rope_theta"]
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


def _experts(c, p: Tensors, names: str, n: torch.Tensor) -> torch.Tensor:
    """Sigmoid scores; the groups with the two best experts, and of these the best; weights of all chosen sum to 1."""
    experts, chosen, groups = c["num_experts"], c["num_experts_per_tok"], c["n_group"]
    x = n.flatten(0, 1)
    scores = (x @ p[f"{names}gate.weight"].T).sigmoid()
    ranked = scores + p[f"{names}gate.expert_bias"].to(x.dtype)
    if groups > 1:
        of_groups = ranked.unflatten(-1, (groups, -1)).topk(2, -1).values.sum(-1)
        note_margin(of_groups, c["topk_group"])
        best = of_groups.topk(c["topk_group"], -1).indices
        allowed = torch.zeros(x.shape[0], groups, dtype=torch.bool).scatter(1, best, True)
        ranked = ranked.masked_fill(~allowed.repeat_interleave(experts // groups, 1), -torch.inf)
    note_margin(ranked, chosen)
    picked = torch.zeros_like(scores).scatter(1, ranked.topk(chosen, -1).indices, 1.0)
    weights = scores * picked
    weights = weights / (weights.sum(-1, keepdim=True) + 1e-20) * c["routed_scaling_factor"]
    y = sum(weights[:, e : e + 1] * gated_mlp(x, p, f"{names}experts.{e}.") for e in range(experts))
    if c["num_shared_experts"]:
        y = y + gated_mlp(x, p, f"{names}shared_experts.")
    return y.view_as(n)


# ---- TransNormerLLM --------------------------------------------------------------------------------------------------


def tnl(c: dict[str, Any], p: Tensors, tokens: torch.Tensor):
    """-> (output of every layer, logits [b, t, vocabulary])."""
    heads, layers, eps = c["decoder_attention_heads"], c["decoder_layers"], 1e-6
    d = c["hidden_dim"] // heads
    x, states = p["model.embed_tokens.weight"][tokens], []
    if not c["no_scale_embedding"]:
        x = x * math.sqrt(c["decoder_embed_dim"])
    for layer in range(layers):
        mixer, mlp = f"model.layers.{layer}.token_mixer.", f"model.layers.{layer}.channel_mixer."
        q, k, v, u = (rms(x, None, eps) @ p[f"{mixer}qkvu_proj.weight"].T).chunk(4, -1)
        q, k, v = (y.unflatten(-1, (heads, d)) for y in (F.silu(q), F.silu(k), v))
        if c["linear_use_lrpe_list"][layer]:
            places = torch.arange(x.shape[1], dtype=x.dtype)[:, None, None]
            angles = places * p[f"{mixer}lrpe.theta"].squeeze(1)
            q, k = (torch.cat((y * angles.cos(), y * angles.sin()), -1) for y in (q, k))
        depth = 1 - layer / (layers - 1) + 1e-5
        o = linear_attention(q, k, v, [slope * depth for slope in alibi(heads)], 1.0).flatten(2)
        x = x + (u * rms(o, None, eps)) @ p[f"{mixer}out_proj.weight"].T
        n = rms(x, None, eps)
        x = x + ((n @ p[f"{mlp}l1.weight"].T) * (n @ p[f"{mlp}l2.weight"].T)) @ p[f"{mlp}l3.weight"].T
        states.append(x)
    head = "model.embed_tokens.weight" if c.get("tie_word_embeddings") else "lm_head.weight"
    return states, rms(x, None, eps) @ p[head].T
