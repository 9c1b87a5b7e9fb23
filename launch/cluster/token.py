"""Ray's token, which admits to a cluster, from where Ray looks for it. Imports nothing heavy."""

import os
from pathlib import Path


def token_file() -> Path:
    """Where the token lies unless RAY_AUTH_TOKEN has it."""
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")


def head_command() -> str:
    """What starts a head, and makes the token: the script of this installation, seen from the working directory."""
    return f"{os.path.relpath(Path(__file__).with_name('ray_cluster.sh'))} head"


def read_token() -> str:
    """Empty for none."""
    if token := os.environ.get("RAY_AUTH_TOKEN"):
        return token
    return token_file().read_text().strip() if token_file().is_file() else ""


def confine_own_ray() -> None:
    """A Ray of our own has no token, so it listens on the loopback alone. Call it before Ray is imported.

    Ray names its switch for that after two systems, but it works on all.
    """
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
