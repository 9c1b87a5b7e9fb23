"""The house rules that a tool can check: who imports whom, how long things are, what pickles."""

from __future__ import annotations

import ast
import importlib
import pickle
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from qarl.errors import QarlError

ROOT = Path(__file__).parents[2]
PACKAGES = ("qarl", "rollout", "trainer", "rewards", "launch")
MAY_IMPORT = {
    "qarl": {"qarl"},
    "rollout": {"rollout", "qarl"},
    "trainer": {"trainer", "qarl"},
    "rewards": {"rewards", "qarl"},
    "launch": {*PACKAGES, "configs"},
}
IMPORTERS = {
    "vllm": {
        "qarl/numerics/engine_ops.py",
        "qarl/numerics/vllm_patch.py",
        "rollout/engine.py",
        "rollout/loader.py",
        "rollout/read_back.py",
        "rollout/shard.py",
        "rollout/stock.py",
        "rollout/receive.py",
        "rollout/send.py",
    },
    "deepspeed": {"trainer/learner.py", "trainer/deepspeed_files.py"},
}
IMPORTERS_OF_PARTS = {
    "launch/tools": {"launch/dry_run.py"},
    "launch/demo": {
        "launch/preflight.py",
        "launch/run/prompts.py",
        "launch/train.py",
        "launch/tools/bench/publish.py",
        "launch/tools/mismatch/measure.py",
    },
}
"""Who imports these parts of `launch`, besides themselves and the commands."""
TESTS_OF_SEVERAL = {
    "launch/cluster/test_launch_files.py": "slurm.sbatch, cluster.yaml, kuberay.yaml and the Dockerfile",
    "launch/cluster/test_ray_messages.py": "a part of connect.py, with a Ray of its own",
    "launch/cluster/test_scripts.py": "ray_cluster.sh and the other scripts",
    "launch/tools/bench/test_bench.py": "compare, kernels, learner and publish: their tables",
    "launch/tools/plan/test_plan.py": "command and planner: whole plans",
    "qarl/config/test_config.py": "io and the sections of the config",
    "qarl/objectives/test_bad_input.py": "every objective",
    "qarl/objectives/test_clip_metrics.py": "every objective that clips",
    "qarl/objectives/test_library.py": "every objective against one reference",
    "qarl/objectives/test_objective_config.py": "qarl/config/objective.py with the registry",
    "qarl/objectives/test_published.py": "the published equations",
    "qarl/objectives/test_special_cases.py": "objectives that are equal in special cases",
    "qarl/prompts/test_pool_golden.py": "pool.py: recorded draws",
    "qarl/prompts/test_pool_machine.py": "pool.py: a model of it, any history",
    "qarl/quant/test_aligned_linear.py": "linear, kernels and formats",
    "qarl/quant/test_modules.py": "every format in a model",
    "qarl/tasks/test_tasks.py": "every kind of task",
    "rewards/environments/test_docs.py": "the blocks of docs/environments.md",
    "rewards/test_rewards.py": "exact and the service",
    "rollout/test_engine_load.py": "engine.py without vLLM",
    "rollout/test_transfer.py": "send and receive",
    "trainer/test_micro_batches.py": "policy.py and learner.py: no dependence on the token budget",
    "rollout/test_interleavings.py": "fleet, dispatch, worker and engine: at any timing and with any deaths",
    "trainer/test_staleness.py": "collect and loop: sampling ahead of learning, at any timing",
}
"""Unit tests that are not of one module, and what they test."""
HEAVY = ("ray", "vllm", "deepspeed", "wandb")
LIGHT_MODULES = (
    "qarl.config.run",
    "qarl.config.io",
    "qarl.types",
    "qarl.errors",
    "qarl.protocols",
    "qarl.prompts.pool",
    "qarl.tasks",
    "qarl.model_folder",
    "trainer.loop",
    "launch.early",
    "launch.run.folder",
)
BROAD_EXCEPTS = {
    "launch/cluster/connect.py": "Ray raises plain Exception; other types are raised again",
    "launch/run/tracking.py": "the user's tracker",
    "qarl/hooks.py": "the user's module",
    "qarl/logs.py": "logs the error, and raises it again",
    "qarl/model_folder.py": "tokenizers raises plain Exception",
    "qarl/tasks/custom.py": "the user's task",
    "rewards/child.py": "the user's verifier, in its own process",
    "rewards/environments/child.py": "the user's environment, in its own process",
    "rewards/math_answer.py": "the LaTeX grammar raises plain Exception",
    "rewards/teacher.py": "a thread hands the error to the main thread",
}
"""Files that may catch Exception or BaseException, and whose errors these are."""
OF_OTHER_PACKAGES = {"rewards.environments.from_verifiers"}
"""Modules that need a package which qarl does not install."""
FLOORS = (
    {"types", "errors", "metrics", "seeds", "logs", "trace"},
    {"numerics", "weights", "remote", "hooks", "model_folder"},
    {"quant"},
    {"config"},
    {"tasks", "objectives", "advantages", "mismatch", "error_tokens"},
    {"prompts"},
    {"protocols"},
)
"""Rooms of `qarl`, lowest first: a room imports only rooms of lower floors."""
FILES = sorted(file for package in PACKAGES for file in (ROOT / package).glob("**/*.py"))
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60


def name(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def imported(file: Path) -> set[str]:
    """Top-level names of everything that `file` imports, at its top or later."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name(file)}:{node.lineno}: a relative import"
            found.add(str(node.module).partition(".")[0])
    return found


def imported_modules(code: str) -> set[str]:
    """Modules that `code` imports; in `from a import b`, where `b` may be one, also "a.b"."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("file", sorted((ROOT / "tests").glob("**/test_*.py")), ids=name)
def test_helpers_of_tests_lie_in_support(file: Path) -> None:
    modules = {str(n.module) for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.ImportFrom)}
    assert {module for module in modules if ".test_" in module} == set()


def modules(package: str) -> Iterator[str]:
    yield package
    path = importlib.import_module(package).__path__
    yield from (module.name for module in pkgutil.walk_packages(path, f"{package}."))


def loaded_by(*imports: str) -> set[str]:
    """Top-level modules in a fresh interpreter after `imports`."""
    code = f"import sys, {', '.join(imports)}\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    return set(done.stdout.split())


@pytest.mark.parametrize("file", FILES, ids=name)
def test_imports_go_one_way(file: Path) -> None:
    package = name(file).partition("/")[0]
    assert imported(file) & {*PACKAGES, "configs", "tests"} <= MAY_IMPORT[package]


def room(path: str) -> str:
    """The folder or file of `qarl` that "qarl/quant/linear.py" or "qarl.quant.linear" lies in: "quant"."""
    return path.replace("/", ".").split(".")[1]


@pytest.mark.parametrize("file", [file for file in FILES if name(file).startswith("qarl/")], ids=name)
def test_no_import_inside_qarl_climbs(file: Path) -> None:
    floor = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
    own = room(name(file))
    if own == "__init__":
        return
    rooms = {room(module) for module in imported_modules(file.read_text()) if module.startswith("qarl.")}
    assert {other for other in rooms - {own} if floor[other] >= floor[own]} == set()


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("import qarl.config.run", {"config"}),
        ("import os, qarl.quant as q", {"quant"}),
        ("from qarl import config, types", {"config", "types"}),
        ("from qarl.quant.int8 import quantize", {"quant"}),
        ("import qarl", set()),
    ],
)
def test_every_form_of_import_is_seen(line: str, found: set[str]) -> None:
    assert {room(module) for module in imported_modules(line) if module.startswith("qarl.")} == found


@pytest.mark.parametrize("part", IMPORTERS_OF_PARTS)
def test_tools_and_demo_have_their_importers(part: str) -> None:
    """docs/architecture.md says why; a command imports both when it runs."""
    package, own = part.replace("/", "."), (f"{part}/", "launch/commands/")
    users = {name(file) for file in FILES if any(m.startswith(package) for m in imported_modules(file.read_text()))}
    assert {user for user in users if not user.startswith(own)} == IMPORTERS_OF_PARTS[part]


def test_plans_know_nothing_of_simulations() -> None:
    """Simulations take their speeds from plans; the command joins the two."""
    found = {name(file): imported_modules(file.read_text()) for file in FILES}
    of_plans = {
        module for file, modules in found.items() if file.startswith("launch/tools/plan/") for module in modules
    }
    assert of_plans
    assert {module for module in of_plans if module.startswith("launch.tools.simulate")} == set()


def test_unit_tests_mirror_the_tree() -> None:
    """`qarl/quant/int8.py` has its tests in `tests/unit/qarl/quant/test_int8.py`."""
    folder = ROOT / "tests" / "unit"
    found = {file.relative_to(folder).as_posix() for file in folder.glob("*/**/test_*.py")}
    others = {test for test in found if not (ROOT / test.replace("/test_", "/")).is_file()}
    assert others == TESTS_OF_SEVERAL.keys()


@pytest.mark.parametrize("library", IMPORTERS)
def test_library_has_its_files(library: str) -> None:
    assert {name(file) for file in FILES if library in imported(file)} == IMPORTERS[library]


def test_qarl_names_no_process_or_tracking_library() -> None:
    """But for Ray in one file, which trainer and rollout share; it imports Ray in its functions."""
    names = {name(file): imported(file) & {"ray", "deepspeed", "wandb"} for file in FILES}
    found = {file: libraries for file, libraries in names.items() if libraries and file.startswith("qarl/")}
    assert found == {"qarl/remote.py": {"ray"}}


def test_config_and_pool_load_without_torch() -> None:
    loaded = loaded_by(*LIGHT_MODULES)
    assert "qarl" in loaded
    assert not loaded & {*HEAVY, "torch", "transformers"}


def test_all_of_qarl_loads_without_its_partners() -> None:
    loaded = loaded_by(*modules("qarl"))
    assert "torch" in loaded
    assert not loaded & set(HEAVY)


def test_the_aligned_forward_needs_torch_and_transformers_only() -> None:
    """What a machine without the partners can do: train an aligned model in portable numerics."""
    code = f"""
import sys
sys.modules.update(dict.fromkeys({HEAVY}))  # None: importing it fails
import {", ".join([*modules("qarl.quant"), *modules("qarl.numerics")])}
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from qarl.numerics.flat import flat_rows
from qarl.numerics.layers import BatchLayout, hidden_states
sizes = dict(hidden_size=32, intermediate_size=64, num_attention_heads=2, num_key_value_heads=1, head_dim=16)
config = AutoConfig.for_model("qwen3", num_hidden_layers=1, vocab_size=32, **sizes)
for scheme in (qarl.quant.scheme.QuantScheme(), qarl.quant.scheme.QuantScheme("w4a16", group_size=32)):
    model = AutoModelForCausalLM.from_config(config).bfloat16()
    assert len(qarl.quant.linear.align_linears(model, scheme)) == 7
    qarl.numerics.profile.apply_profile(model, "portable", torch.device("cpu"))
    layout = BatchLayout(flat_rows([(0, 1, 2), (0, 1, 2)], [4, 5]), paged=False)
    out = hidden_states(model.model, torch.arange(12), layout)
    model.lm_head(out).float().square().mean().backward()
    grads = [parameter.grad for parameter in model.parameters()]
    assert all(grad.isfinite().all() and grad.any() for grad in grads)
print(sorted(name for name in {HEAVY} if sys.modules[name]))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stderr[-2000:]


@pytest.mark.parametrize("file", FILES, ids=name)
def test_files_and_functions_are_short(file: Path) -> None:
    text = file.read_text()
    assert len(text.splitlines()) < MAX_FILE_LINES
    functions = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    lengths = {f"{f.name}:{f.lineno}": (f.end_lineno or f.lineno) - f.lineno + 1 for f in functions}
    assert {name: length for name, length in lengths.items() if length > MAX_FUNCTION_LINES} == {}


def test_no_except_is_broad_without_a_reason() -> None:
    found = set()
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ExceptHandler):
                kinds = {n.id for n in ast.walk(node.type) if isinstance(n, ast.Name)} if node.type else {"Exception"}
                found |= {name(file)} if kinds & {"Exception", "BaseException"} else set()
    assert found == BROAD_EXCEPTS.keys()


def subclasses(kind: type[QarlError]) -> Iterator[type[QarlError]]:
    yield kind
    for child in kind.__subclasses__():
        yield from subclasses(child)


def test_every_error_survives_the_trip_between_processes() -> None:
    for package in PACKAGES:
        for module in set(modules(package)) - OF_OTHER_PACKAGES:
            importlib.import_module(module)
    kinds = set(subclasses(QarlError))
    assert len(kinds) >= 11
    for kind in kinds:
        error = kind("a fact", "a place", "a hint")
        again = pickle.loads(pickle.dumps(error))
        assert type(again) is kind
        assert (again.what, again.where, again.hint) == ("a fact", "a place", "a hint")
        assert str(again) == str(error) == "a place: a fact; a hint"
        assert again.exit_code == error.exit_code


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (QarlError("fact"), "fact"),
        (QarlError("fact", "place"), "place: fact"),
        (QarlError("fact", hint="hint"), "fact; hint"),
    ],
)
def test_an_error_is_one_line(error: QarlError, line: str) -> None:
    assert str(error) == line


def test_deepspeeds_table_of_ops_is_where_the_learner_looks() -> None:
    """`trainer/learner.py` switches the compilation of one op off in this internal table."""
    source = (ROOT / "trainer/learner.py").read_text()
    assert 'deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False' in source
    code = "import deepspeed.ops; print(sorted(deepspeed.ops.__compatible_ops__))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert "'deepspeed_shm_comm'" in done.stdout
