"""Weights on their way into the real engine: what goes wrong is caught, and the engine keeps what it held."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import rollout.loader
from qarl.config.policy import RolloutConfig
from qarl.errors import PublicationError, RolloutError
from qarl.quant.publish import checkpoint_tensors, publish
from qarl.weights.source import Bucket, Manifest, PublishedTensor, PublishedWeights, WeightSource
from qarl.weights.wire import in_buckets, pack, seal, to_torch
from rollout.engine import VLLMEngine
from rollout.read_back import _layer_of
from tests.support.real_engine import SCHEME, gap, perturbed, requests
from trainer.policy import Policy

UP_0, UP_1 = (f"model.layers.{layer}.mlp.up_proj.weight_scale" for layer in (0, 1))
DOWN, NORM = "model.layers.1.mlp.down_proj.weight", "model.layers.1.input_layernorm.weight"
Stream = Iterator[tuple[str, Tensor]]


@pytest.fixture(scope="module")
def policy(tiny_models: dict[str, Path]) -> Policy:
    return Policy(tiny_models["qwen3"], torch.bfloat16, SCHEME, "engine")


@pytest.fixture(scope="module")
def changed(policy: Policy) -> Policy:
    return perturbed(policy)


@pytest.fixture
def loaded(engine: VLLMEngine, policy: Policy) -> VLLMEngine:
    engine.load(publish(policy.model, SCHEME, 1))
    return engine


def refused(engine: VLLMEngine, policy: Policy, weights: WeightSource, reason: str) -> None:
    """`weights` are refused for `reason`, and the engine samples from version 1, the weights of `policy`, as before."""
    with pytest.raises(PublicationError, match=reason) as caught:
        engine.load(weights)
    assert caught.value.where == f"rollout worker 0, weights version {weights.manifest.version}"
    assert caught.value.hint == "version 1 is loaded again"
    assert engine.version == 1
    samples = engine.generate(requests(4, 20))
    assert {sample.version for sample in samples} == {1}
    assert gap(policy, samples).abs_max == 0.0


def swapped(tensors: Sequence[PublishedTensor]) -> list[PublishedTensor]:
    by_name = {tensor.name: tensor for tensor in tensors}
    data = {UP_0: by_name[UP_1].data, UP_1: by_name[UP_0].data}
    return [replace(tensor, data=data.get(tensor.name, tensor.data)) for tensor in tensors]


def flipped(tensors: Sequence[PublishedTensor]) -> list[PublishedTensor]:
    data = next(tensor for tensor in tensors if tensor.name == DOWN).data.copy()
    data[7, 11] ^= 1
    return [replace(tensor, data=data) if tensor.name == DOWN else tensor for tensor in tensors]


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (flipped, f"{DOWN} differs from its digest"),
        (swapped, f"{UP_0} differs from its digest"),
        (lambda tensors: [t for t in tensors if t.name != NORM], f"came where {NORM} was expected"),
        (lambda tensors: tensors[:-1], "lm_head.weight is missing"),
    ],
)
def test_damage_on_the_way_is_refused(
    loaded: VLLMEngine,
    policy: Policy,
    changed: Policy,
    damage: Callable[[Sequence[PublishedTensor]], Sequence[PublishedTensor]],
    reason: str,
) -> None:
    weights = publish(changed.model, SCHEME, 2)
    refused(loaded, policy, replace(weights, tensors=tuple(damage(weights.tensors))), reason)


def test_a_tensor_of_the_version_before_is_refused(loaded: VLLMEngine, policy: Policy, changed: Policy) -> None:
    old = {tensor.name: tensor for tensor in publish(policy.model, SCHEME, 1).tensors}
    weights = publish(changed.model, SCHEME, 2)
    mixed = tuple(old[NORM] if tensor.name == NORM else tensor for tensor in weights.tensors)
    refused(loaded, policy, replace(weights, tensors=mixed), f"{NORM} differs from its digest")


PARTS = {
    f"model.layers.1.{part}.": f"model.layers.1.{fused}"
    for part, fused in (
        ("self_attn.v_proj", "self_attn.qkv_proj"),
        ("self_attn.k_proj", "self_attn.qkv_proj"),
        ("mlp.up_proj", "mlp.gate_up_proj"),
    )
}


@pytest.mark.parametrize("part", PARTS)
def test_a_part_of_a_fused_layer_that_was_never_published_is_missed(
    loaded: VLLMEngine, policy: Policy, changed: Policy, part: str
) -> None:
    kept = [tensor for tensor in publish(changed.model, SCHEME, 2).tensors if not tensor.name.startswith(part)]
    refused(loaded, policy, seal(2, SCHEME.label, kept), f"the engine's {PARTS[part]} does not compute")


def test_a_layer_without_its_scale_is_refused(loaded: VLLMEngine, policy: Policy, changed: Policy) -> None:
    kept = [tensor for tensor in publish(changed.model, SCHEME, 2).tensors if tensor.name != f"{DOWN}_scale"]
    refused(loaded, policy, seal(2, SCHEME.label, kept), "KeyError: 'weight_scale'|does not compute")


@pytest.mark.parametrize("name", [NORM, "lm_head.weight", DOWN.removesuffix("weight")])
def test_a_layer_that_was_never_published_is_missed(
    loaded: VLLMEngine, policy: Policy, changed: Policy, name: str
) -> None:
    """The message is whole by its own manifest; vLLM would keep the old layer and say so in its log only."""
    kept = [tensor for tensor in publish(changed.model, SCHEME, 2).tensors if not tensor.name.startswith(name)]
    layer = name.rstrip(".").removesuffix(".weight")
    refused(loaded, policy, seal(2, SCHEME.label, kept), f"no tensor of {layer} was published")


def test_another_scheme_is_refused(loaded: VLLMEngine, policy: Policy) -> None:
    weights = seal(2, "w4a16-g32", publish(policy.model, SCHEME, 2).tensors)
    refused(loaded, policy, weights, "they are in w4a16-g32, the engine runs w8a8_int8")


def flip_in_engine(stream: Stream) -> Stream:
    for name, tensor in stream:
        if name == DOWN:
            tensor[7, 11] ^= 1
        yield name, tensor


def swap_in_engine(stream: Stream) -> Stream:
    tensors = dict(stream)
    tensors[UP_0], tensors[UP_1] = tensors[UP_1], tensors[UP_0]
    yield from tensors.items()


def keep_in_engine(stream: Stream) -> Stream:
    return ((name, tensor) for name, tensor in stream if name != NORM)


@pytest.mark.parametrize(
    ("damage", "layer"),
    [
        (flip_in_engine, "model.layers.1.mlp.down_proj"),
        (swap_in_engine, "model.layers.0.mlp.gate_up_proj"),
        (keep_in_engine, "model.layers.1.input_layernorm"),
    ],
)
def test_what_goes_wrong_in_the_engine_shows_in_the_read_back(
    loaded: VLLMEngine,
    policy: Policy,
    changed: Policy,
    monkeypatch: pytest.MonkeyPatch,
    damage: Callable[[Stream], Stream],
    layer: str,
) -> None:
    """The message arrives as it was sent; the engine holds something else, once."""
    real, damages = rollout.loader.engine_names, iter([damage])

    def names(stream: Stream, scheme: object) -> Stream:
        return next(damages, lambda tensors: tensors)(real(stream, scheme))  # type: ignore[arg-type]

    monkeypatch.setattr(rollout.loader, "engine_names", names)
    refused(loaded, policy, publish(changed.model, SCHEME, 2), f"the engine's {layer} does not compute")


EVERY = RolloutConfig().read_back_every


def damaged_loads(engine: VLLMEngine, versions: Sequence[WeightSource], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Load `versions` as the loads 1, 2, ... of an engine that damages the same weight each time; which are refused."""
    real, refused, damages = rollout.loader.engine_names, [], [flip_in_engine]

    def names(stream: Stream, scheme: object) -> Stream:
        damage = damages.pop() if damages else lambda tensors: tensors
        return damage(real(stream, scheme))  # type: ignore[arg-type]

    monkeypatch.setattr(rollout.loader, "engine_names", names)
    monkeypatch.setattr(engine, "_loads", 1)
    for number, weights in enumerate(versions, 1):
        damages[:] = [flip_in_engine]  # a refused load is followed by one of the version before, without damage
        try:
            engine.load(weights)
        except PublicationError as error:
            if DOWN.removesuffix(".weight") not in error.what:
                raise
            refused.append(number)
    return refused


def test_damage_to_a_layer_that_did_not_change_is_found_within_one_rotation(
    loaded: VLLMEngine, policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The layer's turn comes once, and then all layers' at once."""
    same = publish(policy.model, SCHEME, 1)
    layers = list(dict.fromkeys(_layer_of(name) for name, _ in same.manifest.tensors))
    turn = layers.index("model.layers.1.mlp.down_proj") % EVERY
    assert turn != 0
    assert damaged_loads(loaded, [same] * EVERY, monkeypatch) == [turn, EVERY]


def test_damage_to_a_layer_that_changed_is_found_at_once(
    loaded: VLLMEngine, policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All other layers are the same, and none has its turn with this one."""
    tensors = []
    for tensor in publish(policy.model, SCHEME, 2).tensors:
        if tensor.name == DOWN:
            tensor = pack(DOWN, to_torch(tensor).neg())
        tensors.append(tensor)
    assert damaged_loads(loaded, [seal(2, SCHEME.label, tensors)] * 2, monkeypatch) == [1, 2]


@dataclass(frozen=True)
class Breaking:
    """Weights in small buckets, of which the third never comes."""

    whole: PublishedWeights
    small: tuple[Bucket, ...]

    @property
    def manifest(self) -> Manifest:
        return self.whole.manifest

    def buckets(self) -> Iterator[Bucket]:
        yield from self.small[:2]
        raise ConnectionError("the learner's node is gone")


def test_a_transfer_that_breaks_in_the_middle_leaves_the_version_of_before(
    loaded: VLLMEngine, policy: Policy, changed: Policy
) -> None:
    small = tuple(in_buckets(checkpoint_tensors(changed.model), 200_000))
    assert len(small) > 4
    reason = "ConnectionError: the learner's node is gone"
    refused(loaded, policy, Breaking(publish(changed.model, SCHEME, 2), small), reason)
    loaded.load(publish(changed.model, SCHEME, 3))
    assert gap(changed, loaded.generate(requests(4, 20))).abs_max == 0.0


def test_a_version_that_cannot_be_put_back_is_told(loaded: VLLMEngine, policy: Policy, changed: Policy) -> None:
    gone = Breaking(publish(policy.model, SCHEME, 1), tuple(in_buckets(checkpoint_tensors(policy.model), 200_000)))
    loaded._held = gone  # what was loaded can no longer be read
    with pytest.raises(PublicationError, match=r"lm_head.weight is missing") as caught:
        loaded.load(replace(publish(changed.model, SCHEME, 2), tensors=publish(changed.model, SCHEME, 2).tensors[:-1]))
    assert caught.value.hint == (
        "version 1 could not be loaded again (ConnectionError: the learner's node is gone): no weights are loaded"
    )
    assert loaded.version == -1
    with pytest.raises(RolloutError, match="before weights were loaded"):
        loaded.generate(requests(1, 4))


def test_a_bucket_ends_with_the_tensor_that_fills_it(policy: Policy) -> None:
    whole = publish(policy.model, SCHEME, 1)
    buckets = list(in_buckets(checkpoint_tensors(policy.model), 100_000))
    assert [tensor.digest for bucket in buckets for tensor in bucket] == [t.digest for t in whole.tensors]
    assert all(sum(t.data.nbytes for t in bucket[:-1]) < 100_000 for bucket in buckets)
