#!/usr/bin/env bash
# Usage: launch/lock.sh
# Writes requirements/cpu.txt and requirements/gpu.txt: the exact version of every package that `launch/setup.sh`
# installs. Run it after a change of the dependencies in pyproject.toml, and commit both files. It installs nothing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=.venv/bin/python
[ -x "$python" ] || { echo "lock: run 'make setup' first" >&2; exit 1; }

for extra in cpu gpu; do
    report=$(mktemp)
    trap 'rm -f "$report"' EXIT
    echo "lock: resolving the '$extra' packages"
    "$python" -m pip install --quiet --dry-run --ignore-installed --report "$report" ".[$extra,dev]"
    "$python" - "$report" "$extra" >"requirements/$extra.txt" <<'PYTHON'
import json
import sys

packages = [item["metadata"] for item in json.load(open(sys.argv[1]))["install"]]
# A local version such as torch's +cpu depends on where the package comes from: left out, it matches either.
pins = {p["name"].lower().replace("_", "-"): p["version"].partition("+")[0] for p in packages if p["name"] != "qarl"}
print(f"# Made by launch/lock.sh: every version of the '{sys.argv[2]}' extra. Do not edit.")
for name, version in sorted(pins.items()):
    print(f"{name}=={version}")
PYTHON
done
