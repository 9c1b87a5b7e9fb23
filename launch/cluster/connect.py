"""Joining a Ray cluster, or starting a Ray of our own."""

import socket

import ray
import torch
from ray.exceptions import AuthenticationError

from qarl.config.run import Config
from qarl.errors import ResourceError


def connect(config: Config) -> None:
    """Join the cluster at `cluster.address`, or start a Ray of our own that ends with this process; once.

    Raises ResourceError: no cluster answers, or it refuses this machine's token.
    """
    address = config.cluster.address
    if ray.is_initialized():
        return
    if address is None:
        # "local": without it Ray would join whatever cluster this machine already runs.
        gpus = torch.cuda.device_count()
        ray.init("local", num_gpus=gpus, include_dashboard=False, log_to_driver=False, logging_level="error")
        return
    try:
        _knock(address)
        ray.init(address, log_to_driver=False, logging_level="error")
    except AuthenticationError as error:
        what = "the cluster refused this machine's token"
        hint = "copy ~/.ray/auth_token from the head (mode 600), or set RAY_AUTH_TOKEN"
        raise ResourceError(what, f"cluster.address {address}", hint) from error
    except OSError as error:
        what = f"no Ray cluster answers at {address} ({error})"
        raise ResourceError(what, "cluster.address", "start one with launch/cluster/ray_cluster.sh head") from error


def _knock(address: str) -> None:
    """Raises OSError when nothing listens at host:port: Ray itself would wait for minutes."""
    host, _, port = address.rpartition(":")
    if host and port.isdigit():  # not "auto", nor Ray's own kind of address
        socket.create_connection((host, int(port)), timeout=5.0).close()
