"""The released models: their options, and where each of their tensors lies in a Megatron checkpoint."""
