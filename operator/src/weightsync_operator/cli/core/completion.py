"""What a shell offers at the cursor."""

from collections.abc import Callable, Iterable, Sequence
from typing import Final

OPTIONS_WITH_A_VALUE: Final = frozenset(
    {
        *("-n", "--namespace", "--kubeconfig", "--context", "-o", "--output", "--timeout", "--version"),
        *("--operator", "--operator-url", "--service-account"),
    }
)


def candidates(
    words: Sequence[str],
    commands: dict[str, Sequence[str]],
    names: Callable[[], Iterable[str]],
) -> list[str]:
    """``words``: what was typed after the command, the unfinished one last. ``commands``: each with its options."""
    *before, unfinished = words or [""]
    positional = _positional(before)
    if before and before[-1] in OPTIONS_WITH_A_VALUE:
        offered: Iterable[str] = ("text", "json") if before[-1] in ("-o", "--output") else ()
    elif not positional:
        offered = commands
    elif unfinished.startswith("-"):
        offered = commands.get(positional[0], ())
    elif len(positional) == 1 and positional[0] == "completion":
        offered = ("bash", "zsh", "fish")
    elif len(positional) == 1 and positional[0] in commands:
        offered = names()
    elif len(positional) == 2 and positional[0] == "pin":
        offered = ("latest",)
    else:
        offered = ()
    return sorted(each for each in offered if each.startswith(unfinished))


def option_value(words: Sequence[str], *options: str) -> str:
    """What was given for an option, in either form; empty if it was not."""
    for at, word in enumerate(words):
        if word in options and at + 1 < len(words):
            return words[at + 1]
        head, equals, value = word.partition("=")
        if equals and head in options:
            return value
    return ""


def _positional(words: Sequence[str]) -> list[str]:
    found, skip = [], False
    for word in words:
        if skip:
            skip = False
        elif word in OPTIONS_WITH_A_VALUE:
            skip = True
        elif not word.startswith("-"):
            found.append(word)
    return found
