"""Record what a function computes on a CPU and replay it on the same tensors, as a CUDA graph does on a GPU."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten


class Recorder(TorchDispatchMode):
    """Records every op with its tensors. `undo` then restores the older tensors that the ops changed.

    Reading a value in Python fails, as it does while a graph is captured.
    """

    def __init__(self):
        super().__init__()
        self.steps: list[tuple[Any, tuple, dict, Any]] = []
        self._made: set[int] = set()
        self._before: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("a value is read while a graph is captured")
        for argument, value in zip(function._schema.arguments, args):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self._keep(value)
        for argument in function._schema.arguments:
            if argument.alias_info is not None and argument.alias_info.is_write and argument.name in kwargs:
                self._keep(kwargs[argument.name])
        out = function(*args, **kwargs)
        given = {tensor.untyped_storage().data_ptr() for tensor in tensors_of((args, kwargs))}
        made = {tensor.untyped_storage().data_ptr() for tensor in tensors_of(out)}
        self._made |= made - given  # an output with an argument's storage is a view, or changed in place
        self.steps.append((function, args, kwargs, out))
        return out

    def _keep(self, value: Any) -> None:
        for tensor in tensors_of(value):
            address = tensor.untyped_storage().data_ptr()
            if address not in self._made:
                self._before.setdefault(address, (tensor, tensor.clone()))

    def undo(self) -> None:
        for tensor, before in self._before.values():
            tensor.copy_(before)

    def replay(self) -> None:
        for function, args, kwargs, out in self.steps:
            again = function(*args, **kwargs)
            for known, new in zip(tensors_of(out), tensors_of(again)):
                if known.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():
                    known.copy_(new)


def tensors_of(value: Any) -> list[torch.Tensor]:
    return [x for x in tree_flatten(value)[0] if isinstance(x, torch.Tensor)]


def capture(step: Callable[[], Any], device: torch.device) -> tuple[Any, Callable[[], None]]:
    """Record a step without letting it change anything, as `decode_graph.Capture` requires.

    What it returned is filled with NaN until the first replay, since a GPU computes nothing before that.
    """
    with Recorder() as recorder:
        output = step()
    recorder.undo()
    for tensor in tensors_of(dict(output)):
        if tensor.is_floating_point() and tensor.untyped_storage().data_ptr() in recorder._made:
            tensor.fill_(torch.nan)
    return output, recorder.replay
