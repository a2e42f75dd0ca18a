"""Nested values from one rank to the next: tensors of any size, and whatever Python holds them.

``torch.distributed.pipelining`` sends tensors of sizes that are fixed before the first step; a detector's images and
boxes are of other sizes in every batch.
"""

import io
import pickle
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from glcan_fx.errors import RankError, UnsupportedError


class _Pickler(pickle.Pickler):
    """Leaves tensors out; each is named by its number."""

    def __init__(self, file: Any) -> None:
        super().__init__(file)
        self.tensors: list[Tensor] = []
        self._numbers: dict[int, int] = {}

    def persistent_id(self, value: Any) -> int | None:
        if not isinstance(value, Tensor):
            return None
        if id(value) not in self._numbers:
            self._numbers[id(value)] = len(self.tensors)
            self.tensors.append(value)
        return self._numbers[id(value)]


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: Any, tensors: list[Tensor]) -> None:
        super().__init__(file)
        self.tensors = tensors

    def persistent_load(self, index: int) -> Tensor:
        return self.tensors[index]


class Channel:
    """Sends values to, and receives them from, one other rank of a group. device: where tensors that were on the
    other rank's accelerator go. Raises RankError where the other rank has ended."""

    def __init__(self, peer: int, group: dist.ProcessGroup | None, device: torch.device) -> None:
        self.group, self.device = group, device
        self.rank = dist.get_global_rank(group, peer) if group is not None else peer
        self._sent: list[tuple[dist.Work, Tensor]] = []

    def send(self, values: Any) -> None:
        """Begin to send; what was sent before has arrived then, so that at most one message is kept."""
        self.flush()
        file = io.BytesIO()
        pickler = _Pickler(file)
        pickler.dump(values)
        tensors = [_dense(tensor.detach()) for tensor in pickler.tensors]
        specs = [(t.shape, t.stride(), t.dtype, t.device.type, old.requires_grad)
                 for t, old in zip(tensors, pickler.tensors, strict=True)]
        header = torch.frombuffer(bytearray(pickle.dumps((specs, file.getvalue()))), dtype=torch.uint8)
        flat = [t.as_strided((t.numel(),), (1,)).view(torch.uint8) for t in tensors if t.numel()]
        with self._answering():
            for part in (torch.tensor([header.numel()]), header, *flat):
                work = dist.isend(part, self.rank, self.group)
                if work is not None:
                    self._sent.append((work, part))

    def flush(self) -> None:
        """Wait until what was sent has arrived."""
        with self._answering():
            while self._sent:
                self._sent.pop(0)[0].wait()

    def messages(self, count: int) -> Iterator[Any]:
        """So many messages; in main memory each arrives while the one before is in use."""
        if self.device.type != "cpu":  # a thread would have a stream of its own
            yield from (self.receive() for _ in range(count))
            return
        with ThreadPoolExecutor(1) as thread:
            coming = thread.submit(self.receive)
            for index in range(count):
                message = coming.result()
                if index < count - 1:
                    coming = thread.submit(self.receive)
                yield message
                del message

    def receive(self) -> Any:
        """The next message."""
        size = torch.empty(1, dtype=torch.int64)
        with self._answering():
            dist.recv(size, self.rank, self.group)
            header = torch.empty(int(size), dtype=torch.uint8)
            dist.recv(header, self.rank, self.group)
            specs, body = pickle.loads(header.numpy().tobytes())
            made = []
            for shape, stride, dtype, kind, needs_grad in specs:
                device = "cpu" if kind == "cpu" else self.device
                tensor = torch.empty_strided(shape, stride, dtype=dtype, device=device)
                if tensor.numel():
                    dist.recv(tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8), self.rank, self.group)
                made.append(tensor.requires_grad_(needs_grad))
        return _Unpickler(io.BytesIO(body), made).load()

    @contextmanager
    def _answering(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # of the backend: a closed connection, its time-out
            cause = str(error).strip().splitlines()[0].partition(". ")[0]
            raise RankError(
                f"rank {self.rank} has ended, or does not answer ({cause}). Its own error, if it had one, is in its "
                "output. Start all ranks again, from the last checkpoint.") from error


def _dense(tensor: Tensor) -> Tensor:
    """A tensor without gaps, in whatever order of dimensions."""
    whole = tensor.is_contiguous() or (tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last))
    return tensor if whole else tensor.contiguous()


def check_backend(group: dist.ProcessGroup | None) -> None:
    """Raise UnsupportedError where a group cannot carry what lies in main memory."""
    backend = dist.get_backend_config(group)
    if "gloo" not in backend and "mpi" not in backend:
        raise UnsupportedError(
            f"the process group's backend is '{backend}', which sends tensors on GPUs only; sizes and targets lie in "
            "main memory. Call torch.distributed.init_process_group('cpu:gloo,cuda:nccl').")
