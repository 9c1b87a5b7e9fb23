"""DeepSpeed's checkpoints as files: read as plain data only, and cut anew for another number of ranks."""

import os
import shutil
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from datetime import timedelta
from io import StringIO
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor, distributed

from qarl.errors import CheckpointError, first_line

TAG = "learner"
"""DeepSpeed's name for a checkpoint: the folder within the one that it is given."""
UNREADABLE = (OSError, ValueError, KeyError, RuntimeError, EOFError, UnpicklingError)
"""What torch and DeepSpeed raise for a damaged file."""
LONGEST_COPY = timedelta(days=1)
"""For which ranks wait while rank 0 copies a large checkpoint; NCCL's default is 10 minutes, gloo's 30."""
FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


def saved_ranks(directory: str) -> int:
    """Ranks that have written the checkpoint; 0 where it is not sharded, or there is none."""
    return len(list(Path(directory, TAG).glob("*_optim_states.pt")))


@contextmanager
def universal_copy(directory: str, rank: int) -> Iterator[str]:
    """The checkpoint as a universal one, which any number of ranks can load, until the end of the context.

    Rank 0 makes it, beside the checkpoint; all ranks enter and leave together.
    Raises CheckpointError: the checkpoint cannot be read, or its copy not be written.
    """
    folder = Path(directory)
    copy = folder.parent.with_name(f"{folder.parent.name}-universal.part")  # removed at a start, as any such folder
    ranks = distributed.new_group(timeout=LONGEST_COPY, backend="gloo")
    try:
        if rank == 0:
            shutil.rmtree(copy, ignore_errors=True)
            _to_universal(folder / TAG, copy / TAG)
        distributed.barrier(ranks)
        yield str(copy)
        distributed.barrier(ranks)
    finally:
        if rank == 0:
            shutil.rmtree(copy, ignore_errors=True)


def _to_universal(source: Path, target: Path) -> None:
    from deepspeed.checkpoint import ds_to_universal

    options = {"num_extract_workers": 1, "num_merge_workers": 1, "keep_temp_folder": False}
    options |= {"strict": True, "inject_missing_state": True}
    try:
        target.mkdir(parents=True)
        with plain_data_only(), redirect_stdout(StringIO()):  # DeepSpeed prints its progress
            ds_to_universal.main(Namespace(input_folder=str(source), output_folder=str(target), **options))
    except UNREADABLE as error:
        what = f"cannot be cut for another number of ranks: {first_line(error)}"
        hint = f"continue with as many as before: learner.num_ranks={saved_ranks(str(source.parent))}"
        raise CheckpointError(what, str(source), hint) from error


def checkpoint_weights(directory: str, zero_stage: int) -> dict[str, Tensor]:
    """The policy's parameters in a DeepSpeed checkpoint of any number of ranks, by name. Raises CheckpointError."""
    try:
        if zero_stage == 3:  # sharded; the whole ones exist as float32 masters only
            from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

            with plain_data_only(), redirect_stdout(StringIO()):  # DeepSpeed prints its progress
                weights: dict[str, Tensor] = get_fp32_state_dict_from_zero_checkpoint(directory, tag=TAG)
        else:
            file = Path(directory) / TAG / "mp_rank_00_model_states.pt"
            weights = torch.load(file, map_location="cpu", weights_only=True)["module"]
    except UNREADABLE as error:
        what = f"holds no whole DeepSpeed checkpoint: {error}"
        raise CheckpointError(what, directory, "run it again: a run drops old ones") from error
    return weights


@contextmanager
def plain_data_only() -> Iterator[None]:
    """Within, `torch.load` refuses a file that would run code: a checkpoint may come from elsewhere.

    DeepSpeed asks it to load any pickle. The environment overrules that; three classes of DeepSpeed's are plain data.
    """
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    before = os.environ.get(FORCE)
    os.environ[FORCE] = "1"
    try:
        with torch.serialization.safe_globals([fragment_address, LossScaler, ZeroStageEnum]):
            yield
    finally:
        os.environ.pop(FORCE)
        if before is not None:
            os.environ[FORCE] = before
