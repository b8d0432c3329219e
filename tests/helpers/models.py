"""Whole models in this process."""

from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training.models.gpt import GPTModelBuilder, GPTModelConfig


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
