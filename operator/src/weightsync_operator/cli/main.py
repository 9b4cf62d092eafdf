"""Entry points: ``weightsync``, ``kubectl weightsync``, and what kubectl asks for completion."""

import argparse
import asyncio
import os
import sys
from collections.abc import Sequence
from typing import Final

from weightsync_operator.cli.arguments import make_parser, parse
from weightsync_operator.cli.cluster import Cluster
from weightsync_operator.cli.commands import run
from weightsync_operator.cli.core.completion import candidates, option_value
from weightsync_operator.cli.core.exits import Exit
from weightsync_operator.cli.scripts import COMPLETION
from weightsync_operator.kube.errors import KubeError

_NO_FILES: Final = ":4"
"""To kubectl: what was offered is all there is, offer no files."""
_COMPLETION_SECONDS: Final = 3.0


def main(arguments: Sequence[str] | None = None, prog: str = "weightsync") -> int:
    """Run a command; answers its exit code (see `Exit`)."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["__complete"]:
        print("\n".join(complete(words[1:])))
        return Exit.DONE
    given = parse(prog, words)
    if given.command == "completion":
        print(COMPLETION[given.shell], end="")
        return Exit.DONE
    try:
        return asyncio.run(run(given))
    except KeyboardInterrupt:
        return Exit.INTERRUPTED
    except BrokenPipeError:
        # Whoever read has seen enough; Python is not to complain at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return Exit.FAILED


def plugin() -> int:
    """``kubectl weightsync``."""
    return main(prog="kubectl weightsync")


def kubectl_complete() -> int:
    """kubectl runs ``kubectl_complete-weightsync`` with what was typed after ``kubectl weightsync``."""
    print("\n".join([*complete(sys.argv[1:]), _NO_FILES]))
    return Exit.DONE


def complete(words: Sequence[str]) -> list[str]:
    """What fits at the cursor."""
    return candidates(words, _options(make_parser("weightsync")), lambda: _names(words))


def _options(parser: argparse.ArgumentParser) -> dict[str, Sequence[str]]:
    (commands,) = (each for each in parser._actions if isinstance(each, argparse._SubParsersAction))
    return {
        name: [option for action in made._actions for option in action.option_strings]
        for name, made in commands.choices.items()
    }


def _names(words: Sequence[str]) -> list[str]:
    """WeightSyncs of the namespace that the words name; none if they can't be had soon."""

    async def ask() -> list[str]:
        cluster = Cluster(
            option_value(words, "--kubeconfig"),
            option_value(words, "--context"),
            option_value(words, "-n", "--namespace"),
        )
        try:
            async with asyncio.timeout(_COMPLETION_SECONDS):
                return [str(each["metadata"]["name"]) for each in await cluster.weightsyncs()]
        finally:
            cluster.close()

    try:
        return asyncio.run(ask())
    except (KubeError, TimeoutError):
        return []


if __name__ == "__main__":
    sys.exit(main())
