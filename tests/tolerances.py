"""The one table of tolerances, and how a result is compared with the fp64 reference.

The error of a tensor is its relative RMS ||a - b|| / ||b||, taken for each head and the worst head counts: a head that
forgets quickly has small values, which a head that never forgets would drown. Loosening an entry needs a reason here.

No entry may depend on the machine. What a sum of n products loses in fp32 depends on its order, and so on the CPU, its
kernels and the number of threads; but no order is worse than one product after the other. ``summed(n)`` is what that
costs, and entries for fp32 are at least three times as much. tests/test_tolerances.py shows for the main entries that
such noise stays below a third of the tolerance, and that a mistake exceeds ten times the tolerance.
"""

import torch

UNIT = 2.0**-24  # unit roundoff of fp32: half a unit in the last place, relative


def summed(n: int) -> float:
    """Relative RMS error of a sum of n products of random signs, added one after the other in fp32.

    The partial sum of i products is sqrt(i / n) of the whole, and each is rounded:
    sqrt(sum of i / n) UNIT = sqrt(n / 2) UNIT at most. (The bound for the worst signs, gamma_n = n UNIT / (1 - n UNIT)
    of the sum of magnitudes, is sqrt(n) times as much again for such sums; it would hide mistakes.)
    """
    return (n / 2) ** 0.5 * UNIT


# ---- the operator ----------------------------------------------------------------------------------------------------

OUTPUTS = ("o", "dq", "dk", "dv")  # in the dtype of the inputs
STATES = ("final_state", "dinitial_state")  # always fp32, or fp64 with fp64 inputs

# Rounding a value to bf16 costs 1.7e-3 relative RMS, to fp16 2.1e-4, to fp32 2.5e-8.
TOLERANCES = {
    # fp64, in 100 to 1200 tokens: 1200 times its unit roundoff of 1.1e-16 is 1.3e-13.
    ("torch", torch.float64): dict.fromkeys(OUTPUTS + STATES, 1e-12),
    # 1e-5 is what users are promised; measured 1e-7 to 3e-7. Three sums follow each other (q k^T over K <= 256, v over
    # T <= 1200 tokens, the gradient over T again): 3 summed(1200) = 4.4e-6 without blocks, and all sums have them.
    ("torch", torch.float32): dict.fromkeys(OUTPUTS + STATES, 1e-5),
    # fp32 inside: only outputs are rounded to the dtype, once, which changes no number by more than half a unit in the
    # last place: 2^-8 and 2^-11. (2.5e-3 and 3e-4, near what rounding costs on average, failed once in 1400 draws: one
    # token.)
    ("torch", torch.bfloat16): dict.fromkeys(OUTPUTS, 4e-3) | dict.fromkeys(STATES, 1e-5),
    ("torch", torch.float16): dict.fromkeys(OUTPUTS, 5e-4) | dict.fromkeys(STATES, 1e-5),
    ("triton", torch.float32): dict.fromkeys(OUTPUTS + STATES, 1e-5),
    # The tensor cores take bf16 (fp16): an output sums products of two rounded factors (decayed q k^T, and the state)
    # and is rounded itself, together sqrt(3) 1.7e-3 = 2.9e-3 (fp16 3.6e-4); a state sums decayed v, rounded once.
    # In a document of one token a single rounding of q k^T, up to 3.9e-3, is the error of a whole row: 5.03e-3 was seen
    # on an H100, so not twice the expected error is allowed but three times.
    ("triton", torch.bfloat16): dict.fromkeys(OUTPUTS, 8e-3) | dict.fromkeys(STATES, 4e-3),
    ("triton", torch.float16): dict.fromkeys(OUTPUTS, 1e-3) | dict.fromkeys(STATES, 5e-4),
}

# A head whose RMS is below this is compared with this instead: the dtype cannot hold its values to the tolerance.
SMALLEST = {torch.float64: 1e-280, torch.float32: 1e-20, torch.bfloat16: 1e-20, torch.float16: 1e-4}

# Two formulas of the reference itself, fp64, 40 tokens: 40 times 1e-16, and room for the gradients' second sum.
FORMULAS = 1e-13
# By hand, with log_decay in fp32 (between 0 and -1): its rounding, twice.
BY_HAND = 2 * UNIT

# Gradients added to each other in the dtype of the inputs, four roundings in bf16 of at most 2^-8 each.
ADDED = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}

# Element by element of a head that remembers one token, in units of q k v: the tensor cores round q k to bf16 (2^-8)
# and o once more.
ONE_TOKEN = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}

# Over ranks, relative to the norm of a quantity: the same sums as TOLERANCES, in another order.
RANKS = {torch.float64: 1e-12, torch.float32: 1e-5}
# A sum of up to 8 states with weights below 1: gamma_9 = 9 UNIT of magnitudes, which are sqrt(8) times the sum.
EXCHANGED = 9 * 8**0.5 * UNIT

# ---- around the operator ---------------------------------------------------------------------------------------------

# Relative RMS of the worst 16 columns: fp32 inside, and every result is rounded once, as above. Sums of up to 4096
# tokens (gradients of weights): summed(4096) = 2.7e-6.
POINTWISE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 5e-4}

# Decoding, relative RMS of the worst request or state: fp32 inside, rounded once. The torch backend rounds after each
# of the operations that make a layer, half a dozen times up to 2^-8 (2^-11), and an output norm passes that on.
DECODING = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2.5e-3}

# Cross entropy, relative RMS of all tokens: fp32 inside, nothing is rounded to the dtype of the logits. The loss of a
# token is log(sum of 100 exponentials) + largest - target: summed(100) = 4.2e-7 at most, and three roundings.
LOSS = {torch.float64: 1e-12, torch.float32: 1.5e-6}

# The same from hidden states: logits, of size 5, are sums of 40 products, 5 summed(40) = 1.3e-6, compared with a loss
# that may be as small as 1.
LINEAR_LOSS = {torch.float64: 1e-12, torch.float32: 1e-5}
# ... and element by element against one product for all tokens; a bf16 logit up to 20 may round to its neighbour, 2^-4.
LOGITS_IN_CHUNKS = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 0.1}

# Softmax weights of 64 equal keys: sums of 64 positive numbers, gamma_64 = 3.8e-6 of their sum at most.
WEIGHTS = 1e-5

# Softmax attention over ranks in fp64, largest difference relative to the largest value.
SOFTMAX = 1e-12

# Decays: an exp2 or a power in fp32 and three products, of 2^-24 each; where transformers computes in fp32 too, twice.
DECAYS = 10 * UNIT
DECAYS_OF_FP32 = 20 * UNIT

# Layers and models, relative RMS of the worst block. fp32 agrees to 3e-6 (summed(256) = 6.7e-7, a few times); but the
# output norm divides by the RMS of a head's output, which at a sequence's first token is q k^T v alone and may be
# almost 0, and then amplifies what was rounded off: 1.7e-5 was seen in a thousand draws, and 3.2e-5
# in 300 draws of test_tolerances.py with noise of 2^-20. bf16: a dozen roundings of 1.7e-3 each on the way through a
# layer; measured up to 1.3e-2, and 4.3e-2 with q/k norm where one token's q was almost 0
# (LIGHTNING_TEST_SEED=592099910): the gradient is divided by its RMS, so that this token alone makes the gradient of
# its head's weights. A mistake is of order 1.
LAYERS = {torch.float32: 2e-4, torch.bfloat16: 7e-2}
# A gradient that is 0 in exact arithmetic, of a sum over 80 tokens of numbers of size 10: 10 * 80 UNIT = 5e-5.
ZERO_GRADIENT = 1e-3
# Logits of a model with caches and without, relative norm; bf16 without the cancellation of single heads.
LOGITS = {torch.float32: 2e-4, torch.bfloat16: 2e-2}

# ---- training --------------------------------------------------------------------------------------------------------

# Losses and gradient norms of the same training in two layouts, absolute. Losses have six decimals, the second of them
# an error of 1.5e-6 (examples/megatron_log.py): of two runs 3e-6. Rounding: noise of 2^-20 on everything that a module
# computes, which is summed(512), changes no loss by more than 2e-6; three times that is allowed. Norms have three
# decimals, of two runs 1e-3, and the same noise changes none of them. This holds with Adam's eps at 1e-3
# (helpers/training.py). With Megatron's 1e-8 a gradient of almost 0 becomes a whole step whose sign rounding decides:
# then noise of 2^-24, a single rounding, changes losses by up to 2e-5. Mistakes: a document's bound off by one 1.3e-2;
# gradients of norms that tensor-parallel ranks do not sum 2e-4.
TRAINED_LOSSES, TRAINED_NORMS = 1e-5, 1.5e-3
NOISE = 2.0**-20
# bf16 keeps 8 bits: three digits of the loss, and 2^-8 of a gradient norm of 3, ten times.
TRAINED_LOSSES_BF16, TRAINED_NORMS_BF16 = 2e-2, 0.1
# The same operations in the same order: what is printed of the second loss.
PRINTED_LOSS = 2e-6

HEADS = dict.fromkeys(OUTPUTS, 2) | dict.fromkeys(STATES, 1)  # [B, T, H, *] and [N, H, K, V]


def error(name: str, got: torch.Tensor, want: torch.Tensor, smallest: float) -> float:
    """Relative RMS of the worst head; NaN and infinity in ``got`` give infinity."""
    assert got.shape == want.shape, f"{name} has shape {list(got.shape)}, not {list(want.shape)}"
    if got.numel() == 0:
        return 0.0
    got, want = (x.detach().double().cpu().movedim(HEADS[name], 0).flatten(1) for x in (got, want))
    assert want.isfinite().all()
    difference = (got - want).square().mean(1).sqrt()
    errors = difference / want.square().mean(1).sqrt().clamp(min=smallest)
    return float(errors.nan_to_num(nan=float("inf")).max())


def assert_close(
    got: dict[str, torch.Tensor], want: dict[str, torch.Tensor], backend: str, dtype: torch.dtype
) -> dict[str, float]:
    """Compare every quantity of ``want``; returns the errors."""
    assert got.keys() == want.keys()
    tolerances = TOLERANCES[backend, dtype]
    errors = {name: error(name, got[name], want[name], SMALLEST[dtype]) for name in want}
    wrong = {name: f"{value:.2e} > {tolerances[name]}" for name, value in errors.items() if value > tolerances[name]}
    assert not wrong, f"{backend} {dtype}: {wrong}, all errors {errors}"
    return errors
