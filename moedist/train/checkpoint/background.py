"""Saving while training goes on: the state is copied to the host, a thread writes the copy."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from moedist.train.checkpoint.errors import DiskError


class Staging:
    """Host memory that holds a copy of this rank's part of a state; made by the first copy and used again."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def copy(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors as they are now, of a DTensor this rank's part. Valid until the next copy."""
        locals_ = {key: local_part(tensor) for key, tensor in state.items()}
        self._buffers = {key: self._fitting(key, tensor) for key, tensor in locals_.items()}
        for key, tensor in locals_.items():
            self._buffers[key].copy_(tensor, non_blocking=True)
        for device in {tensor.device for tensor in locals_.values() if tensor.is_cuda}:
            torch.cuda.synchronize(device)
        return dict(self._buffers)

    def _fitting(self, key: str, tensor: Tensor) -> Tensor:
        buffer = self._buffers.get(key)
        if buffer is not None and (buffer.shape, buffer.dtype) == (tensor.shape, tensor.dtype):
            return buffer
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)


def local_part(tensor: Tensor) -> Tensor:
    """This rank's part, without a graph."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


class BackgroundSave:
    """A checkpoint on its way to the disk.

    Its thread talks to the other ranks over the store's own process group, so that training may use all others
    meanwhile; nobody else may use the store before `wait` has returned.

    Attributes:
        step: of the checkpoint.
    """

    def __init__(self, step: int, write: Callable[[Callable[[], None]], Path]):
        """Starts at once.

        Args:
            write: writes the checkpoint, calls its argument once this rank's part is written, returns the folder.
        """
        self.step = step
        self._written, self._ended = threading.Event(), threading.Event()
        self._path: Path | None = None
        self._failure: Exception | None = None
        # A daemon: a thread that hangs on a dead disk must not keep the process.
        threading.Thread(target=self._run, args=(write,), name=f"save of step {step}", daemon=True).start()

    @property
    def saved(self) -> bool:
        """Whether the checkpoint is complete."""
        return self._path is not None

    @property
    def failed(self) -> bool:
        """Whether it has failed on this rank; the other ranks' threads hear of it, not their training."""
        return self._failure is not None

    def wait_written(self, limit_s: float) -> None:
        """Returns when this rank's part is written, or the save has failed.

        Raises:
            DiskError: that takes longer than ``limit_s``.
        """
        if not self._written.wait(limit_s):
            raise DiskError(
                f"this rank's part of the checkpoint of step {self.step} was not written within {limit_s:g} s. See "
                f"that the disk answers, or raise mesh.save_timeout_s."
            )

    def wait(self, limit_s: float) -> Path:
        """The checkpoint's folder once it is complete on all ranks.

        Raises:
            DiskError: it could not be written; alike on all ranks.
            RuntimeError: a rank was lost, or the others take longer than ``limit_s``.
        """
        if not self._ended.wait(limit_s):
            raise RuntimeError(f"timed out: other ranks have not saved step {self.step} within {limit_s:g} s")
        if self._failure is not None:
            raise self._failure
        assert self._path is not None
        return self._path

    def _run(self, write: Callable[[Callable[[], None]], Path]) -> None:
        try:
            self._path = write(self._written.set)
        except Exception as error:  # raised again by `wait`, in the thread that trains
            self._failure = error
        finally:
            self._written.set()
            self._ended.set()
