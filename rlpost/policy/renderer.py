"""Messages to token ids by the model's own chat template; sampled tokens are never tokenised again.

The first prompt is rendered whole. After a reply only what is new is encoded: the end of the
assistant's turn, the environment's messages and the start of the next reply, cut out of the
rendered text.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlpost.errors import ModelError
from rlpost.types import Message, Task

_MARK = "\u2063rlpost\u2063"  # stands for a reply while the text around it is rendered


class Renderer:
    """One tokenizer and its template. `thinking` is passed as `enable_thinking`, always."""

    def __init__(self, model: str | Path, *, thinking: bool = False):
        from transformers import AutoTokenizer, GenerationConfig

        try:
            self.tokenizer = AutoTokenizer.from_pretrained(str(model), trust_remote_code=False)
        except (OSError, ValueError, KeyError) as error:
            problem = str(error).splitlines()[0]
            raise ModelError(
                f"no tokenizer could be loaded from {model}: {problem}", cure="name a model folder"
            ) from None
        self.model, self.thinking = str(model), thinking
        if not self._encode("x"):  # without its files transformers makes an empty one in silence
            raise ModelError(
                f"{model} has no tokenizer", cure="name a folder with tokenizer.json in it"
            )
        if not self.tokenizer.chat_template:
            raise ModelError(
                f"{model} has no chat template",
                cure="take an instruct model or add chat_template.jinja",
            )
        stops: list[int] = []
        try:
            stop = GenerationConfig.from_pretrained(str(model)).eos_token_id
            stops += stop if isinstance(stop, list) else [stop]
        except OSError:
            pass
        self.stop_token_ids: tuple[int, ...] = tuple(
            dict.fromkeys(
                i for i in [self._turn_end(), self.tokenizer.eos_token_id, *stops] if i is not None
            )
        )

    def prompt(
        self, messages: Sequence[Message], *, tools: Sequence[Any] | None = None
    ) -> list[int]:
        """Token ids of the conversation so far and the start of a reply."""
        return self._encode(self.text(messages, tools=tools))

    def text(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Any] | None = None,
        reply_follows: bool = True,
    ) -> str:
        """The rendered text; special tokens stand in it as text."""
        from jinja2.exceptions import TemplateError

        try:
            return self.tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tools=list(tools) if tools else None,
                add_generation_prompt=reply_follows,
                tokenize=False,
                enable_thinking=self.thinking,
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise ModelError(
                f"the chat template of {self.model} refuses these messages: {error}",
                cure="check roles, tools and their order",
            ) from None

    def continuation(
        self,
        messages: Sequence[Message],
        new: Sequence[Message],
        *,
        tools: Sequence[Any] | None = None,
        reply_ids: Sequence[int],
    ) -> list[int]:
        """Token ids between a sampled reply and the next one.

        `messages` are those before the reply, `new` those after it. If the reply ended with its
        stop token, that token is not said twice.
        """
        marked = [*messages, {"role": "assistant", "content": _MARK}, *new]
        text = self.text(marked, tools=tools)
        _, found, after = text.rpartition(_MARK)
        if not found:
            raise ModelError(
                f"the chat template of {self.model} does not keep earlier replies",
                cure="use a single-turn environment with this model",
            )
        ids = self._encode(after)
        if reply_ids and ids and reply_ids[-1] == ids[0] and ids[0] in self.stop_token_ids:
            ids = ids[1:]
        return ids

    def reply(self, token_ids: Sequence[int]) -> str:
        """The text of a sampled reply, without its stop token; other special tokens stay
        visible."""
        ids = list(token_ids)
        if ids and ids[-1] in self.stop_token_ids:
            ids.pop()
        return self.tokenizer.decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )

    def count(self, text: str) -> int:
        """Tokens of a plain text."""
        return len(self._encode(text))

    def check(self, task: Task) -> None:
        """Raises ModelError if the template silently drops what the task needs (its messages, its
        tools)."""
        text = self.text(task.messages, tools=task.tools)
        for message in task.messages:
            content = message.get("content")
            if isinstance(content, str) and content.strip() and content.strip()[:40] not in text:
                raise ModelError(
                    f"the chat template of {self.model} drops the {message.get('role')} message",
                    cure="move its text into the user message",
                )
        for tool in task.tools or ():
            name = tool.get("function", tool).get("name", "")
            if name not in text:
                raise ModelError(
                    f"the chat template of {self.model} does not show tools to the model",
                    cure="take a model with a tool template, or write the tools into the prompt",
                )

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def _turn_end(self) -> int | None:
        """The token that the template puts behind a reply, if it is a single special one."""
        try:
            text = self.text(
                [{"role": "user", "content": "x"}, {"role": "assistant", "content": _MARK}],
                reply_follows=False,
            )
        except ModelError:
            return None
        ids = self._encode(text.rpartition(_MARK)[2].lstrip())
        special = set(self.tokenizer.all_special_ids) | set(self.tokenizer.added_tokens_decoder)
        return ids[0] if ids and ids[0] in special else None


def render_gold(answer: Any) -> str:
    """The reply that a gold answer would be: text as it is, everything else as compact JSON."""
    import json

    return answer if isinstance(answer, str) else json.dumps(answer, ensure_ascii=False)
