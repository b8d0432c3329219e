"""Flags that change nothing in models without the layers that read them, and the values that nobody gave."""

from __future__ import annotations

# Flags of softmax attention that change nothing in an all-lightning model, and the values that nobody gave.
SOFTMAX_ONLY = {
    "apply_query_key_layer_scaling": (False,),
    "apply_wd_to_qk_layernorm": (None, False),
    "attention_backend": ("auto",),
    "attention_dropout": (0.0, 0.1),
    "attention_output_gate": (False,),
    "cp_comm_type": (None, "p2p"),
    "flash_attention_version": (None,),
    "fp8_dot_product_attention": (False,),
    "fp8_multi_head_attention": (False,),
    "log_max_attention_logit": (False,),
    "qk_l2_norm": (False,),
    "qk_layernorm": (False,),
    "softmax_scale": (None,),
    "use_kitchen_attention": (False,),
    "window_attn_skip_freq": (None,),
}
# ... and those of rotary embeddings, which change nothing where no layer turns.
ROTARY_ONLY = {
    "no_rope_freq": (None,),
    "rotary_base": (None, 10000),
    "rotary_interleaved": (False,),
    "rotary_percent": (None, 1.0),
    "rotary_seq_len_interpolation_factor": (None,),
    "use_rope_scaling": (None, False),
}
