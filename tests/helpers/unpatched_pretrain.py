"""The own entry point without patches.bucket_padding: checkpoints as Megatron writes them; for `run_pretrain`."""

from lightning_megatron import pretrain
from lightning_megatron.patches import bucket_padding

if __name__ == "__main__":
    bucket_padding.apply = lambda: None
    pretrain.main()
