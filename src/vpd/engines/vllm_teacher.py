"""A frozen teacher behind a vLLM server: its K likeliest tokens at every token of a completion.

Nothing is sampled and no weights are sent, so the server needs no development mode, and several runs may share it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vpd.engines.canary import TEXT
from vpd.engines.vllm_client import HalfAnswerError, Question, RefusedError, VLLMClient
from vpd.engines.vllm_engine import COMPLETIONS, prompt_logprobs_of
from vpd.engines.vllm_server_facts import card_of
from vpd.errors import EngineError
from vpd.types import Message, Tokens, TopKLogprobs


@dataclass(frozen=True)
class VLLMTeacher:
    """``model`` is its name at the server, ``k`` the tokens asked for, ``at_once`` the requests in flight.

    Its vocabulary may be padded beyond the tokenizer's ``vocabulary`` tokens; what is said of the rest is left out.
    """

    client: VLLMClient
    model: str
    k: int
    at_once: int
    vocabulary: int

    def check(self, tokenizer: Any) -> None:
        """Raise EngineError unless the server has this model, gives so many tokens, and has the student's tokenizer."""
        card_of(self.client, self.model)
        body = {"model": self.model, "prompt": TEXT, "add_special_tokens": False}
        theirs = self.client.ask("/tokenize", Question(body, _tokens))
        ours = tuple(tokenizer.encode(TEXT, add_special_tokens=False))
        if theirs != ours:
            raise EngineError(
                "distributions over tokens are compared: teacher and student need one tokenizer",
                got=f"{len(theirs)} tokens from the server at {self.client.url} and {len(ours)} here, of one text",
            )
        try:
            self.top_k([(ours[:1], ours[1:2])])
        except RefusedError as error:
            if error.status != 400:
                raise
            raise EngineError(
                f"the teacher's server at {self.client.url} does not give its {self.k} likeliest tokens",
                got=str(error),
                do=f"Start it with --max-logprobs={self.k}, or lower algorithm.distillation_topk.",
            ) from error

    def prompt(self, messages: Sequence[Message], tools: Sequence[Any], *, enable_thinking: bool) -> Tokens:
        """Messages as the chat template of the server's model writes them, ready for an answer.  Raises EngineError."""
        body = {
            "model": self.model,
            "messages": list(messages),
            "add_generation_prompt": True,
            "chat_template_kwargs": {"enable_thinking": enable_thinking},
            **({"tools": list(tools)} if tools else {}),
        }
        cause: RefusedError | None = None
        try:
            written = self.client.ask("/tokenize", Question(body, _tokens))
        except RefusedError as error:
            written, cause = (), error
        if written:
            return written
        raise EngineError(
            f"the server at {self.client.url} writes no prompt of messages with its model's chat template",
            got="no tokens" if cause is None else str(cause)[:200],
            do="Set algorithm.teacher_chat_template to student.",
        ) from cause

    def top_k(self, rows: Sequence[tuple[Tokens, Tokens]]) -> list[TopKLogprobs]:
        """What the teacher would say next at each token of a row's completion, after its prompt.  Raises EngineError.

        Rows are (prompt [P], completion [T]) with T at least 1; log-probs are at temperature 1.
        """
        return self.client.ask_all(COMPLETIONS, [self._question(*row) for row in rows], at_once=self.at_once)

    def abandon(self) -> None:
        """End the requests of another thread, which then raise EngineError."""
        self.client.abandon()

    def _question(self, prompt: Tokens, completion: Tokens) -> Question[TopKLogprobs]:
        tokens = [*prompt, *completion]
        body = {"model": self.model, "prompt": tokens, "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": self.k}
        return Question(body, lambda answer: self._read(answer, len(prompt), len(tokens)))

    def _read(self, answer: Any, start: int, length: int) -> TopKLogprobs:
        places = prompt_logprobs_of(answer, length)
        try:
            found = [
                sorted(
                    (
                        (float(entry["logprob"]), int(token))
                        for token, entry in place.items()
                        if int(token) < self.vocabulary
                    ),
                    reverse=True,
                )
                for place in places[start:]
            ]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise HalfAnswerError("prompt_logprobs of another form") from error
        if any(len(place) < self.k for place in found):  # the row's own token comes on top of the k likeliest
            raise HalfAnswerError(f"fewer than {self.k} tokens at a place")
        return TopKLogprobs(
            ids=tuple(tuple(token for _, token in place[: self.k]) for place in found),
            logprobs=tuple(tuple(logprob for logprob, _ in place[: self.k]) for place in found),
        )


def _tokens(answer: Any) -> Tokens:
    try:
        return tuple(int(token) for token in answer["tokens"])
    except (KeyError, TypeError, ValueError) as error:
        raise HalfAnswerError("no list of tokens") from error
