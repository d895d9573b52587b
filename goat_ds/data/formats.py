"""Turn one record of any of the known formats into a conversation or a text.

What becomes of a record:

- It is *wrong* when it does not have the shape of its format: a missing or non-text field, an unknown role, something
  that is no object at all. Wrong records stop the run (``ConfigError``): whoever wrote them meant something else.
- It is *dropped*, with a reason that is counted, when its shape is right but there is nothing to learn from it: see
  :class:`DropReason`. Real data sets hold some of these.
- Messages after the last answer are cut off: no loss is taken there, so they would only cost time.
"""

from collections.abc import Collection, Mapping, Sequence
from enum import StrEnum
from typing import Any, NamedTuple, NotRequired, TypedDict

from goat_ds.errors import ConfigError


class DataFormat(StrEnum):
    """The shapes a record may have; the value is what ``--data_format`` takes."""

    ALPACA = "alpaca"
    """``instruction``, ``output`` and perhaps ``input``."""
    SHAREGPT = "sharegpt"
    """``conversations``: a list of ``{from, value}``."""
    MESSAGES = "messages"
    """``messages``: a list of ``{role, content}``."""
    PROMPT_COMPLETION = "prompt_completion"
    """``prompt`` and ``completion``: two texts (one question, its answer) or two lists of messages (as in TRL)."""
    TEXT = "text"
    """``text``: trained on as a whole, in no template."""


NEEDED_COLUMNS: dict[DataFormat, tuple[str, ...]] = {
    # In the order in which they are tried: a set that brings a ready-made "text" column besides its parts is
    # recognised by the parts, because only they tell the answer from the question.
    DataFormat.MESSAGES: ("messages",),
    DataFormat.SHAREGPT: ("conversations",),
    DataFormat.PROMPT_COMPLETION: ("prompt", "completion"),
    DataFormat.ALPACA: ("instruction", "output"),
    DataFormat.TEXT: ("text",),
}

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "system": "system",
    # Kept for templates that have them; a template that drops them is refused when it is applied.
    "developer": "developer",
    "function": "function",
    "ipython": "ipython",
    "tool": "tool",
    "observation": "tool",
}


MAX_PROBLEMS = 10
"""Problems of one kind reported in full; the rest are counted."""


class DropReason(StrEnum):
    """Why a well-formed record is not trained on."""

    EMPTY_TEXT = "empty text"
    EMPTY_ANSWER = "empty answer"
    NO_ANSWER = "no answer"
    NO_QUESTION = "no question before the answer"
    NO_LABEL_LEFT = "no label token left after truncation"


class Message(TypedDict):
    """One turn of a conversation."""

    role: str
    content: str
    input: NotRequired[str]
    """Alpaca's further context for a user's ``content``, kept apart because layouts place it differently."""


class Record(NamedTuple):
    """One record to train on: a conversation that ends with an answer, or a text."""

    origin: str
    """File and line, to find it again."""
    messages: list[Message]
    """Empty if the record is a text."""
    text: str
    """Empty if the record is a conversation."""


class Dropped(NamedTuple):
    """A record that was read and is not trained on."""

    origin: str
    reason: DropReason


def recognise(columns: Collection[str]) -> DataFormat | None:
    """Return the format that a record with these columns has, or nothing."""
    for data_format, needed in NEEDED_COLUMNS.items():
        if all(column in columns for column in needed):
            return data_format
    return None


def convert(raw: Any, *, data_format: DataFormat | None, origin: str) -> Record | Dropped:
    """Turn one record as it was read into a conversation or a text.

    Args:
        raw: What the source holds; in a right record, a mapping.
        data_format: The format the user named; without it, the one the record's columns tell.
        origin: File and line, put in front of what is wrong.

    Raises:
        ConfigError: the record is wrong.
    """
    try:
        if not isinstance(raw, Mapping):
            raise ConfigError(f"a record must be an object with named fields, not {_kind(raw)}")
        data_format = data_format or _recognised(raw)
        if data_format is DataFormat.TEXT:
            return _text_record(_text(raw, "text"), origin)
        return _conversation(_CONVERTERS[data_format](raw), origin)
    except ConfigError as error:
        raise ConfigError(*(f"{origin}: {problem}" for problem in error.problems)) from None


def first_problems(problems: Sequence[str], *, where: str) -> list[str]:
    """Return the first ``MAX_PROBLEMS`` of them and, if there are more, a line that counts the rest."""
    more = len(problems) - MAX_PROBLEMS
    return [*problems[:MAX_PROBLEMS], *([f"{where}: {more:,} more problems like these"] if more > 0 else [])]


def _recognised(raw: Mapping[str, Any]) -> DataFormat:
    # In a table every row has every column: one that is null here says nothing about this row.
    found = recognise([column for column, value in raw.items() if value is not None]) or recognise(raw)
    if found is None:
        known = [" and ".join(f'"{column}"' for column in needed) for needed in NEEDED_COLUMNS.values()]
        has = ", ".join(f'"{column}"' for column in raw) or "nothing"
        raise ConfigError(f"neither {', '.join(known[:-1])} nor {known[-1]}: it has {has}")
    return found


def _text_record(text: str, origin: str) -> Record | Dropped:
    return Record(origin, [], text) if text.strip() else Dropped(origin, DropReason.EMPTY_TEXT)


def _conversation(messages: list[Message], origin: str) -> Record | Dropped:
    answers = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        return Dropped(origin, DropReason.NO_ANSWER)
    if any(not messages[place]["content"].strip() for place in answers):
        return Dropped(origin, DropReason.EMPTY_ANSWER)
    asked = [message for message in messages[: answers[0]] if message["role"] != "system"]
    if not any(message["content"].strip() or message.get("input", "") for message in asked):
        return Dropped(origin, DropReason.NO_QUESTION)
    return Record(origin, messages[: answers[-1] + 1], "")


def _from_alpaca(raw: Mapping[str, Any]) -> list[Message]:
    question: Message = {"role": "user", "content": _text(raw, "instruction")}
    further = _text(raw, "input") if "input" in raw else ""
    if further.strip():
        question["input"] = further
    return [*_system(raw), question, {"role": "assistant", "content": _text(raw, "output")}]


def _from_sharegpt(raw: Mapping[str, Any]) -> list[Message]:
    return [*_system(raw), *_turns(raw, "conversations")]


def _from_messages(raw: Mapping[str, Any]) -> list[Message]:
    return [*_system(raw), *_turns(raw, "messages")]


def _from_prompt_completion(raw: Mapping[str, Any]) -> list[Message]:
    if isinstance(raw.get("prompt"), list) or isinstance(raw.get("completion"), list):
        return [*_system(raw), *_turns(raw, "prompt"), *_turns(raw, "completion")]
    prompt, completion = _text(raw, "prompt"), _text(raw, "completion")
    return [*_system(raw), {"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]


_CONVERTERS = {
    DataFormat.ALPACA: _from_alpaca,
    DataFormat.SHAREGPT: _from_sharegpt,
    DataFormat.MESSAGES: _from_messages,
    DataFormat.PROMPT_COMPLETION: _from_prompt_completion,
}


def _system(raw: Mapping[str, Any]) -> list[Message]:
    # Many published sets carry the system prompt in a column of its own.
    text = _text(raw, "system") if "system" in raw else ""
    return [{"role": "system", "content": text}] if text.strip() else []


def _turns(raw: Mapping[str, Any], column: str) -> list[Message]:
    turns = raw.get(column)
    if not isinstance(turns, list):
        raise ConfigError(f'"{column}" must be a list of messages, not {_kind(turns)}')
    return [_turn(turn, f"{column}[{place}]") for place, turn in enumerate(turns)]


def _turn(turn: Any, where: str) -> Message:
    if not isinstance(turn, Mapping):
        raise ConfigError(f"{where} must be an object, not {_kind(turn)}")
    role_key, content_key = ("from", "value") if "from" in turn else ("role", "content")
    if turn.get(role_key) not in ROLES:
        raise ConfigError(f'{where}: "{role_key}" is {turn.get(role_key)!r}, none of {", ".join(ROLES)}')
    if not isinstance(turn.get(content_key), str):
        raise ConfigError(f'{where}: "{content_key}" must be text, not {_kind(turn.get(content_key))}')
    return {"role": ROLES[turn[role_key]], "content": turn[content_key]}


def _text(raw: Mapping[str, Any], column: str) -> str:
    if column not in raw:
        raise ConfigError(f'no "{column}"')
    value = raw[column]
    if value is None:  # how tables write an empty cell
        return ""
    if not isinstance(value, str):
        raise ConfigError(f'"{column}" must be text, not {_kind(value)}')
    return value


def _kind(value: Any) -> str:
    kinds = {type(None): "null", list: "a list", dict: "an object", str: "text", bool: "true or false"}
    return kinds.get(type(value), "a number" if isinstance(value, (int, float)) else type(value).__name__)
