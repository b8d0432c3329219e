"""What Megatron-LM's pretrain_gpt.py does, without a Megatron-LM checkout and with nothing of lightning_megatron.

With --hybrid-layer-pattern it is pretrain_hybrid.py, which differs in the builder of the model.

It builds the model from the arguments, `--spec` among them, and trains it on mock data. Run it under
examples/cpu_shim.py; pretrain_gpt.py itself is not in the megatron-core wheel.
"""

from functools import partial

import megatron.core.datasets.utils
import torch
from megatron.core import parallel_state
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig, MockGPTDataset
from megatron.core.enums import ModelType
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.core.utils import get_batch_on_this_cp_rank
from megatron.training import get_args, pretrain
from megatron.training.argument_utils import (
    gpt_config_from_args,
    hybrid_config_from_args,
    pretrain_cfg_container_from_args,
)
from megatron.training.arguments import parse_and_validate_args

megatron.core.datasets.utils.compile_helpers = lambda: None  # runs make; a checkout has the Makefile, the wheel has not


def loss_func(loss_mask, output):
    loss = torch.sum(output.view(-1).float() * loss_mask.view(-1))
    tokens = loss_mask.sum().to(torch.int)
    return loss, tokens, {"lm loss": torch.stack([loss.detach(), tokens])}


def forward_step(data_iterator, model):
    """Every rank reads the same samples, where pretrain_gpt.py sends them from tensor-parallel rank 0."""
    batch = next(data_iterator)
    if get_args().context_parallel_size > 1:
        cp_group = parallel_state.get_context_parallel_group()
        batch = get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=cp_group)
    output = model(batch["tokens"], batch["position_ids"], batch.get("attention_mask"), labels=batch["labels"])
    return output, partial(loss_func, batch["loss_mask"])


def datasets(samples, vp_stage=None):
    args = get_args()
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        split=args.split,
        tokenizer=build_tokenizer(args),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=args.create_attention_mask_in_dataloader,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
    )
    return BlendedMegatronDatasetBuilder(MockGPTDataset, samples, lambda: True, config).build()


if __name__ == "__main__":
    args = parse_and_validate_args(args_defaults={"tokenizer_type": "NullTokenizer"})
    datasets.is_distributed = True
    model = (gpt_config_from_args if args.hybrid_layer_pattern is None else hybrid_config_from_args)(args)
    pretrain(
        pretrain_cfg_container_from_args(args, model),
        datasets,
        ModelType.encoder_or_decoder,
        forward_step,
    )
    parallel_state.destroy_model_parallel()
