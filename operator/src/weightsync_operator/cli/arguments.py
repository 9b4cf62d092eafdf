"""The command line: what there is, and what it says of itself."""

import argparse
from collections.abc import Sequence
from typing import Final

from weightsync_operator.cli.core.durations import parse_duration
from weightsync_operator.cli.core.exits import MEANINGS
from weightsync_operator.cli.core.verbs import Verb
from weightsync_operator.release import own_version

SHELLS: Final = ("bash", "zsh", "fish")
_WAIT_SECONDS: Final = 30.0

_DESCRIPTION: Final = """\
See and steer what keeps your inference pods on a trainer's newest weights.

A WeightSync names a trainer and inference pods; the operator brings each published version to all of them.
"""

_EXAMPLES: Final = """\
examples:
  {prog} get                              # all WeightSyncs of the namespace
  {prog} status policy                    # the fleet: who has which version, who lags, and why
  {prog} get policy --watch               # live, until the rollout is done; then the exit code tells
  {prog} pause policy                     # no new phase starts; resume goes on
  {prog} rollback policy                  # back to the version before
  {prog} pin policy run-7f3a/900          # stay on this version; pin policy latest follows the trainer again
  {prog} doctor policy                    # what will go wrong, and what to do

exit codes:
{codes}
"""

_HELP: Final = {
    Verb.PAUSE: (
        "no new phase starts until it is resumed",
        "Sets spec.paused. A switch that is under way ends; members go on serving what they have.",
    ),
    Verb.RESUME: ("go on after pause", "Clears spec.paused."),
    Verb.ABORT: (
        "give a rollout up",
        "Members that have not switched yet keep what they serve. The version is not tried again until retry, or until "
        "spec or membership change.",
    ),
    Verb.RETRY: (
        "try a version again that failed or was aborted",
        "A failed version is left alone until something changes; this is something.",
    ),
    Verb.PROMOTE: (
        "end the pause between two steps",
        "With strategy.steps a rollout waits after a step; this lets the next one begin.",
    ),
    Verb.ROLLBACK: (
        "go back to the version before",
        "To the version that the fleet had before this one, or to --version. The trainer has to keep a copy of it: "
        "spec.trainer.retainedVersions. A version that is published from now on is brought as usual; to stay where "
        "you are, pin.",
    ),
    Verb.PIN: (
        "stay on a version, or follow the newest again",
        "Sets spec.target. VERSION is run/number as status shows it, a number of the present run, or latest.",
    ),
}


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """One line a command, whatever its name's length."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28, width=110)


def make_parser(prog: str) -> argparse.ArgumentParser:
    """The whole command line."""
    codes = "\n".join(f"  {code.value:<3}  {meaning}" for code, meaning in MEANINGS.items())
    parser = argparse.ArgumentParser(
        prog,
        description=_DESCRIPTION,
        epilog=_EXAMPLES.format(prog=prog, codes=codes),
        formatter_class=_Formatter,
    )
    parser.add_argument("--version", action="version", version=f"weightsync {own_version()}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    common, output, live = _cluster_options(), _output_options(), _live_options()

    status = _command(
        commands,
        "status",
        [common, output, live],
        "one fleet: conditions, and each pod's rank, version, phase and bytes",
        "Bytes and phases of pods come from the operator. Where it can't be asked, what status and pods say is shown, "
        "with what is missing to ask it. A trainer's pod is marked by *.",
    )
    status.add_argument("name", metavar="NAME")

    get = _command(
        commands,
        "get",
        [common, output, live],
        "all WeightSyncs, or one; --watch stays until its rollout is done",
        "With --watch it ends when the fleet has the newest version (0), when the rollout failed (1), or at "
        "--timeout (3).",
    )
    get.add_argument("name", metavar="NAME", nargs="?", default="")
    get.add_argument("-w", "--watch", action="store_true", help="show it live; ends when the rollout is done")
    get.add_argument("-A", "--all-namespaces", action="store_true", help="WeightSyncs of all namespaces")
    _timeout(get, 0.0, "with --watch, end after this; default: never")

    for verb in Verb:
        brief, more = _HELP[verb]
        made = _command(commands, verb, [common, output], brief, more)
        made.add_argument("name", metavar="NAME")
        if verb is Verb.PIN:
            made.add_argument("of", metavar="VERSION", help="run/number, number, or latest")
        elif verb not in (Verb.PAUSE, Verb.RESUME):
            made.add_argument(
                "--version",
                dest="of",
                default="",
                metavar="VERSION",
                help="which version is meant; else the present one",
            )
        made.add_argument("--no-wait", action="store_true", help="don't wait for the operator's answer")
        _timeout(made, _WAIT_SECONDS, "wait as long for the operator's answer; 30s")

    doctor = _command(
        commands,
        "doctor",
        [common, output, live],
        "find trouble before it bites, and say what to do",
        "Looks at CRD, operator, selectors, agents, users, vLLM's settings, GPUs, ports and NetworkPolicies. Exit code "
        "1 if there is a problem; warnings are none.",
    )
    doctor.add_argument("name", metavar="NAME", nargs="?", default="", help="this WeightSync only")

    completion = commands.add_parser(
        "completion",
        help="print what makes a shell complete this command",
        description="bash: source <(weightsync completion bash). kubectl completes `kubectl weightsync` by itself "
        "where kubectl_complete-weightsync is on PATH, which comes along.",
    )
    completion.add_argument("shell", choices=SHELLS)
    return parser


def parse(prog: str, arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line; exits with 2 for what can't be."""
    parser = make_parser(prog)
    given = parser.parse_args(arguments)
    if given.command == "get" and given.watch and not given.name:
        parser.error("--watch follows one WeightSync: name it")
    if given.command == "get" and given.name and given.all_namespaces:
        parser.error("a name is in one namespace: leave --all-namespaces out, or the name")
    return given


def _command(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
    name: str,
    parents: Sequence[argparse.ArgumentParser],
    brief: str,
    more: str,
) -> argparse.ArgumentParser:
    return commands.add_parser(
        name, parents=list(parents), help=brief, description=f"{brief[0].upper()}{brief[1:]}. {more}"
    )


def _cluster_options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False)
    group = parser.add_argument_group("the cluster, as kubectl finds it")
    group.add_argument("-n", "--namespace", default="", metavar="NS", help="else the context's")
    group.add_argument(
        "--kubeconfig", default="", metavar="FILE", help="else KUBECONFIG, else ~/.kube/config"
    )
    group.add_argument("--context", default="", help="else the current one")
    return parser


def _output_options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("-o", "--output", choices=("text", "json"), default="text", help="default: text")
    return parser


def _live_options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False)
    group = parser.add_argument_group("the operator, who knows the live fleet")
    group.add_argument(
        "--operator",
        default="",
        metavar="NS/SERVICE",
        help="its Service; else that of the namespace's certificates, else weightsync-system/weightsync-operator",
    )
    group.add_argument(
        "--operator-url", default="", metavar="URL", help="dial it here, not through the API server's proxy"
    )
    group.add_argument(
        "--service-account",
        default="",
        metavar="NAME",
        help="ServiceAccount of the namespace to speak to it as; any will do, else default",
    )
    return parser


def _timeout(parser: argparse.ArgumentParser, default: float, text: str) -> None:
    parser.add_argument("--timeout", type=_duration, default=default, metavar="T", help=text)


def _duration(text: str) -> float:
    try:
        return parse_duration(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
