"""Runs a program of the policy under limits: `python -I -S sandbox.py LIMITS PYTHON FILE`, LIMITS in JSON.

Guarded, by the kernel: processor time, address space, size of files, open files, core dumps, and the network unless
LIMITS permits it (an own network namespace without any device). Not guarded: the program reads whatever this user may
read, and writes files where this user may write; it may start processes, which the caller kills with its group.
"""

import ctypes
import json
import os
import resource
import sys

CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
NO_NETWORK = 97
"""Exit code: this host does not permit network namespaces."""


def main() -> None:
    limits = json.loads(sys.argv[1])
    if not limits["network"] and ctypes.CDLL(None).unshare(CLONE_NEWUSER | CLONE_NEWNET) != 0:
        sys.exit(NO_NETWORK)
    for name, limit in (
        ("RLIMIT_CPU", limits["cpu_s"]),
        ("RLIMIT_AS", limits["memory"]),
        ("RLIMIT_FSIZE", limits["file"]),
        ("RLIMIT_NOFILE", 64),
        ("RLIMIT_CORE", 0),
    ):
        resource.setrlimit(getattr(resource, name), (limit, limit))
    os.execve(sys.argv[2], [sys.argv[2], "-I", sys.argv[3]], {"PATH": "/usr/bin:/bin", "PYTHONDONTWRITEBYTECODE": "1"})


if __name__ == "__main__":
    main()
