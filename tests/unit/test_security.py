"""Files from elsewhere run no code, wherever one is read."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import distributed
from transformers import AutoConfig, AutoModelForCausalLM

from launch.demo.tiny_model import make_tokenizer
from qarl.errors import CheckpointError, DataError, ModelError
from qarl.model_folder import check_folder
from trainer.batches import batch_file, load_batch
from trainer.deepspeed_files import TAG, checkpoint_weights, plain_data_only, saved_ranks, universal_copy


class Hostile:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.folder),)


@pytest.fixture
def hostile(tmp_path: Path) -> Hostile:
    return Hostile(tmp_path / "it-ran")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model of one layer, with weights that torch has pickled."""
    folder = tmp_path / "model"
    make_tokenizer(64).save_pretrained(folder)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = AutoConfig.for_model("qwen3", num_hidden_layers=1, vocab_size=64, head_dim=32, **sizes)
    model = AutoModelForCausalLM.from_config(config)
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return folder


def test_the_fixture_is_hostile(hostile: Hostile, tmp_path: Path) -> None:
    torch.save({"module": hostile}, tmp_path / "file")
    torch.load(tmp_path / "file", weights_only=False)
    assert hostile.folder.exists()


def test_weights_of_a_model(model: Path, hostile: Hostile) -> None:
    check_folder(model)
    weights = torch.load(model / "pytorch_model.bin", weights_only=True)
    torch.save({**weights, "lm_head.weight": hostile}, model / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin"):
        check_folder(model)
    assert not hostile.folder.exists()


def test_python_of_a_model(model: Path, hostile: Hostile) -> None:
    (model / "mine.py").write_text(f"import os\nos.mkdir({str(hostile.folder)!r})\n")
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}}
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError):
        check_folder(model)
    assert not hostile.folder.exists()


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_a_checkpoint_that_is_exported(zero_stage: int, hostile: Hostile, tmp_path: Path) -> None:
    folder = tmp_path / "learner"
    folder.mkdir()
    for name in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt"):
        torch.save({"module": hostile}, folder / name)
    torch.save({"optimizer_state_dict": hostile}, folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    with pytest.raises(CheckpointError):
        checkpoint_weights(str(tmp_path), zero_stage)
    assert not hostile.folder.exists()


@pytest.fixture
def process_group() -> Iterator[None]:
    """A group of one process: another test's engine has made it, or this fixture does."""
    if distributed.is_initialized():
        yield
        return
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_a_checkpoint_that_is_cut_for_other_ranks(hostile: Hostile, tmp_path: Path) -> None:
    folder = tmp_path / "step_000001" / "learner"
    (folder / TAG).mkdir(parents=True)
    for name in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"):
        torch.save({"module": hostile}, folder / TAG / name)
    assert saved_ranks(str(folder)) == 1
    message = r"cannot be cut for another number of ranks: .* learner\.num_ranks=1"
    with pytest.raises(CheckpointError, match=message), universal_copy(str(folder), 0):
        pass
    assert not hostile.folder.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["step_000001"]


def test_a_checkpoint_that_deepspeed_loads(hostile: Hostile, tmp_path: Path) -> None:
    """It asks for any pickle. Its own files have three classes that are no tensors."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    torch.save({"module": hostile}, tmp_path / "hostile")
    good = {
        "module": fragment_address(numel=3, start=1),
        "zero_stage": ZeroStageEnum.weights,
        "loss_scaler": LossScaler(scale=2.0),
    }
    torch.save(good, tmp_path / "good")
    with plain_data_only():
        with pytest.raises(pickle.UnpicklingError):
            torch.load(tmp_path / "hostile", weights_only=False)
        loaded = torch.load(tmp_path / "good", weights_only=False)
    assert loaded["module"].numel == 3
    assert loaded["zero_stage"] is ZeroStageEnum.weights
    assert loaded["loss_scaler"].cur_scale == 2.0
    assert not hostile.folder.exists()
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


def test_saved_batches(hostile: Hostile, tmp_path: Path) -> None:
    file = batch_file(tmp_path, 1)
    np.savez(file, advantage=np.array([hostile], dtype=object))
    with pytest.raises(DataError):
        load_batch(file)
    assert not hostile.folder.exists()
