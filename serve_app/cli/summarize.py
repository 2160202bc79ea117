"""`t5-serve summarize`: a file to its summary, through a running service."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from serve_app.cli.errors import CliError

if TYPE_CHECKING:
    import httpx

_CONNECT_S = 10.0
_SILENCE_S = 60.0  # of a stream; the service sends a comment every 10 s
_GRACE_S = 10.0  # that the service may take to tell that its deadline has passed
LOOPBACK = ("127.0.0.1", "localhost", "::1")


@click.command("summarize")
@click.argument("file", metavar="FILE|-")
@click.option(
    "--url",
    envvar="T5_SERVE_URL",
    default="http://127.0.0.1:8000",
    show_default=True,
    help="The service. [env: T5_SERVE_URL]",
)
@click.option(
    "--token",
    envvar="T5_SERVE_TOKEN",
    help="API token. Default, for a service on this machine: the development token of "
    "`t5-serve run`. [env: T5_SERVE_TOKEN]",
)
@click.option("--words", type=click.IntRange(1), help="At most so many words, whole sentences.")
@click.option("--sentences", type=click.IntRange(1), help="At most so many sentences.")
@click.option("--num-beams", type=click.IntRange(1), help="Beam search width; 1 is greedy.")
@click.option("--max-new-tokens", type=click.IntRange(1), help="At most so many tokens.")
@click.option(
    "--on-overflow",
    type=click.Choice(["error", "truncate", "map_reduce"]),
    help="A text longer than the model's input: refuse it, cut it, or summarize its parts and "
    "then their summaries (the default).",
)
@click.option(
    "--timeout", type=click.FloatRange(0, min_open=True), help="Deadline of the request, seconds."
)
@click.option("--json", "as_json", is_flag=True, help="Print the whole answer as JSON.")
@click.option("--no-stream", is_flag=True, help="Ask for the answer in one piece.")
@click.pass_context
def command(ctx: click.Context, /, file: str, url: str, token: str | None, **options: Any) -> None:
    """Summarize FILE (UTF-8 text; - reads stdin) with a running service.

    The summary goes to stdout as it is written; progress on a long text goes to stderr when that
    is a terminal.

    \b
    Examples:
      t5-serve summarize report.txt
      t5-serve summarize report.txt --words 60
      pdftotext paper.pdf - | t5-serve summarize - --sentences 3
      t5-serve summarize report.txt --json | jq .usage
      T5_SERVE_TOKEN=t5s_… t5-serve summarize report.txt --url https://summaries.example.org
    """
    import httpx

    stream = not options.pop("no_stream")
    as_json = options.pop("as_json")
    body = _body(_read(file), stream, options)
    try:
        local = httpx.URL(url).host in LOOPBACK
    except httpx.InvalidURL as error:
        raise CliError(f"--url {url}: {error}") from None
    token = token or (dev_token() if local else None)
    headers = {"Authorization": f"Bearer {checked_token(token)}"} if token else {}
    silence = _SILENCE_S if stream else options["timeout"] and options["timeout"] + _GRACE_S
    timeout = httpx.Timeout(_CONNECT_S, read=silence, write=_SILENCE_S)
    try:
        # A proxy set in the environment cannot reach this machine's own loopback.
        with httpx.Client(headers=headers, timeout=timeout, trust_env=not local) as client:
            address = f"{url.rstrip('/')}/v1/summarize"
            answer = (_streamed if stream else _whole)(client, address, body, not as_json)
    except httpx.HTTPError as error:
        raise CliError(f"{url}: {_reason(error)}") from None
    except KeyboardInterrupt:
        ctx.exit(130)
    if as_json:
        click.echo(json.dumps(answer, ensure_ascii=False, indent=2))
    if answer["truncated"]:
        click.echo("t5-serve: the text was too long: part of it was left out", err=True)


def _read(file: str) -> str:
    try:
        content = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
        return content.decode("utf-8-sig")
    except OSError as error:
        raise CliError(f"{file}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise CliError(f"{file}: not UTF-8 text at byte {error.start}") from None


def _body(text: str, stream: bool, options: dict[str, Any]) -> dict[str, Any]:
    words, sentences = options["words"], options["sentences"]
    if words is not None and sentences is not None:
        raise click.UsageError("give --words or --sentences, not both")
    length = {"words": words} if words is not None else {"sentences": sentences}
    said = {
        "length": length if words is not None or sentences is not None else None,
        "num_beams": options["num_beams"],
        "max_new_tokens": options["max_new_tokens"],
        "on_overflow": options["on_overflow"],
        "timeout_s": options["timeout"],
    }
    given = {name: value for name, value in said.items() if value is not None}
    return {"text": text, "stream": stream, **given}


def dev_token() -> str | None:
    """The token that `t5-serve run` made on this machine."""
    from serve_app.tokens import default_tokens_file, read_dev_token

    return read_dev_token(default_tokens_file())


def checked_token(token: str) -> str:
    """The token without white space around it.

    Raises:
        CliError: it cannot stand in a header.
    """
    token = token.strip()
    if not token.isascii() or not token.isprintable() or " " in token:
        raise CliError("the token holds characters that no token has")
    return token


def _whole(client: httpx.Client, address: str, body: dict[str, Any], show: bool) -> Any:
    response = client.post(address, json=body)
    if response.is_error:
        _refused(response)
    answer = _json(response)
    if show:
        click.echo(answer["summary"])
    return answer


def _streamed(client: httpx.Client, address: str, body: dict[str, Any], show: bool) -> Any:
    """Print the summary as it comes. Gives the answer of the `done` event."""
    from httpx_sse import SSEError, connect_sse

    written = False
    progress = _Progress()
    try:
        with connect_sse(client, "POST", address, json=body) as source:
            if source.response.is_error:
                source.response.read()
                _refused(source.response)
            for event in source.iter_sse():
                data = event.json()
                if event.event == "chunk":
                    progress.part(data["chunks"])
                elif event.event == "delta" and show:
                    progress.clear()
                    click.echo(data["text"], nl=False)
                    written = True
                elif event.event == "error":
                    _fail(dict(data))
                elif event.event == "done":
                    return _complete(data)
    except (SSEError, ValueError, LookupError, TypeError):
        raise CliError(f"{address}: the answer is not what t5-serve sends") from None
    finally:
        progress.clear()
        if written:
            click.echo()
    raise CliError(f"{address}: the connection ended before the summary did")


class _Progress:
    """`part 3/12` on a terminal, wiped once the summary comes."""

    def __init__(self) -> None:
        self._shown = sys.stderr.isatty()
        self._done = 0

    def part(self, of: int) -> None:
        self._done += 1
        if self._shown:
            click.echo(f"\r\033[Kpart {self._done}/{of}", nl=False, err=True)

    def clear(self) -> None:
        if self._shown and self._done:
            click.echo("\r\033[K", nl=False, err=True)
            self._done = 0


def _json(response: httpx.Response) -> Any:
    try:
        answer = response.json()
    except ValueError:
        answer = None
    try:
        return _complete(answer)
    except ValueError:
        raise CliError(f"{response.url}: the answer is not what t5-serve sends") from None


def _complete(answer: Any) -> Any:
    if not isinstance(answer, dict) or not {"summary", "truncated"} <= answer.keys():
        raise ValueError("not an answer")
    return answer


def _refused(response: httpx.Response) -> NoReturn:
    try:
        problem = response.json()
    except ValueError:
        problem = None
    if not isinstance(problem, dict) or "title" not in problem:
        said = " ".join(response.text.split())[:200]
        raise CliError(f"{response.url}: HTTP status {response.status_code}: {said}")
    retry = response.headers.get("Retry-After")
    _fail(problem, f" (try again in {retry} s)" if retry else "")


def _fail(problem: dict[str, Any], hint: str = "") -> NoReturn:
    if problem.get("status") == 401:
        hint = " (give one with --token or T5_SERVE_TOKEN)"
    raise CliError(f"{problem.get('title')}: {problem.get('detail')}{hint}")


def _reason(error: Exception) -> str:
    import httpx

    if isinstance(error, httpx.ConnectError):
        return f"cannot reach the service: {error}"
    if isinstance(error, httpx.TimeoutException):
        return f"no answer in time ({type(error).__name__})"
    return str(error) or type(error).__name__
