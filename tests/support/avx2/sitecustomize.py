"""Limits a process, and all that it starts, to AVX2: `PYTHONPATH=tests/support/avx2 .venv/bin/pytest tests`.

Python imports a module of this name at its start. vLLM, torch, oneDNN and MKL then take the kernels that they take on a
processor with AVX2 alone, so that those can be tested on a newer one. Its caches stay: some kernels block by them.
"""

import os
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

os.environ |= {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}

MISSING = ("avx512", "avx512_bf16", "vnni", "amx_tile", "amx_fp16")


class _TorchCpu(MetaPathFinder):
    """`torch.cpu` as it is, but for what it says of the processor."""

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != "torch.cpu":
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        assert spec is not None
        assert spec.loader is not None
        load = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            load(module)
            for name in MISSING:
                setattr(module, f"_is_{name}_supported", lambda: False)
            parts = dict(module.get_capabilities())
            module.get_capabilities = lambda: parts | dict.fromkeys(parts.keys() & MISSING, False)  # type: ignore[attr-defined]

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, _TorchCpu())
