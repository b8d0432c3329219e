"""Which tokens are drawn of logits, and the text that is made of them: whole characters, stop words, linear cost."""

from __future__ import annotations

import random

import torch

# ---- drawing ---------------------------------------------------------------------------------------------------------


def draws(how, logits: torch.Tensor, count: int = 300) -> set[int]:
    random = how.generator(0, 0, logits.device)
    return {int(how.draw(logits, [random])) for _ in range(count)}


def test_drawn_tokens_are_those_allowed():
    """Probabilities 0.4, 0.3, 0.2, 0.06, 0.04 in another order."""
    from lightning_megatron.inference.sampling import Sampling

    logits = torch.tensor([[0.2, 0.04, 0.4, 0.3, 0.06]]).log()
    assert draws(Sampling(temperature=0), logits) == {2}
    assert draws(Sampling(temperature=1.0), logits) == {0, 1, 2, 3, 4}
    assert draws(Sampling(temperature=1.0, top_k=2), logits) == {2, 3}
    assert draws(Sampling(temperature=1.0, top_k=5), logits) == {0, 1, 2, 3, 4}
    assert draws(Sampling(temperature=1.0, top_p=0.65), logits) == {2, 3}
    assert draws(Sampling(temperature=1.0, top_p=1.0), logits) == {0, 1, 2, 3, 4}
    counts = [int(Sampling(temperature=2.0).draw(logits, [torch.Generator().manual_seed(i)])) for i in range(4000)]
    want = logits.exp().sqrt()[0] / logits.exp().sqrt().sum()
    torch.testing.assert_close(torch.bincount(torch.tensor(counts)) / 4000, want, atol=0.03, rtol=0)


def test_rows_are_drawn_as_megatron_draws_each_alone():
    from megatron.core.inference.sampling.torch_sampling import TorchSampling

    from lightning_megatron.inference.sampling import Sampling

    logits = torch.randn(5, 300, generator=torch.Generator().manual_seed(3)) * 3
    for how in (Sampling(), Sampling(top_k=7), Sampling(top_p=0.8), Sampling(top_k=1), Sampling(temperature=0)):
        mine, megatrons = ([how.generator(i, 0, logits.device) for i in range(5)] for _ in range(2))
        for _ in range(20):
            want = logits.argmax(-1)
            if how.temperature:
                given = how.temperature, how.top_k or 0, float(how.top_p or 0)
                rows = zip(logits.split(1), megatrons, strict=True)
                want = torch.cat([TorchSampling.sample_from_logits(x, *given, generator=g) for x, g in rows])
            assert torch.equal(how.draw(logits, mine), want)


# ---- text ------------------------------------------------------------------------------------------------------------


class Bytes:
    """A tokenizer whose tokens are bytes."""

    vocab_size, eod = 256, -1

    def detokenize(self, tokens: list[int]) -> str:
        return bytes(tokens).decode("utf-8", errors="replace")


def shown(text: str, stop: tuple[str, ...] = ()) -> list[str]:
    """What is printed after each byte of a text, until a stop word; then what is left."""
    from lightning_megatron.inference.sampling import Text

    made, found = Text(Bytes(), list("Präfix ".encode())[-9:], stop), []
    for byte in text.encode():
        found.append(made.push(byte))
        if made.stopped:
            break
    return [*found, made.flush()]


def test_whole_characters_only():
    assert shown("aé€") == ["a", "", "é", "", "", "€", ""]
    assert "".join(shown("né😀" * 50)) == "né😀" * 50


def test_stop_words_span_tokens_and_are_not_shown():
    assert shown("say STOP now", ("STOP",)) == ["s", "a", "y", " ", "", "", "", "", ""]
    assert shown("SSTOR", ("STOP",)) == ["", "S", "", "", "STOR", ""]
    assert shown("a ST", ("STOP",))[-1] == "ST"
    assert "".join(shown("one\n\ntwo", ("two", "\n\n"))) == "one"
    draw = random.Random(11)
    for _ in range(300):
        text = "".join(draw.choice("abé") for _ in range(30))
        stop = tuple("".join(draw.choice("abé") for _ in range(draw.randint(1, 4))) for _ in range(2))
        ends = [text.find(word) for word in stop if word in text]
        pieces = shown(text, stop)
        # a word found first is that whose last letter comes first; what was printed never holds one
        assert not any(word in "".join(pieces) for word in stop) and text.startswith("".join(pieces))
        assert len("".join(pieces)) >= (min(ends) if ends else len(text)), f"{text} {stop}"


def test_linear_cost():
    """A token's text is found from the last few tokens."""
    seen = []

    class Counting(Bytes):
        def detokenize(self, tokens):
            seen.append(len(tokens))
            return super().detokenize(tokens)

    from lightning_megatron.inference.sampling import Text

    text = Text(Counting(), list(b"prompt" * 100))
    assert "".join(text.push(x) for x in b"word " * 200) == "word " * 200
    assert max(seen) < 32
