"""The command line: `jaxq convert`, `inspect`, `doctor` and `bench`. Needs the extra `cli`."""

from __future__ import annotations

import signal
import sys


def _stop(signum: int, frame: object) -> None:
    """Ends as a shell expects, but by an exception: what is half written is removed on its way."""
    raise SystemExit(128 + signum)


def main() -> None:
    """The entry point. Exit codes: 0 done, 1 an error that is told, 2 a wrong use of the command."""
    try:
        from jaxq.cli.app import app
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        print(f"jaxq: the command line needs {error.name}: pip install 'jaxq[cli]'", file=sys.stderr)
        raise SystemExit(1) from None
    signal.signal(signal.SIGTERM, _stop)
    app()
