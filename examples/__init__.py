"""Programs beside the package. A package of its own: Megatron-LM has one of this name, which would be taken for it."""
