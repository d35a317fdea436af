"""Counts what a computation allocates, tensor by tensor, so that memory laws need no clock and no RSS."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements that any operation's result had."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for result in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(result, torch.Tensor):
                self.elements = max(self.elements, result.numel())
        return out


class LiveBytes(TorchDispatchMode):
    """Adds up the bytes of every tensor that an operation made and that is still referenced; `peak` is the most."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._users: dict[int, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for result in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(result, torch.Tensor):
                self._hold(result.untyped_storage(), result)
        return out

    def _hold(self, storage: torch.UntypedStorage, tensor: torch.Tensor) -> None:
        key, size = storage.data_ptr(), storage.nbytes()
        if key not in self._users:
            self._users[key] = 0
            self.live += size
            self.peak = max(self.peak, self.live)
        self._users[key] += 1
        weakref.finalize(tensor, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self._users[key] -= 1
        if not self._users[key]:
            del self._users[key]
            self.live -= size
