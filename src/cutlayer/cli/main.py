"""The `cutlayer` program: sets the process up, runs one command, turns errors into exit codes.

It does not know what a command does (`app`).
"""

import json
import logging
import os
import sys
import warnings
from collections.abc import Sequence

from cutlayer.errors import EXIT_CODES, AttestationError, CutlayerError

__all__ = ["exit_code_of", "main", "run"]

_ENVIRONMENT = {
    # Spinning OpenMP barriers slow the other side of a shared machine down many times over.
    "OMP_WAIT_POLICY": "PASSIVE",
    "GRPC_VERBOSITY": "ERROR",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}
_USAGE, _INTERRUPTED = 2, 130


def main() -> None:
    """Entry point of the installed command."""
    # Before torch is imported: it reads OMP_WAIT_POLICY once.
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    logging.basicConfig(level=logging.WARNING, format="warning: %(message)s")
    # Libraries' notes to programmers say nothing to whoever types a command.
    warnings.filterwarnings("ignore", category=FutureWarning)
    # It misses a kernel that we do not use, and PEFT imports it with every command.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    sys.exit(run(sys.argv[1:]))


def run(argv: Sequence[str]) -> int:
    """Run one command line; the exit code.

    Args:
        argv: arguments without the program's name. `--debug` lets errors of ours through with
            their traceback.
    """
    from cutlayer.cli.app import app

    flags = argv[: argv.index("--")] if "--" in argv else argv
    try:
        app(args=list(argv), prog_name="cutlayer")
    except SystemExit as exit_:
        code = _code(exit_)
        if code == _USAGE and "--json" in flags and not _is_reported(exit_):
            _print_json("UsageError", "the command line is wrong; see the text above", code)
        if code == _INTERRUPTED:
            _report_interrupt("--json" in flags)
        return code
    except CutlayerError as error:
        if "--debug" in flags:
            raise
        return _report(error, "--json" in flags)
    return 0


def exit_code_of(error: CutlayerError) -> int:
    """The exit code of the nearest class that has one."""
    return next(EXIT_CODES[kind] for kind in type(error).__mro__ if kind in EXIT_CODES)


def _report(error: CutlayerError, as_json: bool) -> int:
    code = exit_code_of(error)
    text = " ".join(str(error).split()) or type(error).__name__
    is_colour = sys.stderr.isatty() and "NO_COLOR" not in os.environ
    line = f"\x1b[31merror: {text}\x1b[0m" if is_colour else f"error: {text}"
    print(line, file=sys.stderr, flush=True)
    if as_json:
        _print_json(type(error).__name__, text, code, _refusal_of(error))
    return code


def _refusal_of(error: CutlayerError) -> str:
    return error.refusal if isinstance(error, AttestationError) else ""


def _report_interrupt(as_json: bool) -> None:
    text = "interrupted; what was saved stays"
    print(text, file=sys.stderr, flush=True)
    if as_json:
        _print_json("Interrupted", text, _INTERRUPTED)


def _print_json(error: str, message: str, exit_code: int, refusal: str = "") -> None:
    named = {"refusal": refusal} if refusal else {}
    values = {"error": error, "message": message, "exit_code": exit_code, **named}
    print(json.dumps(values), flush=True)


def _code(exit_: SystemExit) -> int:
    return exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)


def _is_reported(exit_: SystemExit) -> bool:
    """A command that printed its result and then says with its exit code that it found faults."""
    from typer import Exit

    return isinstance(exit_.__context__, Exit)


if __name__ == "__main__":
    main()
