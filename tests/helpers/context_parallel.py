"""Sequences over context-parallel ranks: which rank holds which token, random documents, results of the operator."""

import torch

EXCHANGES = ("all-gather", "ring", "pipelined", "scan")


def draw_documents(rng: torch.Generator, tokens: int) -> torch.Tensor:
    """1 to 20 documents, some empty, some of one token."""
    inner = torch.randint(0, tokens + 1, (int(torch.randint(0, 20, (), generator=rng)),), generator=rng)
    if inner.numel() > 3:
        inner[0], inner[1] = inner[2], (inner[3] + 1).clamp(max=tokens)
    return torch.cat((torch.tensor([0]), inner.sort().values, torch.tensor([tokens])))


def tokens_of(rank: int, world: int, layout: str, lengths: list[int], cu_seqlens: torch.Tensor | None) -> torch.Tensor:
    """Which tokens of the whole sequence a rank holds, written down from Megatron's and TransformerEngine's
    definitions.
    """
    everything = torch.arange(sum(lengths))
    if layout == "contiguous":
        return everything.split(lengths)[rank]
    if layout == "zigzag":
        chunks = everything.chunk(2 * world)
        return torch.cat((chunks[rank], chunks[2 * world - 1 - rank]))
    found = []
    for a, b in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        chunks = everything[a:b].view(2 * world, -1)
        found += [chunks[rank], chunks[2 * world - 1 - rank]]
    return torch.cat(found)


def results(attn, q, k, v, state, do, dfinal, used: tuple[bool, bool]) -> dict[str, torch.Tensor]:
    """Outputs, and gradients of <o, do> and <final_state, dfinal> as far as they are used."""
    leaves = {"q": q, "k": k, "v": v} | ({} if state is None else {"initial_state": state})
    leaves = {name: x.detach().clone().requires_grad_() for name, x in leaves.items()}
    o, final = attn(*(leaves[n] for n in "qkv"), initial_state=leaves.get("initial_state"))
    outputs = [(o, do)] if used[0] else []
    outputs += [(final, dfinal)] if used[1] else []
    grads = torch.autograd.grad(
        [y for y, _ in outputs], list(leaves.values()), [g for _, g in outputs], allow_unused=True
    )
    grads = [torch.zeros_like(x) if g is None else g for g, x in zip(grads, leaves.values(), strict=True)]
    found = {"o": o.detach()} | ({} if final is None else {"final_state": final.detach()})
    return found | {f"d{name}": g for name, g in zip(leaves, grads, strict=True)}
