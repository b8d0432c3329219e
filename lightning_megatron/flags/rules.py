"""What a row of the tables of this folder is, and what it sees of a run."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from typing import Any, NamedTuple

from ..config import LightningOptions, cut_as_softmax, expert_pattern, flag_of, mtp_pattern, recomputes

TE = "transformer_engine.pytorch"
ROTARY = ("rope", "yarn", "mrope")  # values of --position-embedding-type that give layers angles


def loads(args: Namespace) -> bool:
    """Whether a run with these flags of Megatron loads a checkpoint, or would if one is there."""
    return any(getattr(args, name, None) for name in ("load", "pretrained_checkpoint"))


class Run(NamedTuple):
    """What a run asks for, as the rows of the tables see it."""

    config: Any
    options: LightningOptions
    layout: str
    args: Namespace  # Megatron's flags; empty outside of its training loop
    softmax: int  # how many layers are softmax layers

    def get(self, name: str) -> Any:
        """A field of the config, else a flag, else None; an option by its flag, as ``lightning_scale``."""
        if name.startswith("lightning_"):
            return getattr(self.options, name.removeprefix("lightning_"), getattr(self.args, name, None))
        return getattr(self.config, name, getattr(self.args, name, None))

    @property
    def loads(self) -> bool:
        return loads(self.args)

    @property
    def loads_weights_alone(self) -> bool:
        """Without the optimizer's. Megatron begins with ``--pretrained-checkpoint`` as with ``--finetune``."""
        return self.loads and any(map(self.get, ("no_load_optim", "finetune", "pretrained_checkpoint")))

    @property
    def local(self) -> bool:
        return self.config.transformer_impl == "local"

    @property
    def latent(self) -> bool:
        return bool(self.config.multi_latent_attention)

    @property
    def mtp(self) -> bool:
        return bool(self.ahead)

    @property
    def ahead(self) -> list[bool]:
        """Which layers of multi-token prediction are lightning."""
        return mtp_pattern(self.config.mtp_num_layers, self.options)

    @property
    def attends(self) -> bool:
        """Whether some layer has softmax attention, of multi-token prediction, too."""
        return bool(self.softmax) or not all(self.ahead)

    @property
    def routed(self) -> list[bool]:
        """Which MLPs are experts in place of a dense one; --num-experts alone gives none where --moe-layer-freq has
        zeros only. In HybridModel the letters say so, and an attention may stand before any number of them."""
        if letters := self.get("hybrid_layer_pattern"):
            return [letter == "E" for letter in letters.partition("/")[0] if letter in "-E"]
        return expert_pattern(self.config.moe_layer_freq, self.config.num_layers, self.config.num_moe_experts)

    @property
    def experts(self) -> bool:
        """Whether some layer has experts. HybridModel's layers of multi-token prediction, of another pattern, may."""
        ahead = self.config.num_moe_experts and self.mtp and self.get("hybrid_layer_pattern")
        return bool(ahead) or any(self.routed)

    @property
    def packed(self) -> bool:
        return bool(self.get("sft") or self.get("dataloader_inter_document_masking"))

    @property
    def recomputes(self) -> bool:
        return self.config.recompute_granularity == "full"

    @property
    def graphs(self) -> bool:
        return self.get("cuda_graph_impl") not in (None, "none")

    @property
    def graphed(self) -> list[str]:
        """Modules that CUDA graphs hold, as the flag names them; none for whole layers."""
        return [getattr(module, "name", module) for module in self.get("cuda_graph_modules") or ()]

    @property
    def own_norms(self) -> bool:
        """Whether layers have norms of this package even with TransformerEngine."""
        other = self.options.embedding_scale != 1.0 or not self.options.layernorm_affine
        return bool(self.config.apply_residual_connection_post_layernorm or other)

    @property
    def muon_cuts_wrong(self) -> bool:
        """Whether Muon would cut the fused projection of lightning layers where softmax layers have their parts."""
        muon = self.get("optimizer") in ("muon", "dist_muon", "adaptive_muon") and self.get("muon_split_qkv")
        return bool(muon) and cut_as_softmax(self.config, self.options)

    @property
    def rotates(self) -> bool:
        """Whether some layer turns q and k; without flags nobody knows, and lightning layers check it themselves."""
        if self.latent and self.softmax:
            return True
        return self.get("position_embedding_type") in ROTARY and (self.attends or self.options.rope)


class Rule(NamedTuple):
    """A row of a table: it speaks if the attribute has a value (neither None nor False) and ``when`` holds."""

    attribute: str  # of the config, or of the flags
    when: Callable[[Run], Any]
    # goes on after flag and value: what happens, and the remedy; called where it depends on the run
    text: str | Callable[[Run], Any]
    flag: str = ""  # where it is not --attribute

    def message(self, run: Run) -> str | None:
        value = run.get(self.attribute)
        if value is None or value is False or not self.when(run):
            return None
        text = self.text if isinstance(self.text, str) else self.text(run)
        return (self.flag or flag_of(self.attribute)) + shown(value) + " " + text


def shown(value: Any) -> str:
    """A value as it stands on the command line after its flag."""
    if value is True:
        return ""
    if isinstance(value, list) and value and set(value) <= {0, 1}:  # a pattern of layers is one word
        return " " + str(value).replace(" ", "")
    return " " + (" ".join(map(str, value)) if isinstance(value, list) else str(getattr(value, "name", value)))


def selective(run: Run, *modules: str) -> bool:
    return any(recomputes(run.config, module) for module in modules)
