"""vLLM behind the Engine protocol: samples with log-probs, and loads published weights in place, all or nothing."""

import json
import math
import os
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor, distributed

from qarl.config.policy import RolloutConfig
from qarl.errors import KernelError, PublicationError, QarlError, ResourceError, RolloutError, first_line
from qarl.numerics.engine_ops import same_prefill_tokens
from qarl.numerics.vllm_patch import PROCESS_ENV, patch_cpu, patch_cpu_engine
from qarl.quant.experts import check_engine
from qarl.quant.formats import check_processor, engine_kernels
from qarl.quant.scheme import FUSED, QuantScheme
from qarl.types import Sample, SampleRequest, WorkerInfo
from qarl.weights.source import Bucket, Channel, PublishedWeights, TransferStep, WeightSource
from rollout.engine_settings import engine_settings
from rollout.loader import LOAD_ERRORS
from rollout.read_back import Selection

SLEEP_LEVEL = 1
"""vLLM's level 1 keeps the weights in host memory and drops keys and values. Level 2 would drop the weights, too: the
next publication brings them, but not what a kernel keeps beside them (workspaces, scales that are not published). And
whatever samples before it must still find them."""


def engine_env(device: str, config: RolloutConfig) -> dict[str, str]:
    """Environment of a process that runs an engine; must be set before torch is imported there."""
    common = {
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process: weights pass as tensors
    }
    if device == "cuda":
        return {**common, "VLLM_BATCH_INVARIANT": str(int(config.batch_invariant))}
    return {
        **common,
        **PROCESS_ENV,
        "VLLM_CPU_KVCACHE_SPACE": str(config.kv_cache_gib),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_ATTN_SPLIT_KV": "0",
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",  # its group has one process: it need not listen where the machine's name points to
    }


def _is_expected(layer: str, kernel: str, scheme: QuantScheme, allowed: tuple[str, ...]) -> bool:
    parent, _, name = layer.rpartition(".")
    covered = all(scheme.covers(f"{parent}.{part}") for part in FUSED.get(name, (name,)))
    return kernel in allowed if covered else not kernel


def _all_tensors(weights: WeightSource) -> Bucket:
    return tuple(tensor for bucket in weights.buckets() for tensor in bucket)


def _reason(error: Exception) -> str:
    if isinstance(error, QarlError):
        return error.what
    return f"{type(error).__name__}: {first_line(error)}"


@dataclass
class _Running:
    request: SampleRequest
    blocks: int
    """Blocks of the KV cache for the prompt and its longest response."""
    tokens: int = 0
    """Tokens of the response so far; counted for `partial` requests only."""
    versions: list[int] = field(default_factory=list)
    """Which version sampled each token, up to the last load."""


def _params(request: SampleRequest, longest_shared: float) -> Any:
    """vLLM's parameters of a request. vLLM gives its output when it is finished; that of a `partial` one at each step.

    A prompt of more than `longest_shared` tokens does not read the prefix cache: vLLM would round what follows the
    cached beginning otherwise than the learner, which prefills the whole prompt. Nor does a partial request: when its
    response goes on, its tokens so far must be prefilled, and the cache may hold them as another response decoded them.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    too_long = len(request.prompt.token_ids) > longest_shared
    return SamplingParams(
        temperature=request.temperature,
        max_tokens=request.max_new_tokens,
        seed=request.seed,
        logprobs=0,
        ignore_eos=request.ignore_eos,
        skip_reading_prefix_cache=request.partial or not request.reuse_cache or too_long,
        stop=list(request.stop),
        stop_token_ids=list(request.stop_token_ids),
        top_p=request.top_p,
        top_k=request.top_k,
        min_p=request.min_p,
        output_kind=RequestOutputKind.CUMULATIVE if request.partial else RequestOutputKind.FINAL_ONLY,
    )


class VLLMEngine:
    """One vLLM engine. It starts without weights; the first `load` gives it some.

    Args:
        model_dir: folder with config (and quantization_config) and tokenizer; weights in it are not read.
        dtype: "bfloat16" or "float32".
        device: "cpu" or "cuda".
        worker: number of this worker, for messages.
        sleeps: whether `sleep` will be called; vLLM then allocates so that it can give memory back. On GPU only.
    Raises:
        ConfigError: vLLM has no kernel for the scheme on this device or processor.
        KernelError: the engine selected none of the scheme's kernels, or has none for experts.
        ResourceError: the KV cache has no room for one sequence of `config.max_model_len`.
    """

    def __init__(
        self,
        model_dir: Path,
        config: RolloutConfig,
        scheme: QuantScheme,
        dtype: str,
        device: str,
        worker: int = 0,
        sleeps: bool = False,
    ) -> None:
        allowed = engine_kernels(scheme, device)
        check_processor(scheme, device)
        if device == "cpu":
            patch_cpu()
            patch_cpu_engine()
        check_engine(scheme, json.loads((model_dir / "config.json").read_text()), dtype, device)
        from vllm import LLM

        self._worker, self._device, self._scheme = worker, device, scheme
        self._keep_kv, self._receives = config.keep_kv, config.transport != "object_store"
        self._held: WeightSource | None = None
        self._waiting: dict[int, SampleRequest] = {}  # for room in the KV cache
        self._running: dict[int, _Running] = {}
        self._read_back_every, self._loads = config.read_back_every, 0
        self._shards = config.tensor_parallel_size
        if self._shards == 1 and device == "cpu" and not distributed.is_initialized():
            # Else vLLM makes this group of one process itself, with a file in TMPDIR that nobody removes.
            distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
        self._llm = LLM(str(model_dir), dtype=dtype, **engine_settings(config, device, sleeps))
        layers, *_ = self._llm.collective_rpc("qarl_kernels")
        self._kernels = tuple(sorted({kernel for kernel in layers.values() if kernel}))
        wrong = {name: kernel for name, kernel in layers.items() if not _is_expected(name, kernel, scheme, allowed)}
        if wrong or (scheme.quantizes and not self._kernels):
            name, kernel = next(iter(wrong.items()), ("no layer", ""))
            raise KernelError(
                f"the engine runs {name} with {kernel or 'no low-bit kernel'}, where {scheme.name} needs one of "
                f"{', '.join(allowed) or 'no low-bit kernel'}",
                where=f"rollout worker {worker}",
                hint="use another rollout.scheme on this device",
            )
        cache = self._llm.llm_engine.vllm_config.cache_config
        self._block, self._blocks = cache.block_size, cache.num_gpu_blocks - 1  # vLLM leaves one empty
        self._at_once = min(self._fitting(config.max_model_len), config.max_num_seqs)
        self._partial_at_once = config.responses_at_once

    @property
    def version(self) -> int:
        return -1 if self._held is None else self._held.manifest.version

    @cached_property
    def _longest_shared(self) -> float:
        """Tokens of the longest prompt that may be read from the prefix cache."""
        config = self._llm.model_config
        return same_prefill_tokens(config.get_head_size(), config.max_model_len) if self._device == "cpu" else math.inf

    def info(self) -> WorkerInfo:
        return WorkerInfo(self._worker, self._device, self._kernels, socket.gethostname(), os.getpid(), self._at_once)

    def add(self, requests: Mapping[int, SampleRequest]) -> None:
        """Queue requests, all or none; `step` gives each one's sample with its number.

        Raises RolloutError: no weights are loaded, the engine sleeps, or a prompt leaves no room in `max_model_len`.
        """
        if self._held is None:
            raise RolloutError("cannot sample before weights were loaded", where=f"rollout worker {self._worker}")
        if self._llm.llm_engine.is_sleeping():  # vLLM would keep them waiting
            raise RolloutError("cannot sample while it sleeps", where=f"rollout worker {self._worker}")
        for request in requests.values():
            if (length := len(request.prompt.token_ids)) >= self._longest:
                what = f"a prompt of {length} tokens leaves no room for a response in {self._longest}"
                raise RolloutError(what, f"rollout worker {self._worker}", "raise rollout.max_model_len")
        self._waiting |= requests
        self._begin()

    def step(self) -> dict[int, Sample]:
        """Compute the next token of every running request; returns the samples that are finished then, by number."""
        self._begin()
        samples = {}
        for output in self._llm.llm_engine.step():
            number = int(output.request_id)
            if output.finished:
                samples[number] = self._sample(self._running.pop(number), output.outputs[0])
            else:
                self._running[number].tokens = len(output.outputs[0].token_ids)
        return samples

    def abort(self, numbers: Iterable[int]) -> None:
        """Forget those requests that wait or run."""
        numbers = list(numbers)
        for number in numbers:
            self._waiting.pop(number, None)
        running = [number for number in numbers if self._running.pop(number, None)]
        self._llm.llm_engine.abort_request([str(number) for number in running])

    def generate(self, requests: Sequence[SampleRequest]) -> list[Sample]:
        """One sample per request, in order. No request may be running. Raises RolloutError: as `add`."""
        self.add(dict(enumerate(requests)))
        samples: dict[int, Sample] = {}
        while self._running or self._waiting:
            samples |= self.step()
        return [samples[number] for number in range(len(requests))]

    def score(self, samples: Sequence[Sample]) -> list[npt.NDArray[np.float32]]:
        """Log-probs (nats, temperature 1) of each response, with prompt and response prefilled at once.

        This compares the engine with itself: `generate` computed the same tokens one by one. `max_model_len` must leave
        room for one more token.
        """
        from vllm import SamplingParams

        sequences = [{"prompt_token_ids": [*s.prompt.token_ids, *s.response_ids]} for s in samples]
        outputs = self._llm.generate(sequences, SamplingParams(max_tokens=1, prompt_logprobs=0), use_tqdm=False)
        rows = []
        for sample, output in zip(samples, outputs, strict=True):
            entries = output.prompt_logprobs[len(sample.prompt.token_ids) :]
            logprobs = [entry[token].logprob for token, entry in zip(sample.response_ids, entries, strict=True)]
            rows.append(np.array(logprobs, dtype=np.float32))
        return rows

    def connect(self, channel: Channel) -> None:
        from rollout.receive import connect

        connect(self._llm, channel)

    def receive(self, step: TransferStep) -> None:
        from rollout.receive import receive

        receive(self._llm, step)

    def load(self, weights: WeightSource) -> None:
        """Replace the weights in place, check what the engine then computes, and clear the prefix cache.

        Tensors that a transfer has brought since the last load are used, and `weights` gives their manifest.
        Partial requests that run go on with their next token: vLLM drops their keys and values, and prefills prompt and
        response so far as one prompt, but with `rollout.keep_kv`, where they keep them. Their random generators go on,
        too, so no random number is used twice.
        Raises PublicationError: the weights differ from their manifest, have another scheme, end early, or the engine
        does not compute with them. The engine then loads its previous version again; the error says if it could.
        """
        for running in self._running.values():
            running.versions += [self.version] * (running.tokens - len(running.versions))
        previous, self._held = self._held, None  # after a failure below, no sampling from a mixture of two versions
        try:
            if self._receives:  # keep them here: the learner has them only until its next update
                weights = PublishedWeights(weights.manifest, self._received() or _all_tensors(weights))
            elif self._shards > 1:  # its processes do not know Ray
                weights = PublishedWeights(weights.manifest, _all_tensors(weights))
            self._take(weights, self._selection(previous))
        except LOAD_ERRORS as error:
            raise self._put_back(previous, weights.manifest.version, error) from error
        self._held = weights

    def sleep(self) -> None:
        self._llm.llm_engine.sleep(SLEEP_LEVEL)

    def wake(self) -> None:
        if self._llm.llm_engine.is_sleeping():
            self._llm.llm_engine.wake_up()

    def reload(self, tensors: Iterator[tuple[str, Tensor]]) -> None:
        """Replace the engine's weights by a checkpoint's tensors, in order, without any check."""
        self._llm.collective_rpc("qarl_load", args=(tensors, self._scheme))

    def _begin(self) -> None:
        """Give vLLM requests, in order, while their longest responses fit in its KV cache beside all that run.

        Partial requests come last, and leave `PROBE_PROMPTS` places free: the others may check a publication, for which
        the run waits. vLLM itself would begin as many as have room now. When the cache is full later, it drops the keys
        and values of a response and prefills its tokens, which rounds differently from decoding them.
        """
        free = self._blocks - sum(running.blocks for running in self._running.values())
        places = self._partial_at_once - sum(running.request.partial for running in self._running.values())
        for number, request in sorted(self._waiting.items(), key=lambda item: item[1].partial):
            places -= request.partial
            ids = list(request.prompt.token_ids)
            blocks = self._blocks_of(len(ids) + request.max_new_tokens)
            free -= blocks
            if free < 0 or places < 0:
                return
            (prompt,) = self._llm.renderer.render_cmpl([{"prompt_token_ids": ids}])
            self._llm.llm_engine.add_request(str(number), prompt, _params(request, self._longest_shared))
            del self._waiting[number]
            self._running[number] = _Running(request, blocks)

    def _fitting(self, tokens: int) -> int:
        """How many sequences of so many tokens the KV cache holds."""
        if fitting := self._blocks // self._blocks_of(tokens):
            return fitting
        what = f"the KV cache of {self._blocks * self._block} tokens holds no sequence of {tokens}"
        hint = "raise rollout.kv_cache_gib or rollout.gpu_memory_utilization, or lower rollout.max_model_len"
        raise ResourceError(what, f"rollout worker {self._worker}", hint)

    def _blocks_of(self, tokens: int) -> int:
        return -(-min(tokens, self._longest) // self._block)

    @property
    def _longest(self) -> int:
        return int(self._llm.llm_engine.model_config.max_model_len)

    def _received(self) -> Bucket:
        return self._llm.collective_rpc("qarl_received")[0]

    def _selection(self, previous: WeightSource | None) -> Selection | None:
        """What the next load reads back: all layers (None) at first and in every `rollout.read_back_every`-th load."""
        turn, self._loads = self._loads % self._read_back_every, self._loads + 1
        if previous is None or turn == 0:
            return None
        return Selection(previous.manifest, self._read_back_every, turn)

    def _take(self, weights: WeightSource, selection: Selection | None = None) -> None:
        if weights.manifest.scheme != self._scheme.label:
            raise PublicationError(f"they are in {weights.manifest.scheme}, the engine runs {self._scheme.label}")
        for errors in self._llm.collective_rpc("qarl_take", args=(weights, self._scheme, selection)):
            if errors:
                raise errors[0]
        if not self._keep_kv and not self._llm.reset_prefix_cache(reset_running_requests=bool(self._running)):
            raise PublicationError("the engine kept its prefix cache")

    def _put_back(self, previous: WeightSource | None, refused: int, error: Exception) -> PublicationError:
        """Load `previous` again; returns an error that says why version `refused` is not loaded, and which one is."""
        hint = "no weights are loaded"
        if previous is not None:
            version = previous.manifest.version
            try:
                self._take(previous)
            except LOAD_ERRORS as second:
                hint = f"version {version} could not be loaded again ({_reason(second)}): {hint}"
            else:
                self._held, hint = previous, f"version {version} is loaded again"
        return PublicationError(_reason(error), f"rollout worker {self._worker}, weights version {refused}", hint)

    def _sample(self, running: _Running, output: Any) -> Sample:
        versions = running.versions + [self.version] * (len(output.token_ids) - len(running.versions))
        logprobs = [entry[token].logprob for token, entry in zip(output.token_ids, output.logprobs, strict=True)]
        return Sample(
            prompt=running.request.prompt,
            response_ids=tuple(output.token_ids),
            logprobs_T=np.array(logprobs, dtype=np.float32),
            text=output.text,
            finish_reason=output.finish_reason,
            version=self.version,
            worker=self._worker,
            versions_T=np.array(versions) if running.versions else None,
        )
