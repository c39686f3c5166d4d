"""What a vLLM server says of itself, and whether a run can use it."""

from dataclasses import dataclass
from typing import Any

from vpd.engines.settings import VLLMSettings
from vpd.engines.vllm_client import RefusedError, VLLMClient
from vpd.errors import EngineError

DEVELOPMENT = "/server_info?config_format=json"  # answered, as the commands for weights are, in development mode


@dataclass(frozen=True, kw_only=True)
class ServerFacts:
    """``dtype``, ``logprobs_mode`` and ``instance`` are None where the server runs without its development mode."""

    max_model_len: int | None
    dtype: str | None = None
    logprobs_mode: str | None = None
    instance: str | None = None

    def check(self, settings: VLLMSettings, *, longest: int) -> None:
        """Raise EngineError where the server does not fit; ``longest``: the tokens of the longest row."""
        if self.max_model_len is not None and longest > self.max_model_len:
            raise EngineError(
                f"the context of the server at {settings.url} is too short for this run",
                got=f"{self.max_model_len} tokens",
                expected=f"at least {longest}: the longest known prompt with rollout.max_completion_length",
                do="Start it with a larger engine.max_model_len (--max-model-len), or allow shorter answers.",
            )
        if self.logprobs_mode not in (None, "processed_logprobs"):
            raise EngineError(
                f"the server at {settings.url} gives log-probs of another distribution than it samples from",
                got=f"--logprobs-mode {self.logprobs_mode}",
                expected="processed_logprobs",
                do="Start it with vpd serve, or with that option.",
            )
        if settings.dtype and self.dtype and settings.dtype != self.dtype:
            raise EngineError(
                f"the server at {settings.url} computes in another number type",
                got=self.dtype,
                expected=f"engine.dtype {settings.dtype}",
            )

    def require_commands(self, url: str) -> None:
        """Raise EngineError unless the server takes weights."""
        if self.instance is None:
            raise EngineError(
                f"the server at {url} takes no weights: it runs without its development mode",
                got=f"HTTP 404 for {DEVELOPMENT}",
                do="Start it with vpd serve, or with VLLM_SERVER_DEV_MODE=1, for this machine alone.",
            )


def server_facts(client: VLLMClient, model: str) -> ServerFacts:
    """What the server says.  Raises EngineError: it is none, or does not serve ``model``."""
    card = card_of(client, model)
    window = card.get("max_model_len")
    length = window if isinstance(window, int) else None
    try:
        config = client.get(DEVELOPMENT)["vllm_config"]
        return ServerFacts(
            max_model_len=length,
            dtype=str(config["model_config"]["dtype"]).removeprefix("torch."),
            logprobs_mode=str(config["model_config"]["logprobs_mode"]),
            instance=str(config["instance_id"]),
        )
    except RefusedError as error:
        if error.status != 404:
            raise
        return ServerFacts(max_model_len=length)
    except (KeyError, TypeError) as error:
        raise EngineError(
            f"the server at {client.url} says of itself what this version of vpd cannot read",
            got=f"{type(error).__name__}: {error}",
            expected="vLLM 0.32 or near it",
        ) from error


def card_of(client: VLLMClient, model: str) -> dict[str, Any]:
    """The entry of ``model`` in the server's list of models.  Raises EngineError."""
    try:
        cards = {str(card["id"]): card for card in client.get("/v1/models")["data"]}
    except (KeyError, TypeError) as error:
        raise EngineError(f"what answers at {client.url} is no vLLM server", got="no list at /v1/models") from error
    if model not in cards:
        raise EngineError(
            f"the server at {client.url} serves no model {model!r}",
            got=", ".join(sorted(cards)) or "none",
            do="Set engine.model to one of these, or start the server with --served-model-name.",
        )
    return dict(cards[model])
