"""States of lightning layers while Megatron generates."""
