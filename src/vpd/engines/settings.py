"""The section ``engine``: which engine samples, and what it is built from."""

import os
import urllib.parse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Protocol, runtime_checkable

from annotated_types import Ge, Gt

from vpd.engines import Engine
from vpd.errors import ConfigError
from vpd.ranks import OneProcess, Ranks
from vpd.settings import IsPath, Settings


@dataclass(frozen=True, kw_only=True)
class EngineParts:
    """What an engine may need of a run.

    ``eos_ids`` end an answer and are part of it; ``max_rows`` (``rollout.max_rows``) bounds the answers that decode at
    once; ``longest()`` is the length in tokens of the longest known prompt with an answer of full length.  ``ranks``
    are the processes of the run: each builds an engine; all load a policy together, and generate at their own pace.
    ``learner_is_narrow``: the learner forms products in 16 bits, because of its weights or of mixed precision.
    """

    tokenizer: Any
    eos_ids: tuple[int, ...]
    max_rows: int
    longest: Callable[[], int] = lambda: 0
    ranks: Ranks = field(default_factory=OneProcess)
    learner_is_narrow: bool = False


class EngineSettings(Protocol):
    """A section ``engine``; a user's own is chosen with ``--engine.name my_engine.py:MySettings``."""

    def build(self, parts: EngineParts) -> Engine:
        """A new engine; ``load`` is called before ``generate``."""
        ...


@runtime_checkable
class ChangesDefaults(Protocol):
    """A class of engines, or of their settings, with which other defaults of a method are right.

    ``algorithm_defaults`` holds values by the names of settings in the section ``algorithm``; a method that has no such
    setting, or not that choice, keeps its own, and so does a setting that is given.
    """

    algorithm_defaults: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class EmbeddedEngineSettings(Settings, section="engine"):
    """Samples in this process on the learner's own model."""

    name: Literal["embedded"] = "embedded"

    def build(self, parts: EngineParts) -> Engine:
        from vpd.engines.torch_engine import TorchEngine

        return TorchEngine(parts.tokenizer, eos_ids=parts.eos_ids, max_rows=parts.max_rows)


@dataclass(frozen=True, kw_only=True)
class VLLMSettings(Settings, section="engine"):
    """Samples on a vLLM server over HTTP: one that vpd serve starts, or one that runs already.

    ``python``, ``max_model_len``, ``server_args`` and ``start_timeout`` are read by ``vpd serve`` alone.  Its log-probs
    are not the learner's, so the importance ratio is taken against them.
    """

    algorithm_defaults: ClassVar[Mapping[str, Any]] = {"importance_reference": "sampler"}

    name: Literal["vllm"] = "vllm"
    url: Annotated[str, "where the server is, or where vpd serve starts it"] = "http://127.0.0.1:8000"
    model: Annotated[str, "the name that the server has for the model (--served-model-name)"] = "policy"
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None, "number type of the server's weights; null: model.dtype"
    ] = None
    sync_dir: Annotated[
        str,
        IsPath(read=False),
        "folder on a disk that the server sees too: weights on their way to it, and the token and log of vpd serve",
    ] = "vllm-sync"
    api_key_env: Annotated[
        str | None, "name of the environment variable that holds the server's token; null: that of vpd serve"
    ] = None
    timeout: Annotated[float, Gt(0), "seconds that one request may take"] = 600.0
    canary_tolerance: Annotated[
        float | None,
        Gt(0),
        "largest difference, in nats, between a token's log-prob on the server and in the learner right after new"
        " weights (on average a tenth of it); null: .001 in float32, 1 where either computes in 16 bits",
    ] = None
    python: Annotated[str | None, IsPath(read=False), "the python of an environment that has vllm"] = None
    max_model_len: Annotated[
        int | None, Ge(1), "longest prompt with its answer, in tokens; null: the model's window"
    ] = None
    server_args: Annotated[tuple[str, ...], "further arguments of vLLM's server, such as --tensor-parallel-size=2"] = ()
    start_timeout: Annotated[float, Gt(0), "seconds until the server must answer"] = 900.0

    def build(self, parts: EngineParts) -> Engine:
        from vpd.engines.vllm_client import VLLMClient
        from vpd.engines.vllm_engine import VLLMEngine

        client = VLLMClient(self.url, api_key=self.api_key(), timeout=self.timeout)
        return VLLMEngine(client, self, parts)

    def check(self) -> None:
        super().check()
        check_url(self.url, "engine.url")
        if not self.model.strip():
            raise ConfigError("engine.model is empty", expected="the name that the server has for the model")

    def api_key(self) -> str | None:
        """The server's token, None where it asks for none.  Raises ConfigError: there is no such variable."""
        if self.api_key_env is not None:
            return key_of(self.api_key_env, "engine.api_key_env")
        from vpd.engines.vllm_server import known_token

        return known_token(Path(self.sync_dir), self.url)

    def is_at(self, url: str) -> bool:
        """Whether a teacher's server is this one."""
        return url.rstrip("/") == self.url.rstrip("/")

    def tolerance(self, dtype: str, *, learner_is_narrow: bool) -> float:
        """``canary_tolerance``, decided for a server that computes in ``dtype`` and for the learner, in nats."""
        if self.canary_tolerance is not None:
            return self.canary_tolerance
        return 1e-3 if dtype in ("float32", "float64") and not learner_is_narrow else 1.0


def check_url(url: str, key: str) -> None:
    """Raise ConfigError unless ``url``, the setting ``key``, is one of a server: scheme, host and port."""
    try:
        at = urllib.parse.urlsplit(url)
        good = at.scheme in ("http", "https") and bool(at.hostname) and at.port is not None and at.path in ("", "/")
    except ValueError:  # a port that is no number
        good = False
    if not good:
        raise ConfigError(f"{key} is no address of a server", got=url, expected="http://HOST:PORT, without a path")


def key_of(variable: str, key: str) -> str:
    """The value of an environment variable that the setting ``key`` names.  Raises ConfigError: it is not set."""
    if variable not in os.environ:
        raise ConfigError(f"{key}: the environment variable {variable} is not set", do="Set it to the server's token.")
    return os.environ[variable]
