"""How learner ranks find each other: torch.distributed at one address, and nothing that listens elsewhere."""

import os
import socket

from torch import distributed

from qarl.errors import ResourceError, first_line

LOOPBACK = "127.0.0.1"


def set_environment(rank: int, world_size: int, master: str) -> None:
    """For torch.distributed and DeepSpeed; `master` is rank 0's "host:port"."""
    host, _, port = master.rpartition(":")
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_RANK="0",  # Ray shows each rank its own devices only
        LOCAL_SIZE="1",
        MASTER_ADDR=host,
        MASTER_PORT=port,
    )
    if host == LOOPBACK:  # else they would listen where this machine's name points to
        os.environ.update(GLOO_SOCKET_IFNAME="lo", NCCL_SOCKET_IFNAME="lo")


def join_ranks(device: str) -> None:
    """Start torch.distributed, once. Raises ResourceError: the port is taken by now, or rank 0 does not answer."""
    if distributed.is_initialized():
        return
    rank, world_size, host, port = (os.environ[n] for n in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))
    is_master, backend = rank == "0", "nccl" if device == "cuda" else "gloo"
    try:
        # The store of torch itself would listen on every interface.
        listening = socket.create_server((host, int(port))).detach() if is_master else None
        store = distributed.TCPStore(host, int(port), int(world_size), is_master, master_listen_fd=listening)
        distributed.init_process_group(backend, store=store, rank=int(rank), world_size=int(world_size))
    except (OSError, distributed.DistNetworkError) as error:  # the port was free when it was chosen
        reason, hint = first_line(error), "the same command takes another port"
        raise ResourceError(f"the ranks cannot connect: {reason}", "", hint) from error
