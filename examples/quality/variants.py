"""What is compared: variants of one model, as flags of lightning_megatron.pretrain.

    python -m examples.quality.variants           # names, FFN widths, parameters

All variants of a size have parameters equal within 2% (the FFN width makes up for the output gate of lightning layers),
and the same tokens, data order, optimizer and schedule. Only the attention differs.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Size:
    """Sizes that all variants share. The FFN width is that of the softmax model; others are a multiple of ``step``."""

    layers: int
    hidden: int
    heads: int
    ffn: int
    step: int
    seq_length: int
    batch: int
    """Sequences of a training step."""
    micro_batch: int
    vocabulary: int


SIZES = {
    "base": Size(16, 768, 6, 2048, 32, 4096, 32, 16, 32_000),
    "fidelity": Size(4, 256, 4, 768, 32, 1024, 8, 8, 32_000),
    "base-32k": Size(16, 768, 6, 2048, 32, 32_768, 4, 2, 32_000),  # for the speed at 32K; same tokens a step
    "toy": Size(4, 96, 3, 256, 8, 128, 8, 8, 1024),
    "tiny": Size(4, 32, 2, 64, 4, 128, 2, 2, 512),
}
LEARNING_RATES = (5e-4, 1e-3, 2e-3, 4e-3)  # of the sweep, until the best has a worse one on either side
WARM_UP = 100  # steps, and a fifth of a run at most


@dataclass(frozen=True)
class Variant:
    """Which layers are lightning, and what differs from the default options."""

    every: int | None
    """One softmax layer in so many: None for no softmax layer, 1 for softmax alone."""
    options: dict[str, str] = field(default_factory=dict)
    """Flags beside the sizes."""
    heads: int = 1
    """In heads of the size; each has so many times fewer channels."""

    @property
    def gated(self) -> bool:
        return self.options.get("--lightning-gate") != "none"

    @property
    def softmax_gated(self) -> bool:
        return "--attention-output-gate" in self.options

    @property
    def output_norm(self) -> bool:
        return self.options.get("--lightning-norm") != "none"

    def lightning_layers(self, layers: int) -> int:
        return layers - (layers // min(self.every, layers) if self.every else 0)


MAIN = {
    "lightning": Variant(None), "15:1": Variant(16), "7:1": Variant(8), "3:1": Variant(4), "1:1": Variant(2),
    "softmax": Variant(1),
}  # fmt: skip
HYBRIDS = [name for name in MAIN if name not in ("lightning", "softmax")]
ABLATIONS = {
    **{f"lightning,decay={x}": Variant(None, {"--lightning-decay": x}) for x in ("minimax", "alibi", "none")},
    **{f"lightning,norm={x}": Variant(None, {"--lightning-norm": x}) for x in ("all", "none")},
    "lightning,gate=none": Variant(None, {"--lightning-gate": "none"}),
    "lightning,rope": Variant(None, {"--lightning-rope": ""}),
    "7:1,rope": Variant(8, {"--lightning-rope": ""}),
    "7:1,nope": Variant(8, {"--position-embedding-type": "none"}),
    # what lightning layers have beside their attention, for softmax; and another usual cut into heads
    "softmax,gate": Variant(1, {"--attention-output-gate": ""}),
    "softmax,qk-norm": Variant(1, {"--qk-layernorm": ""}),
    "softmax,heads=double": Variant(1, heads=2),
}  # of lightning and 7:1, whose decay is tnl, norm head, gate sigmoid, without rope in lightning layers; and of softmax
VARIANTS = MAIN | ABLATIONS
TWO_SEEDS = ("lightning", "7:1", "softmax")
FAMILY = {name: name if name in TWO_SEEDS else "7:1" for name in MAIN}  # whose best learning rate a variant takes


@dataclass(frozen=True)
class Plan:
    """Runs that the comparison consists of; the report shows those that are missing."""

    size: str = "base"
    tokens: float = 300e6
    short: float = 60e6
    """Tokens of the runs for learning rates and ablations, and of the second point of each variant's loss by tokens."""
    long_size: str = "base-32k"
    long_tokens: float = 5e6
    """Enough to measure the speed at the longer sequences."""
    transformer_impl: str = "transformer_engine"
    """Of all runs that are compared, with the faster softmax attention; runs of others only choose learning rates."""

    def wanted(self) -> list[tuple[str, str, float, int]]:
        """(variant, size, tokens, seed) of every run."""
        seeds = [(name, seed) for seed in (1, 2) for name in (MAIN if seed == 1 else TWO_SEEDS)]
        main = [(name, self.size, tokens, seed) for tokens in (self.tokens, self.short) for name, seed in seeds]
        short = [(name, self.size, self.short, 1) for name in ABLATIONS]
        return main + short + [(name, self.long_size, self.long_tokens, 1) for name in MAIN]


PLAN = Plan()


def variant(name: str) -> Variant:
    """A variant by its name.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in VARIANTS:
        raise ValueError(f"variant {name!r} is unknown; choose one of {', '.join(VARIANTS)}")
    return VARIANTS[name]


def parameters(chosen: Variant, size: Size, ffn: int) -> int:
    """Parameters of the model: embeddings are tied, projections have no bias, norms are RMSNorm."""
    lightning, h = chosen.lightning_layers(size.layers), size.hidden
    softmax = size.layers - lightning
    attention = 4 * h * h * size.layers + lightning * (chosen.gated * h * h + chosen.output_norm * h)
    attention += softmax * (chosen.softmax_gated * h * h)
    if "--qk-layernorm" in chosen.options:
        attention += softmax * 2 * (h // (size.heads * chosen.heads))
    return size.vocabulary * h + attention + size.layers * (3 * h * ffn + 2 * h) + h


def ffn_width(chosen: Variant, size: Size) -> int:
    """The multiple of ``size.step`` with which the parameters are nearest to those of the softmax model."""
    wanted = parameters(MAIN["softmax"], size, size.ffn)
    rest = wanted - parameters(chosen, size, 0)
    each = parameters(chosen, size, 1) - parameters(chosen, size, 0)
    return max(1, round(rest / each / size.step)) * size.step


def flags(name: str, size: Size) -> list[str]:
    """The model's flags of lightning_megatron.pretrain."""
    chosen = variant(name)
    words = f"""
        --num-layers {size.layers} --hidden-size {size.hidden} --num-attention-heads {size.heads * chosen.heads}
        --ffn-hidden-size {ffn_width(chosen, size)} --seq-length {size.seq_length}
        --max-position-embeddings {size.seq_length} --normalization RMSNorm --swiglu --disable-bias-linear
        --attention-dropout 0 --hidden-dropout 0 --init-method-std 0.02
    """.split()
    if chosen.every == 1:
        words += ["--linear-attention-freq", f"([0]*{size.layers})"]
    elif chosen.every is not None:
        # every N-th layer; where the toy models have fewer layers, the last one is softmax
        words += ["--linear-attention-freq", str(min(chosen.every, size.layers))]
    given = {"--position-embedding-type": "rope"} | chosen.options
    return words + [word for pair in given.items() for word in pair if word]


def main() -> None:
    size = SIZES["base"]
    wanted = parameters(MAIN["softmax"], size, size.ffn)
    print(f"{'variant':26} {'lightning layers':>16} {'FFN':>6} {'parameters':>12} {'of softmax':>10}")
    for name, chosen in VARIANTS.items():
        width = ffn_width(chosen, size)
        count = parameters(chosen, size, width)
        print(f"{name:26} {chosen.lightning_layers(size.layers):>16} {width:>6} {count:>12,} {count / wanted:>10.2%}")


if __name__ == "__main__":
    main()
