"""The reader of Megatron's log: what it finds, in lines as megatron-core 0.19 prints them."""

import math

import pytest

from examples.megatron_log import Parameters, Reader, Step, Validation, read, steps


def line(iteration: int, loss: float | None, norm: str = "1.500") -> str:
    said = "" if loss is None else f" lm loss: {loss:.6E} |"
    return (
        f" [2026-01-01 00:00:00.000000] iteration {iteration:8d}/{9:8d} | consumed samples: {80:12d} | elapsed time "
        f"per iteration (ms): 50.0 | learning rate: 1.000000E-03 | global batch size: {8:5d} |{said} loss scale: 1.0 | "
        f"grad norm: {norm} | number of skipped iterations:   0 | number of nan iterations:   0 |"
    )


def losses(*rows: tuple[int, float | None]) -> list[float | None]:
    return [step.loss for step in steps("\n".join(line(*row) for row in rows))]


def test_all_fields():
    assert steps(line(5, 4.0)) == [Step(iteration=5, last=9, seconds=0.05, loss=4.0, grad_norm=1.5, lr=1e-3)]
    assert math.isinf(steps(line(5, 4.0, "inf"))[0].grad_norm)


def test_second_loss_is_not_the_mean_that_megatron_prints():
    assert losses((5, 5.0), (6, 4.5), (7, 3.0)) == [5.0, 4.0, 3.0]


@pytest.mark.parametrize(
    "rows",
    [
        [(1, 5.0), (10, 4.5), (20, 3.0)],  # the mean of ten steps is what --log-interval 10 asks for
        [(1, None), (2, 4.5), (3, 3.0)],  # a skipped step is no part of a mean
        [(1, 5.0), (2, None), (3, 3.0)],
    ],
)
def test_other_losses_are_as_printed(rows):
    assert losses(*rows) == [loss for _, loss in rows]


def test_every_start_has_a_reader_of_its_own():
    first, second = Reader(), Reader()
    assert [first(line(1, 5.0)).loss, second(line(1, 5.0)).loss, first(line(2, 4.5)).loss] == [5.0, 5.0, 4.0]


def test_rows_of_a_log():
    log = """
some other line | lm loss: 9 |
 > number of parameters on (tensor, pipeline) model parallel rank (1, 0): 11
 > number of parameters on (tensor, pipeline) model parallel rank (0, 0): 12
 validation loss at iteration 10 | lm loss value: 4.500000E+00 | lm loss PPL: 9.0E+01 |
 validation loss at iteration 10 on validation set | lm loss value: 3.5E+00 | lm loss PPL: 3.0E+01 |
 validation loss at iteration 10 on test set | lm loss value: 2.5E+00 | lm loss PPL: 3.0E+01 |
"""
    assert list(read(log.splitlines())) == [Parameters(12), Validation(10, 4.5), Validation(10, 3.5)]
