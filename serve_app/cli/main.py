"""Entry point of `t5-serve`: its commands, and how it ends."""

from __future__ import annotations

import importlib
import os
import sys

import click

from serve_app.cli.errors import one_line

# Imported when named, and light then too: Ray and torch take seconds to import, so each command
# imports what it needs where it needs it.
_COMMANDS = {
    "run": "serve_app.cli.run",
    "summarize": "serve_app.cli.summarize",
    "tokens": "serve_app.cli.tokens",
    "usage": "serve_app.cli.usage",
    "limits": "serve_app.cli.limits",
    "bench": "serve_app.cli.bench",
    "tune": "serve_app.cli.tune",
    "version": "serve_app.cli.version",
}
_INTERRUPTED = 130  # 128 + SIGINT, as shells count


class _Commands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        command = importlib.import_module(_COMMANDS[cmd_name]).command
        assert isinstance(command, click.Command)
        return command


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
def cli() -> None:
    """Self-hosted text summarization with T5 on Ray Serve.

    \b
      t5-serve run                         start the service with the bundled demo model
      t5-serve summarize report.txt        summarize a file with it
      t5-serve tokens create web-shop      let another program use it
      t5-serve usage                       see who calls, how often and how well

    `t5-serve COMMAND --help` tells more, with examples.
    """


def main() -> None:
    """Run the command line and exit: 0, 2 after an error told in one line, 130 after Ctrl-C."""
    sys.exit(_run())


def _run() -> int:
    try:
        status = cli.main(prog_name="t5-serve", standalone_mode=False)
        sys.stdout.flush()
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return error.exit_code
    except click.UsageError as error:
        where = error.ctx.command_path if error.ctx is not None else "t5-serve"
        _complain(f"{error.format_message().rstrip('.')}; see {where} --help")
        return 2
    except click.ClickException as error:
        _complain(error.format_message())
        return 2
    except (click.Abort, KeyboardInterrupt):
        return _INTERRUPTED
    except BrokenPipeError:
        # Whoever read stdout has seen enough; keep the interpreter from flushing it once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return status if isinstance(status, int) else 0


def _complain(message: str) -> None:
    click.echo(f"t5-serve: {one_line(message)}", err=True)


if __name__ == "__main__":
    main()
