"""Counts what a rank sends."""

import functools

import torch.distributed as dist


class Sent:
    """Counts the elements that this rank sends, by what the collectives are made of (ring algorithm for the gather)."""

    def __init__(self, monkeypatch, world: int) -> None:
        self.elements, self.dtypes = 0, set()

        def count(name: str, tensor: int, copies: int) -> None:
            function = getattr(dist, name)

            @functools.wraps(function)
            def counted(*args, **kwargs):
                self.elements += args[tensor].numel() * copies
                self.dtypes.add(args[tensor].dtype)
                return function(*args, **kwargs)

            monkeypatch.setattr(dist, name, counted)

        count("all_gather_into_tensor", 1, world - 1)
        count("isend", 0, 1)
        isend, message = dist.isend, dist.P2POp

        def counted_message(op, tensor, **where):
            self.elements += tensor.numel() * (op is isend)
            self.dtypes.add(tensor.dtype)
            return message(getattr(op, "__wrapped__", op), tensor, **where)

        monkeypatch.setattr(dist, "P2POp", counted_message)
        for name in ("all_reduce", "broadcast", "all_to_all_single", "send", "reduce_scatter_tensor"):
            monkeypatch.setattr(dist, name, None)
