"""What the own entry point gives to Megatron's training loop: arguments, data, loss, and the run itself."""
