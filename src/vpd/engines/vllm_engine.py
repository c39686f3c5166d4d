"""An engine behind a vLLM server: token ids in, ids and log-probs of the sampled tokens out.

A request has one seed, so each row is a request.  Stale or half-updated weights are an error, never an answer:

* the version is part of the folder and, with LoRA, of the adapter's name that a request asks for;
* between the first word of a sync and its proof the engine has no version and answers nothing;
* the server's log-probs of a fixed text must be the learner's (:mod:`vpd.engines.canary`), must have moved if the
  learner's have, and must be the same after every batch of answers, from the same instance of the server.

With several training processes the first writes the weights and talks the server into them, and each proves the answer
against its own weights.  Afterwards each asks for answers to its own share of the tasks.

With temperature above 0 and neither top-p nor top-k, as in training, log-probs are those of the whole distribution; a
truncated one (``vpd eval --top_p``) has the truncated distribution's, where the embedded engine has the whole one's.
"""

import math
import shutil
import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vpd.engines import limits_of, vllm_weights
from vpd.engines.canary import LONGEST, Canary, canary_tokens, check_synced, check_unchanged, learner_logprobs
from vpd.engines.settings import EngineParts, VLLMSettings
from vpd.engines.vllm_client import HalfAnswerError, Question, RefusedError, VLLMClient
from vpd.engines.vllm_server_facts import ServerFacts, server_facts
from vpd.errors import EngineError, StorageError
from vpd.policy import Policy
from vpd.ranks import on_first, together
from vpd.types import Completion, Floats, Metrics, SampleKey, Tokens

COMPLETIONS = "/v1/completions"
#: What would change the distribution, whatever a server's defaults are.
PLAIN: Mapping[str, Any] = {
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "ignore_eos": True,
    "return_token_ids": True,
    "logprobs": 0,
}


@dataclass(frozen=True, kw_only=True)
class _Sent:
    """What the first rank learned of the server when it sent new weights: also how it answers the canary now."""

    facts: ServerFacts
    model: str
    canary: Floats
    seconds: float


class VLLMEngine:
    """Samples on a server that is sent the weights; ``version`` is -1 while it serves none that are proven."""

    def __init__(self, client: VLLMClient, settings: VLLMSettings, parts: EngineParts):
        self.version = -1
        self._client = client
        self._settings = settings
        self._parts = parts
        self._tokens: Tokens = ()
        self._run = uuid.uuid4().hex[:8]
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._facts: ServerFacts | None = None
        self._canary: Canary | None = None
        self._model = settings.model
        self._first: dict[str, tuple[int, ...]] | None = None
        self._metrics: Metrics = {}

    def load(self, policy: Policy) -> None:
        """Send the weights, unless the server has them; StorageError, EngineError: it serves none afterwards.

        All ranks call it together.
        """
        ranks = self._parts.ranks
        if self._facts is None:
            together(ranks, "the vLLM server", self._check_facts)
        learner: Floats = policy.call_together(learner_logprobs, self._tokens)
        if on_first(ranks, "weights of the vLLM server", lambda: self._has(policy.version, learner)):
            return
        began, before, self.version = time.perf_counter(), self._canary, -1
        folder = on_first(ranks, "a folder for new weights", lambda: self._new_folder(policy.version))
        is_adapter = vllm_weights.write(policy, folder, ranks)
        written = time.perf_counter()
        answer = on_first(
            ranks, "new weights for the vLLM server", lambda: self._send(folder, policy.version, is_adapter)
        )
        self._facts, self._model = answer.facts, answer.model
        now = Canary(learner, answer.canary)
        tolerance = self._tolerance(answer.facts, learner_is_narrow=self._parts.learner_is_narrow)
        together(ranks, "the canary", lambda: check_synced(now, before, policy.version, tolerance))
        self._canary, self.version = now, policy.version
        self._metrics = {
            "engine/canary_difference": now.difference.largest,
            "engine/canary_difference_mean": now.difference.mean,
            "time/sync": time.perf_counter() - began,
            "time/sync_write": written - began,
            "time/sync_send": answer.seconds,
        }

    def generate(
        self,
        prompts: Sequence[Tokens],
        *,
        keys: Sequence[SampleKey],
        seed: int,
        max_tokens: int | Sequence[int],
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int | None = None,
    ) -> list[Completion]:
        if len(keys) != len(prompts):
            raise ValueError(f"one key for each prompt; got {len(keys)} keys for {len(prompts)} prompts")
        if self.version < 0 or self._canary is None:
            raise EngineError("the server serves no weights that are known", do="A sync failed before; see its error.")
        limits = limits_of(max_tokens, len(prompts))
        self._check_room(prompts, limits)
        sampling = {"temperature": temperature, "top_p": top_p, "top_k": -1 if top_k is None else top_k}
        rows = zip(prompts, keys, limits, strict=True)
        questions = [self._question(prompt, key.seed(seed), limit, sampling) for prompt, key, limit in rows]
        completions = self._client.ask_all(COMPLETIONS, questions, at_once=self._parts.max_rows)
        self._check_served()
        return completions

    def abandon(self) -> None:
        """See :class:`~vpd.engines.Abandonable`: the weights are the server's own."""
        self._client.abandon()

    def metrics(self) -> Metrics:
        """Of the last sync: what the canary showed (nats), and seconds."""
        return dict(self._metrics)

    def _check_facts(self) -> None:
        """Keep what the server is, and a canary of its length.  Raises EngineError: it does not suit the run."""
        self._facts = facts = server_facts(self._client, self._settings.model)
        facts.check(self._settings, longest=self._parts.longest())
        room = LONGEST if facts.max_model_len is None else facts.max_model_len - 1
        self._tokens = canary_tokens(self._parts.tokenizer, room)

    def _has(self, version: int, learner: Floats) -> bool:
        """Whether the server serves this version, whose answer to the canary this is."""
        return self.version == version and self._canary is not None and self._canary.learner == learner

    def _check_served(self) -> None:
        """Raise EngineError, and have no version, unless the server still is what it was after the sync."""
        version, self.version = self.version, -1
        facts, canary = server_facts(self._client, self._settings.model), self._canary
        assert canary is not None and self._facts is not None
        if facts.instance != self._facts.instance:
            raise EngineError(
                f"the server at {self._client.url} was restarted, and serves version {version} no longer",
                do="Go on with --run.resume true.",
            )
        check_unchanged(canary, self._score_canary(), version, self._tolerance(facts, learner_is_narrow=False))
        self.version = version

    def _check_room(self, prompts: Sequence[Tokens], limits: Sequence[int]) -> None:
        window = None if self._facts is None else self._facts.max_model_len
        longest = max((len(prompt) + limit for prompt, limit in zip(prompts, limits, strict=True)), default=0)
        if window is not None and longest > window:
            raise EngineError(
                "a prompt with its answer is longer than the server's context",
                got=f"{longest} tokens",
                expected=f"at most {window}",
                do="Raise engine.max_model_len of vpd serve, or lower rollout.max_completion_length.",
            )

    def _tolerance(self, facts: ServerFacts, *, learner_is_narrow: bool) -> float:
        dtype = facts.dtype or self._settings.dtype or "bfloat16"
        return self._settings.tolerance(dtype, learner_is_narrow=learner_is_narrow)

    def _new_folder(self, version: int) -> Path:
        """A folder for a version's weights in the run's own, which is in ``engine.sync_dir`` while the program runs."""
        parent = Path(self._settings.sync_dir)
        try:
            parent.mkdir(parents=True, exist_ok=True)
            if self._folder is None:
                self._folder = tempfile.TemporaryDirectory(
                    prefix=f"run-{self._run}-", dir=parent, ignore_cleanup_errors=True
                )
        except OSError as error:
            raise StorageError(
                f"cannot write to {parent}", got=error.strerror, do="Choose another engine.sync_dir."
            ) from error
        folder = Path(self._folder.name).resolve() / f"v{version}"
        shutil.rmtree(folder, ignore_errors=True)
        return folder

    def _send(self, folder: Path, version: int, is_adapter: bool) -> "_Sent":
        """Let the server load what is in a folder; the older ones are removed.  Raises EngineError."""
        self._check_facts()
        assert self._facts is not None
        began = time.perf_counter()
        if is_adapter:
            self._send_adapter(folder, version)
        else:
            self._send_weights(folder, self._facts)
        seconds = time.perf_counter() - began
        canary = self._score_canary()
        for older in folder.parent.iterdir():
            if older != folder:
                shutil.rmtree(older, ignore_errors=True)
        return _Sent(facts=self._facts, model=self._model, canary=canary, seconds=seconds)

    def _send_weights(self, folder: Path, facts: ServerFacts) -> None:
        """Reload from a folder while the server is paused; after an error it stays so, and answers nobody."""
        facts.require_commands(self._client.url)
        names = vllm_weights.names_in(folder)
        vllm_weights.check_whole(names, self._first, folder)
        self._client.command("/pause?mode=wait")
        try:
            reload = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
            self._client.command("/collective_rpc", reload)
            self._client.command("/reset_prefix_cache")
        except EngineError as error:
            raise EngineError(
                "the server did not take the new weights and stays paused: it may hold half of them",
                got=str(error),
                do="Look at its log and restart it, then go on with --run.resume true.",
            ) from error
        self._client.command("/resume")
        self._first = names

    def _send_adapter(self, folder: Path, version: int) -> None:
        """Load an adapter under a name of its own, and drop the one before."""
        before, name = self._model, f"vpd-{self._run}-v{version}"
        try:
            self._client.command("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})
        except RefusedError as error:
            if error.status != 404:
                raise
            raise EngineError(
                f"the server at {self._client.url} takes no adapters",
                got=f"HTTP {error.status}",
                do="Start it with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1, as vpd serve does.",
            ) from error
        self._model = name
        if before not in (self._settings.model, name):
            self._client.command("/v1/unload_lora_adapter", {"lora_name": before})

    def _score_canary(self) -> Floats:
        body = {"model": self._model, "prompt": list(self._tokens), "max_tokens": 1, "temperature": 0.0}
        body["prompt_logprobs"] = 0
        return self._client.ask(COMPLETIONS, Question(body, self._read_canary))

    def _read_canary(self, answer: Any) -> Floats:
        places = prompt_logprobs_of(answer, len(self._tokens))
        try:
            values = tuple(
                float(place[str(token)]["logprob"]) for place, token in zip(places[1:], self._tokens[1:], strict=True)
            )
        except (KeyError, TypeError, ValueError) as error:
            raise HalfAnswerError("prompt_logprobs lack a token of the prompt") from error
        return _finite(values)

    def _question(self, prompt: Tokens, seed: int, limit: int, sampling: Mapping[str, Any]) -> Question[Completion]:
        asked = {"model": self._model, "prompt": list(prompt), "seed": seed, "max_tokens": limit}
        stops = {"stop_token_ids": list(self._parts.eos_ids)}
        return Question({**asked, **stops, **PLAIN, **sampling}, lambda answer: self._completion(answer, prompt, limit))

    def _completion(self, answer: Any, prompt: Tokens, limit: int) -> Completion:
        """The answer as a completion.  Raises HalfAnswerError for anything but a whole one to this prompt."""
        choice = choice_of(answer)
        tokens, logprobs = choice.get("token_ids"), (choice.get("logprobs") or {}).get("token_logprobs")
        if not isinstance(tokens, list) or not isinstance(logprobs, list) or len(tokens) != len(logprobs):
            raise HalfAnswerError("token_ids and logprobs.token_logprobs are not one for each token")
        if tuple(choice.get("prompt_token_ids") or prompt) != prompt:
            raise HalfAnswerError("an answer to another prompt")
        stopped = bool(tokens) and tokens[-1] in self._parts.eos_ids
        whole = len(tokens) <= limit if stopped else len(tokens) == limit
        if not whole or choice.get("finish_reason") not in ("stop", "length"):
            raise HalfAnswerError(f"{len(tokens)} of {limit} tokens, finish_reason {choice.get('finish_reason')!r}")
        return Completion(
            tokens=tuple(map(int, tokens)),
            sampled=(True,) * len(tokens),
            logprobs=_finite(tuple(map(float, logprobs))),
            text=self._parts.tokenizer.decode(tokens, skip_special_tokens=True),
            finish="stop" if stopped else "length",
            version=self.version,
        )


def choice_of(answer: Any) -> Any:
    """The one choice of a completion.  Raises HalfAnswerError."""
    try:
        [choice] = answer["choices"]
    except (KeyError, TypeError, ValueError) as error:
        raise HalfAnswerError(f"an answer without one choice: {str(answer)[:120]}") from error
    if not isinstance(choice, dict):
        raise HalfAnswerError("a choice that is no object")
    return choice


def prompt_logprobs_of(answer: Any, length: int) -> list[Any]:
    """What stands for each of the prompt's tokens.  Raises HalfAnswerError."""
    places = choice_of(answer).get("prompt_logprobs")
    if not isinstance(places, list) or len(places) != length:
        raise HalfAnswerError("prompt_logprobs are not one for each token of the prompt")
    return places


def _finite(values: Floats) -> Floats:
    if not all(math.isfinite(value) and value <= 1e-3 for value in values):
        raise HalfAnswerError(f"a log-prob that is none: {max(values, key=lambda v: (math.isnan(v), v))}")
    return values
