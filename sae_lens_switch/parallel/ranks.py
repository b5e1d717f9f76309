"""The processes of a parallel run: which latents and which data are each one's, and what they tell each other.

Letters: W processes (ranks) in all, P of them in each row, which together has all latents once.
"""

import os
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

T = TypeVar("T")

# Host and device tensors each have their own library of collectives within one process group.
_BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}

# RuntimeErrors of this process alone, also where they are raised within a message.
_LOCAL = (torch.OutOfMemoryError, NotImplementedError, RecursionError)


class RankLostError(Exception):
    """Another process of the run has died, or has not answered within the time allowed."""


def start_process_group(device: str | torch.device, timeout: float) -> bool:
    """Join the processes that torchrun has started, unless the script already has.

    Args:
        device: What this process computes on, as in ``local_device``; a GPU becomes its current device.
        timeout: Seconds after which a process that does not answer counts as lost.

    Returns:
        Whether a process group was started here; ``torch.distributed.destroy_process_group`` ends it.

    Raises:
        ValueError: If this process was not started by torchrun, or the device has no collectives.
    """
    device = torch.device(local_device(device))
    if device.type not in _BACKENDS:
        raise ValueError(f"device must be one of {', '.join(_BACKENDS)} in a parallel run; got {str(device)!r}")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if dist.is_initialized():
        return False
    missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ValueError(
            "a parallel run (expert_parallel, latent_parallel) must be started by torchrun, e.g. torchrun "
            f"--nproc-per-node 2 script.py; the environment lacks {', '.join(missing)}"
        )
    _initialize(_BACKENDS[device.type], timedelta(seconds=timeout))
    return True


def _initialize(backend: str, timeout: timedelta) -> None:
    env = os.environ
    if env.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or env.get("GROUP_WORLD_SIZE") != "1":
        dist.init_process_group(backend, timeout=timeout)
        return
    # torch 2.13 restarts processes on the store of those that failed, whose addresses are still in it.
    address = env["MASTER_ADDR"], int(env["MASTER_PORT"])
    store = dist.TCPStore(*address, timeout=timeout)  # pyright: ignore[reportPrivateImportUsage]
    attempt = f"restart {env.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    store = dist.PrefixStore(attempt, store)  # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group(
        backend, store=store, rank=int(env["RANK"]), world_size=int(env["WORLD_SIZE"]), timeout=timeout
    )


def n_processes() -> int:
    """Of the group that was joined."""
    return dist.get_world_size()


def leave_process_group() -> None:
    """At the end of a run, on every process."""
    if dist.is_initialized():
        dist.destroy_process_group()


def local_device(device: str | torch.device) -> str:
    """ "cuda" as the GPU of this process, by torchrun's LOCAL_RANK; any other device as it is."""
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if str(device) == "cuda" else str(device)


class Ranks:
    """This process's place in the run, and the collectives of its groups.

    The processes form a mesh ("data", "latent"): each row of it holds all latents once, P processes with F / P each;
    the rows hold the same latents and train on different data.

    Args:
        row_size: P.
        device: What this process computes on, as in ``local_device``.
        timeout: Seconds that a message of a row or column may take.
        field: What P is called in the config.

    Attributes:
        rank: Of W.
        size: W.
        row_rank: Place in the row, of P.
        n_rows: W / P.
        bytes_sent: Bytes that this process has handed to the network, by kind of message.
        seconds_waited: Seconds that it has spent in messages.

    Raises:
        ValueError: If P does not divide W.
    """

    def __init__(
        self, row_size: int, device: str | torch.device, timeout: float, field: str = "expert_parallel"
    ) -> None:
        self.device = torch.device(local_device(device))
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.row_size = row_size
        if self.size % row_size:
            raise ValueError(f"{field} must divide the number of processes, {self.size}; got {row_size}")
        self.n_rows = self.size // row_size
        places = torch.arange(self.size).view(self.n_rows, row_size)
        # Not by init_device_mesh, whose groups would wait as long as torch thinks right.
        self._row_group, self._data_group = (_own_group(t.tolist(), timeout) for t in (places, places.T))
        self.mesh = DeviceMesh.from_group(
            [self._data_group, self._row_group], self.device.type, places, mesh_dim_names=("data", "latent")
        )
        self.data_rank, self.row_rank = divmod(self.rank, row_size)
        self.bytes_sent: Counter[str] = Counter()
        self.seconds_waited = 0.0

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def row(self) -> list[int]:
        """The ranks that share all latents with this one, itself among them."""
        first = self.data_rank * self.row_size
        return list(range(first, first + self.row_size))

    @property
    def column(self) -> list[int]:
        """The ranks that hold the same latents as this one, itself among them."""
        return list(range(self.row_rank, self.size, self.row_size))

    # Tensors; each result has the same bits on every process that takes part

    def gather(self, t: Tensor, what: str) -> Tensor:
        """Everybody's ``t``, [W, ...]."""
        return self._gather(t, self.size, None, what)

    def gather_row(self, t: Tensor, what: str) -> Tensor:
        """``t`` of the processes of this row, [P, ...]."""
        return self._gather(t, self.row_size, self._row_group, what)

    def gather_column(self, t: Tensor, what: str) -> Tensor:
        """``t`` of the processes that hold the same latents, [W / P, ...]."""
        return self._gather(t, self.n_rows, self._data_group, what)

    def _gather(self, t: Tensor, n: int, group: dist.ProcessGroup | None, what: str) -> Tensor:
        if n == 1:
            return t.unsqueeze(0)
        everybodys = t.new_empty(n, *t.shape)
        with self.heard(what, (n - 1) * t.nbytes):
            dist.all_gather_into_tensor(everybodys.view(-1), t.contiguous().view(-1), group=group)
        return everybodys

    def gather_rows(self, t_BD: Tensor, what: str) -> Tensor:
        """Everybody's rows, of which each may have another number, in the order of the ranks."""
        sizes = self.gather_objects(len(t_BD))
        padded_BD = t_BD.new_zeros(max(sizes), *t_BD.shape[1:])
        padded_BD[: len(t_BD)] = t_BD
        everybodys = self.gather(padded_BD, what)
        return torch.cat([part[:n] for part, n in zip(everybodys, sizes, strict=True)])

    def sum_(self, t: Tensor, what: str) -> Tensor:
        """The sum of everybody's ``t``, in place."""
        return self._sum_(t, self.size, None, what)

    def sum_over_data_(self, t: Tensor, what: str) -> Tensor:
        """The sum over the processes that hold the same latents, in place."""
        return self._sum_(t, self.n_rows, self._data_group, what)

    def _sum_(self, t: Tensor, n: int, group: dist.ProcessGroup | None, what: str) -> Tensor:
        if n > 1:
            with self.heard(what, 2 * (n - 1) * t.nbytes // n):  # of a ring
                dist.all_reduce(t, group=group)
        return t

    def exchange(self, rows_BD: Tensor, to: list[int], received: list[int], what: str) -> Tensor:
        """Rows from and to every process of this row: the first ``to[0]`` go to its first, and so on."""
        out = rows_BD.new_empty(sum(received), *rows_BD.shape[1:])
        elsewhere = (sum(to) - to[self.row_rank]) * rows_BD[:1].nbytes if len(rows_BD) else 0
        with self.heard(what, elsewhere):
            dist.all_to_all_single(out, rows_BD.contiguous(), received, to, group=self._row_group)
        return out

    def broadcast_(self, t: Tensor, what: str) -> None:
        """``t`` of the first process for all, in place."""
        self._broadcast_(t, 0, self.size, None, what)

    def broadcast_over_data_(self, t: Tensor, what: str) -> None:
        """``t`` of the process of the first row for all that hold the same latents, in place."""
        self._broadcast_(t, self.row_rank, self.n_rows, self._data_group, what)

    def _broadcast_(self, t: Tensor, source: int, n: int, group: dist.ProcessGroup | None, what: str) -> None:
        if n > 1:
            with self.heard(what, (n - 1) * t.nbytes if self.rank == source else 0):
                dist.broadcast(t, src=source, group=group)

    def __deepcopy__(self, _: dict[int, object]) -> "Ranks":
        return self

    # Python objects, of the host

    def gather_objects(self, value: T) -> list[T]:
        """Everybody's ``value``, on every process."""
        everybodys: list[T | None] = [None] * self.size
        with self.heard("a message"):
            dist.all_gather_object(everybodys, value)
        return everybodys  # type: ignore[return-value]

    def first_says(self, value: T) -> T:
        """The first process's ``value``."""
        return self.gather_objects(value)[0]

    @contextmanager
    def heard(self, what: str, n_bytes: int = 0) -> Iterator[None]:
        """Turn what the collectives raise when a process is gone into a RankLostError; what is amiss here stays."""
        self.bytes_sent[what] += n_bytes
        began = time.perf_counter()
        try:
            yield
        except _LOCAL:
            raise
        except RuntimeError as error:
            reason = str(error).strip().split("\n")[0]
            raise RankLostError(
                f"rank {self.rank} of {self.size} has lost another one, during {what}: it has died, or not answered "
                f"in time ({reason}). Training stops here; the last checkpoint is whole: resume='latest' continues "
                "from it"
            ) from error
        finally:
            self.seconds_waited += time.perf_counter() - began


def _own_group(groups: list[list[int]], timeout: float) -> dist.ProcessGroup:
    """The one of these groups that this process is in; all processes must take part."""
    group, _ = dist.new_subgroups_by_enumeration(groups, timeout=timedelta(seconds=timeout))
    assert isinstance(group, dist.ProcessGroup)
    return group
