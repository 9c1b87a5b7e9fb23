"""Ray's token, which admits to a cluster, from where Ray looks for it. Imports nothing heavy."""

import os
from pathlib import Path


def token_file() -> Path:
    """Where the token lies unless RAY_AUTH_TOKEN has it."""
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")


def read_token() -> str:
    """Empty for none."""
    if token := os.environ.get("RAY_AUTH_TOKEN"):
        return token
    return token_file().read_text().strip() if token_file().is_file() else ""
