r"""Lay a conversation out as one text, and tell the answers in it from the rest.

With a chat template, the layout is the template's, BOS included. Where an answer starts is what the template itself
says: the text it renders for the messages before the answer with ``add_generation_prompt``, which must be how the whole
text begins, or generation would start from other text than training did. The answer ends behind the special token that
closes it. A template that marks answers with ``{% generation %}`` is believed instead, also where its prompt is no such
beginning; it only need close its answers. Any other template is refused, and so is one that leaves a message out.

Without one, it is the Alpaca prompt (github.com/tatsu-lab/stanford_alpaca), repeated for further turns; a system
message stands in place of Alpaca's first sentence:

    {system}\n\n### Instruction:\n{content}\n\n### Input:\n{input}\n\n### Response:\n{answer}{EOS}\n\n### Instruction: …
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from goat_ds.data.formats import Message, Record
from goat_ds.errors import ConfigError

ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)
HEADINGS = {"user": "Instruction"}
"""What Alpaca calls a role; others go by their own name."""

GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Segment(NamedTuple):
    """A piece of text that is answer, closing token included, or not."""

    text: str
    is_answer: bool


class Layout(NamedTuple):
    """A record as text."""

    segments: list[Segment]
    wants_bos: bool
    """Whether the tokenizer's own BOS goes first; a template writes it itself."""


@dataclass(frozen=True)
class Layouter:
    """Lays out records for one tokenizer."""

    tokenizer: PreTrainedTokenizerBase
    closing: re.Pattern[str]
    """A special token and the white space before it: how an answer is closed."""
    closed: re.Pattern[str]
    """A text that ends with one, but for white space."""

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> "Layouter":
        """Look up, once, the special tokens of ``tokenizer``: some have thousands."""
        added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        special = "|".join(map(re.escape, sorted({*added, *tokenizer.all_special_tokens}, key=len, reverse=True)))
        closing = rf"\s*(?P<token>{special})"
        return cls(tokenizer, re.compile(closing), re.compile(rf"(?s:.*){closing}(?=\s*\Z)"))

    def record(self, record: Record) -> Layout:
        """Lay out a record to train on.

        Raises:
            ConfigError: the chat template refuses the conversation, leaves out a part of it, or does not show where
                an answer begins and ends.
        """
        if record.text:
            return Layout([Segment(f"{record.text}{self.tokenizer.eos_token}", True)], wants_bos=True)
        return self.messages(record.messages)

    def messages(self, messages: Sequence[Message]) -> Layout:
        """Lay out a conversation; one that does not end with an answer becomes a prompt, ready for the next answer.

        Raises:
            ConfigError: as for :meth:`record`.
        """
        if self.tokenizer.chat_template is None:
            return Layout(list(_plain_segments(messages, str(self.tokenizer.eos_token))), wants_bos=True)
        return Layout(self._template_segments([_with_input(message) for message in messages]), wants_bos=False)

    def closing_token(self) -> str:
        """Return the text of the special token that closes an answer.

        Raises:
            ConfigError: as for :meth:`record`.
        """
        probe: list[Message] = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
        text = "".join(segment.text for segment in self.messages(probe).segments)
        found = self.closing.match(text, text.rindex("answer") + len("answer"))
        assert found is not None  # or laying out would have been refused
        return found["token"]

    def _template_segments(self, chat: list[dict[str, str]]) -> list[Segment]:
        text, marked = _render(chat, self.tokenizer)
        for message in chat:
            # Some templates pass over roles they do not know, or content that is no list of images, in silence.
            if _visible(message) not in text:
                role = message["role"]
                raise ConfigError(f'the tokenizer\'s chat template leaves out or changes a message of "{role}"')
        turns = [turn for turn, message in enumerate(chat) if message["role"] == "assistant"]
        prompts = [_render(chat[:turn], self.tokenizer)[0] for turn in turns]
        if marked:
            starts = [len(prompt) for prompt in prompts if text.startswith(prompt)]
            spans = [self._marked_span(text, start, end, starts) for start, end in _merged(marked)]
        else:
            starts = [_start_behind(prompt, text) for prompt in prompts]
            answers = [_visible(chat[turn]) for turn in turns]
            regions = pairwise([*starts, len(text)])
            spans = [self._found_span(text, answer, *region) for answer, region in zip(answers, regions, strict=True)]
        # What a template writes behind the last answer is never predicted: generation has stopped there.
        stop = spans[-1][1] if chat[-1]["role"] == "assistant" else len(text)
        return _cut(text[:stop], starts, spans)

    def _marked_span(self, text: str, start: int, end: int, starts: list[int]) -> tuple[int, int]:
        """Move the ends of a marked span: from behind the prompt for it to behind the token that closes it."""
        # The prompt for an answer is given when it is generated, also where the tags include it.
        start = max([start, *(prompt for prompt in starts if start < prompt < end)])
        closed = self.closed.match(text[:end], start) or self.closing.match(text, end)
        if closed is None:
            raise ConfigError(
                "the tokenizer's chat template marks an answer with {% generation %} that no special token closes"
            )
        return start, closed.end()

    def _found_span(self, text: str, answer: str, start: int, stop: int) -> tuple[int, int]:
        """Find ``answer`` between ``start`` and ``stop``, and the token that closes it."""
        place = text.find(answer, start, stop)
        while place >= 0:
            closed = self.closing.match(text, place + len(answer), stop)
            if closed is not None:
                return start, closed.end()
            place = text.find(answer, place + 1, stop)
        raise ConfigError(
            "the tokenizer's chat template does not close an answer with a special token: "
            "mark answers in it with {% generation %}"
        )


def _plain_segments(messages: Sequence[Message], eos: str) -> Iterator[Segment]:
    given = "" if messages[0]["role"] == "system" else _preamble(messages)
    for message in messages:
        if message["role"] == "assistant":
            yield Segment(f"{given}### Response:\n", False)
            yield Segment(f"{message['content']}{eos}", True)
            given = "\n\n"
        elif message["role"] == "system":
            given += f"{message['content']}\n\n"
        else:
            given += f"### {HEADINGS.get(message['role'], message['role'].capitalize())}:\n{message['content']}\n\n"
            given += f"### Input:\n{message['input']}\n\n" if "input" in message else ""
    if messages[-1]["role"] != "assistant":
        yield Segment(f"{given}### Response:\n", False)


def _preamble(messages: Sequence[Message]) -> str:
    return f"{ALPACA_WITH_INPUT if any('input' in message for message in messages) else ALPACA}\n\n"


def _with_input(message: Message) -> dict[str, str]:
    parts = [message["content"], *([message["input"]] if "input" in message else [])]
    return {"role": message["role"], "content": "\n\n".join(parts)}


def _cut(text: str, starts: list[int], spans: list[tuple[int, int]]) -> list[Segment]:
    edges = sorted({0, *starts, *(edge for span in spans for edge in span), len(text)})
    return [
        Segment(text[left:right], any(start <= left and right <= end for start, end in spans))
        for left, right in pairwise(edges)
    ]


def _visible(message: dict[str, str]) -> str:
    # Templates of reasoning models rewrite or leave out the thoughts, but render what comes after them.
    return message["content"].rsplit("</think>", 1)[-1].strip()


def _render(chat: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[tuple[int, int]]]:
    """Return the text of the template, and the spans that its generation tags mark, if it has any."""
    template = tokenizer.get_chat_template()
    variables: dict[str, Any] = dict(tokenizer.special_tokens_map)
    try:
        rendered: Any = render_jinja_template(
            conversations=[chat],
            chat_template=template,
            return_assistant_tokens_mask=GENERATION_TAG.search(template) is not None,
            add_generation_prompt=chat[-1]["role"] != "assistant",
            **variables,
        )
    except TemplateError as error:
        raise ConfigError(f"the tokenizer's chat template refuses this conversation: {error}") from None
    texts, spans = rendered
    return texts[0], spans[0] if spans else []


def _merged(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Join spans that touch: thoughts and the answer after them, or an answer and the token behind it."""
    merged: list[tuple[int, int]] = []
    for start, end in spans:
        touches = bool(merged) and merged[-1][1] == start
        merged[-1:] = [(merged[-1][0], end)] if touches else [*merged[-1:], (start, end)]
    return merged


def _start_behind(prompt: str, text: str) -> int:
    if not text.startswith(prompt):
        raise ConfigError(
            "the tokenizer's chat template renders the prompt for an answer differently from the conversation that "
            f"contains it ({prompt[-60:]!r}): mark answers in it with {{% generation %}}"
        )
    return len(prompt)
