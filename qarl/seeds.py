"""Seeds for every draw of a run, derived from the one seed in the config."""

import hashlib


def derive_seed(seed: int, *names: object) -> int:
    """A 31-bit seed that depends on `seed` and all `names`, the same on every machine."""
    text = "|".join(map(str, (seed, *names)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big") >> 1
