"""Specs of a user's own, for pretrain_gpt.py --spec tests.specs NAME."""

from lightning_megatron.spec import make_spec

bare_spec = make_spec(gate="none", norm="none")
minimax_spec = make_spec(decay="minimax")
without_checksums = make_spec(checksums=False)
