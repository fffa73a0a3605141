"""Rollouts by vLLM: it holds the SFT model, and before each rollout is sent the policy's adapter.

What it must give is what `generation.Generation` says: tokens that end with EOS exactly when the answer is
finished, and the log-probability of each under the distribution that it was drawn from. Weights of full
fine-tuning, several processes and a server that someone else runs are left out.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import BaseModel, ValidationError

from rlhf_core import ranks
from rlhf_core.config import Params, SamplingConfig, rank_with_room
from rlhf_core.errors import InputError
from rlhf_core.generation import Drawn, Generation, finish
from rlhf_core.layout import Layout
from rlhf_core.modeling.encoding import encode_prompt
from rlhf_core.modeling.loading import load_tokenizer, resolve_device, resolve_dtype
from rlhf_core.modeling.roles import AdapterRoles, Roles
from rlhf_core.rollout_engines.server import Server, check_program, serving

if TYPE_CHECKING:
    import httpx

BASE = "sft"  # its name there
MOST_AT_ONCE = 256  # answers that are written together; each takes a connection
SEEDS = 2**63 - 1
COMPLETIONS = "/v1/completions"


def check(params: Params) -> None:
    """Raises InputError for what can be seen to fail before a model is loaded."""
    if ranks.count() > 1:
        raise InputError(
            f"ppo.rollout_engine = 'vllm': it answers one process, and this training has {ranks.count()}"
        )
    check_program(params.ppo)


@contextlib.contextmanager
def opened(
    params: Params,
    layout: Layout,
    conversations: Sequence[list[dict[str, str]]],
    say: Callable[[str], None],
) -> Iterator[VLLMEngine]:
    """An engine with a server of its own, for prompts among `conversations`."""
    check(params)
    config, sft = params.ppo, layout.model("sft")
    tokenizer = load_tokenizer(sft)
    longest = max(len(encode_prompt(tokenizer, messages)) for messages in conversations)
    options = {
        "--served-model-name": BASE,
        "--dtype": str(resolve_dtype(params.run, resolve_device(params.run))).removeprefix("torch."),
        "--max-model-len": longest + config.sampling.max_new_tokens,
        "--max-num-seqs": min(config.rollout_batch_size, MOST_AT_ONCE),
        "--gpu-memory-utilization": config.vllm.memory_share,
        "--max-lora-rank": rank_with_room(params.model.lora.rank),
        "--max-loras": 1,
        "--logprobs-mode": "processed_logprobs",  # of the distribution that tokens are drawn from
        "--generation-config": "vllm",  # else what stands beside the model would change the sampling
        "--seed": params.run.seed,
    }
    words = ["--enable-lora", *(str(word) for option in options.items() for word in option)]
    log, adapters = (layout.run_dir("ppo") / name for name in ("vllm.log", "vllm"))
    shutil.rmtree(adapters, ignore_errors=True)  # of a stage that was killed
    try:
        with serving(config.vllm, sft, words, log, say) as server:
            yield VLLMEngine(server, adapters, config.vllm.rollout_seconds)
    finally:
        shutil.rmtree(adapters, ignore_errors=True)


class VLLMEngine:
    """Keeps which adapter the server holds; `adapters` is a directory for the files that it reads."""

    def __init__(self, server: Server, adapters: Path, seconds: float) -> None:
        self._server, self._adapters, self._seconds = server, adapters.resolve(), seconds
        self._loaded: str | None = None
        self._count = 0

    def answer(
        self,
        roles: Roles,
        conversations: Sequence[list[dict[str, str]]],
        sampling: SamplingConfig,
        *,
        samples_per_prompt: int,
        batch_size: int,
        only: Sequence[int] | None = None,
    ) -> list[list[Generation]]:
        """As `RolloutEngine` has it. `batch_size` does not count: the server takes what it has room for.

        Raises RolloutEngineError when the server fails.
        """
        wanted = range(len(conversations)) if only is None else only
        seeds = row_seeds(len(conversations) * samples_per_prompt, sampling.seed)
        model, eos = self._send(roles), roles.tokenizer.eos_token_id
        requests = []
        for i in wanted:
            prompt = encode_prompt(roles.tokenizer, conversations[i])
            rows = range(i * samples_per_prompt, (i + 1) * samples_per_prompt)
            requests += [request(model, prompt, sampling, seeds[row], eos) for row in rows]
        answers = [finish(roles.tokenizer, drawn) for drawn in asyncio.run(self._drawn(requests))]
        return [answers[i : i + samples_per_prompt] for i in range(0, len(answers), samples_per_prompt)]

    def _send(self, roles: Roles) -> str:
        """Give the server the policy as it is now, in place of the last one; the name it has there.

        Each has a name of its own, since the server keeps what it computed by name.
        """
        import httpx

        assert isinstance(roles, AdapterRoles)
        self._count += 1
        name = f"policy-{self._count}"
        roles.save_adapter("policy", self._adapters / name)
        with httpx.Client(timeout=self._seconds, **self._server.client_options()) as client:
            if self._loaded is not None:
                self._order(client, "/v1/unload_lora_adapter", {"lora_name": self._loaded})
                shutil.rmtree(self._adapters / self._loaded)
                self._loaded = None
            asked = {"lora_name": name, "lora_path": str(self._adapters / name)}
            self._order(client, "/v1/load_lora_adapter", asked)
        self._loaded = name
        return name

    def _order(self, client: httpx.Client, path: str, body: Mapping[str, Any]) -> None:
        with self._faults(path):
            _content(client.post(path, json=body))

    async def _drawn(self, requests: Sequence[Mapping[str, Any]]) -> list[list[Drawn]]:
        """What was drawn for each request; all are under way at once, as many as there are connections."""
        import httpx

        limits = httpx.Limits(max_connections=MOST_AT_ONCE)
        options = self._server.client_options()
        with self._faults(COMPLETIONS):
            async with (
                asyncio.timeout(self._seconds),
                httpx.AsyncClient(timeout=None, limits=limits, **options) as client,
            ):
                return await asyncio.gather(*(_ask(client, asked) for asked in requests))

    @contextlib.contextmanager
    def _faults(self, path: str) -> Iterator[None]:
        """What goes wrong while `path` is asked, as a RolloutEngineError with the end of the server's log."""
        import httpx

        try:
            yield
        except (TimeoutError, httpx.TimeoutException):
            late = f"{path} took more than ppo.vllm.rollout_seconds = {self._seconds:g}"
            raise self._server.fault(late) from None
        except httpx.HTTPError as error:
            raise self._server.fault(f"{path} was not answered ({type(error).__name__})") from error
        except ValueError as error:
            raise self._server.fault(f"{path} gave {error}") from error


async def _ask(client: httpx.AsyncClient, asked: Mapping[str, Any]) -> list[Drawn]:
    return read_answer(_content(await client.post(COMPLETIONS, json=asked)), asked)


def _content(response: httpx.Response) -> bytes:
    if response.status_code != 200:
        raise ValueError(f"status {response.status_code}: {response.text[:300]}")
    return response.content


def row_seeds(rows: int, seed: int) -> list[int]:
    """A seed for each answer, as `generation.random_table` has numbers: the first is the same however many
    follow, so that no answer's randomness depends on what is written with it."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(SEEDS, (rows,), generator=generator).tolist()


def request(
    model: str, prompt: Sequence[int], sampling: SamplingConfig, seed: int, eos: int
) -> dict[str, Any]:
    """One answer to a prompt of token ids, that ends at `eos` and nowhere else before its length."""
    return {
        "model": model,
        "prompt": list(prompt),
        "max_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "seed": seed,
        "n": 1,
        "ignore_eos": True,  # those that the model's own files name, of which there may be more
        "stop_token_ids": [eos],
        "logprobs": 0,  # of the tokens drawn, and of no others
        "return_token_ids": True,
    }


class _Logprobs(BaseModel):
    token_logprobs: list[float]


class _Choice(BaseModel):
    token_ids: list[int]
    logprobs: _Logprobs


class _Completion(BaseModel):
    choices: tuple[_Choice]


def read_answer(content: bytes, asked: Mapping[str, Any]) -> list[Drawn]:
    """The tokens of a completion with their log-probabilities.

    Raises ValueError where it is not the one answer that was `asked` for.
    """
    try:
        (choice,) = _Completion.model_validate_json(content).choices
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ValueError(f"a completion whose {where} is wrong: {first['msg']}") from None
    tokens, logprobs = choice.token_ids, choice.logprobs.token_logprobs
    (eos,), most = asked["stop_token_ids"], asked["max_tokens"]
    if len(logprobs) != len(tokens):
        raise ValueError(f"{len(logprobs)} log-probabilities for {len(tokens)} tokens")
    ends = bool(tokens) and (tokens[-1] == eos or len(tokens) == most)
    if not ends or len(tokens) > most or eos in tokens[:-1]:
        raise ValueError(
            f"{len(tokens)} tokens that do not end at the first EOS ({eos}) or at {most}: {tokens[-8:]}"
        )
    return list(zip(tokens, logprobs, strict=True))
