"""Groups of ranks, forked from a process that has loaded torch: starting torchrun takes seconds."""

from __future__ import annotations

import datetime
import os
import pickle
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

from pipeline.training import distributed
from pipeline.training.distributed import join
from tests.support.commands import CONTEXT, SECONDS_UNTIL_HUNG


class Rendezvous:
    """The store that torchrun's agent keeps."""

    def __init__(self) -> None:
        self._store = torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)

    def variables(self, rank: int, world_size: int) -> dict[str, str]:
        """The environment that torchrun gives a rank."""
        place = {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)}
        address = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(self._store.port)}
        return {**place, **address, "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}


def on_ranks(world_size: int, work: Callable[..., Any], *arguments: Any, seconds: float = 60) -> list[Any]:
    """Call `work(group, *arguments)` on every rank, and return what each returned or raised.

    Args:
        world_size: Number of ranks.
        work: A function of a module.
        arguments: What can be pickled.
        seconds: Time limit of an operation of all ranks.
    """
    rendezvous, ranks = Rendezvous(), []
    for rank in range(world_size):
        ours, theirs = CONTEXT.Pipe(duplex=False)
        process = CONTEXT.Process(
            target=_run, args=(theirs, rendezvous.variables(rank, world_size), work, arguments, seconds), daemon=True
        )
        process.start()
        theirs.close()
        ranks.append((process, ours))
    results = []
    for process, connection in ranks:
        assert connection.poll(SECONDS_UNTIL_HUNG), "a rank hangs"
        results.append(pickle.loads(connection.recv_bytes()))
        process.join()
    return results


def _run(
    connection: Connection,
    environment: dict[str, str],
    work: Callable[..., Any],
    arguments: tuple[Any, ...],
    seconds: float,
) -> None:
    """What a rank does."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    distributed.TIMEOUT = datetime.timedelta(seconds=seconds)
    try:
        with join(torch.device("cpu")) as group:
            result = work(group, *arguments)
    except Exception as error:
        result = error
    # Not `send`, which would share tensors' memory with a process that ends.
    connection.send_bytes(pickle.dumps(result))
