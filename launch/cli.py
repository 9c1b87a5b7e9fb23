"""The `qarl` command: picks the module of a command in `launch/commands`, and turns errors into exit codes."""

import argparse
import errno
import os
import select
import signal
import sys
from collections.abc import Sequence
from importlib import import_module, metadata
from types import FrameType
from typing import Any

COMMANDS = {
    "train": "run, or continue, a training run",
    "fetch": "download and convert the pretrained model that a config names",
    "submit": "run on a Ray cluster, as a job",
    "plan": "whether a run fits, and whether quantized rollouts pay; loads no weights",
    "simulate": "throughput, idle shares, staleness and the best split of devices, in virtual time",
    "report": "write the report of a run again, or one page for several",
    "compare": "runs side by side: their last figures, and the settings that differ; writes the page, too",
    "trace": "write a Chrome trace of a run: who worked when",
    "runs": "list the runs in a folder: state, step, accuracy, age",
    "eval": "held-out accuracy of a run's model, or of another, in one or several schemes",
    "export": "write a run's newest checkpoint as a model folder, checked with vLLM",
    "split-outliers": "write a model with outlier channels split: the same function",
    "dashboard": "write the W&B workspace of a project",
    "study": "run the arms of an experiment over several seeds, and compare them",
    "sweep": "run every combination of listed values, and compare them; needs no account",
    "mismatch": "where the gap between learner and engine comes from",
    "doctor": "what this machine has for a run, and what it lacks",
    "chaos": "inject faults into real runs, and count what they come to",
    "config": "show or list configs, or all of their keys",
    "bench": "measure a part on this machine",
}
"""Every command with its line of help; `launch/commands` has a module for each."""
SETTINGS = "; settings are key=value, such as train.steps=10"
REFUSALS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}
"""Of a file system, when the error does not name the file: a full disk, a folder that may not be written."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code: 0 done, 1 a run failed, 2 wrong input, 3 it diverged, 130 interrupted."""
    argv = sys.argv[1:] if argv is None else argv
    # accelerate imports DeepSpeed also here, where it computes nothing: without this it warns that there is no GPU.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as `nohup` sets it
            signal.signal(number, _interrupt)
    from qarl.errors import INTERRUPTED, QarlError  # late: `qarl --help` needs none of the package

    try:
        args = _parse(argv)
        code = _run(args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        if not _reader_is_gone():
            raise
        return 128 + signal.SIGPIPE
    except (QarlError, OSError) as error:
        is_told = isinstance(error, QarlError) or error.filename or error.errno in REFUSALS
        if os.environ.get("QARL_TRACEBACK") or not is_told:
            raise
        if not isinstance(error, QarlError):
            error = QarlError(error.strerror or str(error), str(error.filename or ""))
        for line in str(error).splitlines():
            print(f"qarl: {line}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # a second one would cut the end short
            signal.signal(number, signal.SIG_IGN)
        starts = argv[0] == "train" and "--dry-run" not in argv
        print(f"qarl: {INTERRUPTED}" if starts else "qarl: interrupted", file=sys.stderr)
        return 130


def _run(args: argparse.Namespace) -> int:
    from qarl.errors import behind

    try:
        return int(args.run(args))
    except SystemError as error:
        if (cause := behind(error)) is error:
            raise
        raise cause from cause.__cause__


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    if "_ARGCOMPLETE" in os.environ:
        _complete()
    words = [word for word in argv if not word.startswith("-")]
    if not words or argv[0] == "--version":
        words = [*argv, ""]
    return _parser(words[0]).parse_args(argv)


class _Parser(argparse.ArgumentParser):
    """Each command reports its unknown arguments with its own usage; abbreviated options are refused."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **settings)

    def parse_known_args(  # type: ignore[override]  # it has overloads
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        found, rest = super().parse_known_args(args, namespace)
        has_settings, unknown = hasattr(found, "overrides"), " ".join(rest)
        if rest and has_settings and not any(item.startswith("-") for item in rest):
            # argparse itself takes no `key=value` after an option that follows the config
            found.overrides = [*found.overrides, *rest]
        elif rest:
            is_setting = has_settings and (" " in unknown or "=" in unknown)
            self.error(f"unrecognized arguments: {unknown}{SETTINGS * is_setting}")
        return found, []


def _complete() -> None:
    """Answer a shell that asks for completions, and exit."""
    import argcomplete

    words = os.environ["COMP_LINE"].split()
    argcomplete.autocomplete(_parser(words[1] if len(words) > 1 else ""))


def _reader_is_gone() -> bool:
    """Whether nobody reads standard output any more, as behind `| head`; what is left of it is then dropped."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), select.POLLOUT)
    is_gone = any(event & select.POLLERR for _, event in poll.poll(0))
    if is_gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return is_gone


def _parser(command: str) -> argparse.ArgumentParser:
    """The parser, with the arguments of `command` alone: only its module is imported."""
    parser = _Parser(
        prog="qarl",
        description="Quantized-rollout RL for LLMs.",
        epilog="QARL_TRACEBACK=1 shows the traceback behind an error.",
    )
    version = metadata.version("qarl") if command == "--version" else ""
    parser.add_argument("--version", action="version", version=f"qarl {version}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, line in COMMANDS.items():
        added = commands.add_parser(name, help=line, formatter_class=argparse.RawDescriptionHelpFormatter)
        if name == command:
            module = import_module(f"launch.commands.{name.replace('-', '_')}")
            added.description = module.__doc__
            added.epilog = f"examples:\n{module.EXAMPLES}"
            added.set_defaults(run=module.run)
            module.add_arguments(added)
    return parser


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
