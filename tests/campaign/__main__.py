"""`python -m tests.campaign [AREA...]`: run every case of the areas, print what is not right, and the counts."""

from __future__ import annotations

import importlib
import sys
from collections import Counter
from pathlib import Path

import tests.conftest  # noqa: F401  # the environment, before torch is imported
from tests.campaign.harness import CLASSES, Case, answer, site


def areas() -> list[str]:
    """The names of the files with cases, without `_cases`."""
    return sorted(file.stem.removesuffix("_cases") for file in Path(__file__).parent.glob("*_cases.py"))


def cases_of(area: str) -> list[Case]:
    cases: list[Case] = importlib.import_module(f"tests.campaign.{area}_cases").CASES
    return cases


def main(chosen: list[str]) -> int:
    counts: dict[str, Counter[str]] = {}
    with site() as good:
        for area in chosen or areas():
            for case in cases_of(area):
                found = answer(case, good)
                counts.setdefault(f"{area}: {case.kind}", Counter())[found.verdict] += 1
                if found.verdict != "right":
                    print(found, flush=True)
    total = sum(counts.values(), Counter[str]())
    width = max(map(len, counts))
    print(f"\n{'':{width}s} " + " ".join(f"{name:>9s}" for name in CLASSES))
    for title, found_counts in [*counts.items(), (f"all {total.total()}", total)]:
        print(f"{title:{width}s} " + " ".join(f"{found_counts[name]:9d}" for name in CLASSES))
    return int(total["right"] < total.total())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
