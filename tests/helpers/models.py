"""Whole models in this process."""

from megatron.core.models.gpt import GPTModel
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training.models.gpt import GPTModelBuilder, GPTModelConfig
from megatron.training.models.hybrid import HybridModelBuilder, HybridModelConfig

from lightning_megatron import hybrid_model
from lightning_megatron.config import LightningOptions


def gpt(config, layer_spec) -> GPTModel:
    """The model as Megatron's training builds it."""
    model = GPTModelConfig(
        transformer=config,
        transformer_layer_spec=layer_spec,
        vocab_size=64,
        seq_length=32,
        position_embedding_type="rope",
    )
    return GPTModelBuilder(model).build_model(ProcessGroupCollection.use_mpu_process_groups())


def hybrid(config, options: LightningOptions, pattern: str) -> HybridModel:
    """HybridModel, as Megatron's training builds it."""
    hybrid_model.apply()
    model = HybridModelConfig(
        transformer=config,
        hybrid_stack_spec=hybrid_model.make_stack_spec(options),
        hybrid_layer_pattern=pattern,
        vocab_size=64,
        seq_length=32,
        position_embedding_type="rope",
    )
    return HybridModelBuilder(model).build_model(ProcessGroupCollection.use_mpu_process_groups())
