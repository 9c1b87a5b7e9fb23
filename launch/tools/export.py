"""`qarl export`: a run's newest checkpoint as a model folder, proven with vLLM before it gets its name.

This part is free of torch: what is wrong with the arguments or the run shows at once. `exported.py` does the work.
"""

from pathlib import Path

from launch.early import check_new
from launch.run.resume import config_of_run
from qarl.config.schedule import scheme_at
from qarl.errors import CheckpointError, ConfigError
from qarl.model_folder import config_json
from qarl.quant.scheme import QuantScheme
from trainer.checkpoint import CheckpointStore


def export(run_dir: Path, out: Path, scheme: QuantScheme | None) -> str:
    """Write the newest checkpoint of `run_dir` to the new folder `out`, in `scheme` or that of its rollouts.

    Stock vLLM, given the folder, must sample the tokens and log-probs of a rollout worker, given the learner's tensors,
    bit for bit (on CPU both with the kernels of a run); else there is no folder. Returns a line for the user.

    Raises:
        ConfigError: `run_dir` is no run's, or `out` exists.
        ModelError: the model that the run began with is not at its path.
        PreflightError: vLLM has no kernel of the scheme here, or none for the model's experts.
        CheckpointError: the run has no whole checkpoint, or one of another model.
        PublicationError: the folder cannot be written, or vLLM cannot load it, or computes something else from it.
    """
    check_new(out)
    part = out.with_name(f"{out.name}.unproven")
    if part.exists():
        raise ConfigError(f"{part} exists: another export is at work, or was killed", hint="remove it")
    config = config_of_run(run_dir)
    found = CheckpointStore(run_dir / "checkpoints", config.train.keep_checkpoints).latest(print)
    if found is None:
        raise CheckpointError("the run has no checkpoint yet", str(run_dir), "see train.checkpoint_every")
    directory, state = found
    step = max(1, state["step"])
    of_run = scheme_at(config.rollout, step)
    scheme = of_run if scheme is None else QuantScheme.of(scheme.name, config.rollout.ignore, scheme.group_size)
    config_json(Path(config.model.path), "start this where the run was started")
    from launch.tools.exported import write_proven  # late: it imports torch

    write_proven(config, directory, scheme, part, out)
    return f"{out}: step {step} in {scheme.label}; vLLM samples from it what a rollout worker samples, bit for bit"
