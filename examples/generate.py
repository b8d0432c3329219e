"""Continue a prompt from a checkpoint: ``lightning-generate`` from a checkout, with or without a GPU.

    python examples/generate.py --load CKPT --tokenizer-model tokenizer.model --prompt "def main("

lightning_megatron/inference/generate.py is the code; --help lists the options.
"""

from lightning_megatron.inference.generate import main

if __name__ == "__main__":
    main()
