"""The command line, without Ray: a scripted HTTP server stands for the service."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from serve_app.cli.run import _settings as read_settings
from serve_app.tokens import create

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("T5_SERVE")}
    return {
        **kept,
        "PYTHONPATH": str(ROOT),
        "T5_SERVE_TOKENS_FILE": str(tmp_path / "conf" / "tokens.json"),
    }


def t5_serve(
    environment: dict[str, str], *args: str, stdin: bytes | None = None
) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "serve_app.cli.main", *args],
        env=environment,
        input=stdin if stdin is not None else b"",
        capture_output=True,
        timeout=120,
    )


def refused(result: subprocess.CompletedProcess[bytes]) -> str:
    """The one line of an expected error."""
    said = result.stderr.decode()
    assert result.returncode == 2, said
    assert result.stdout == b""
    assert said.startswith("t5-serve: ")
    assert said.count("\n") == 1
    return said.removeprefix("t5-serve: ").rstrip("\n")


# The fake service


ANSWER = {
    "id": "sum-1",
    "model": {"name": "demo", "revision": "abc"},
    "summary": "A small café.",
    "truncated": False,
    "finish_reason": "stop",
    "chunks": [],
    "usage": {"input_tokens": 5, "output_tokens": 4, "chunks": 1},
}


def sse(*events: tuple[str, dict[str, Any]]) -> bytes:
    return "".join(
        f"event: {name}\ndata: {json.dumps(data, ensure_ascii=False)}\n\n" for name, data in events
    ).encode()


STREAM = sse(
    ("start", {"id": "sum-1", "model": ANSWER["model"], "chunks": 1}),
    ("delta", {"text": "A small"}),
    ("delta", {"text": " café."}),
    ("done", ANSWER),
)


class Service:
    """What the next request is answered with, and what was asked."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.status = 200
        self.headers = {"Content-Type": "text/event-stream"}
        self.body = STREAM
        self.requests: list[tuple[str, dict[str, str], Any]] = []
        self.hold: threading.Event | None = None

    def problem(self, status: int, title: str, detail: str, **headers: str) -> None:
        self.status = status
        self.headers = {"Content-Type": "application/problem+json", **headers}
        self.body = json.dumps({"title": title, "status": status, "detail": detail}).encode()


@pytest.fixture
def service() -> Iterator[Service]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            content = self.rfile.read(int(self.headers["Content-Length"]))
            headers = {name.lower(): value for name, value in self.headers.items()}
            fake.requests.append((self.path, headers, json.loads(content)))
            self.send_response(fake.status)
            for name, value in fake.headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(fake.body)
            self.wfile.flush()
            if fake.hold is not None:
                fake.hold.wait()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    fake = Service(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield fake
    server.shutdown()
    thread.join()
    server.server_close()


def summarize(
    environment: dict[str, str],
    service: Service,
    *args: str,
    text: bytes = b"A long text about a small caf\xc3\xa9.",
) -> subprocess.CompletedProcess[bytes]:
    return t5_serve(environment, "summarize", "-", "--url", service.url, *args, stdin=text)


def test_summarize_prints_the_streamed_summary(
    environment: dict[str, str], service: Service
) -> None:
    result = summarize(environment, service)
    assert (result.returncode, result.stderr) == (0, b"")
    assert result.stdout.decode() == "A small café.\n"
    path, headers, body = service.requests[0]
    assert path == "/v1/summarize"
    assert body == {"text": "A long text about a small café.", "stream": True}
    assert "authorization" not in headers


def test_summarize_sends_its_options(environment: dict[str, str], service: Service) -> None:
    options = ["--words", "30", "--num-beams", "4", "--max-new-tokens", "50"]
    options += ["--on-overflow", "truncate", "--timeout", "7.5"]
    assert summarize(environment, service, *options).returncode == 0
    assert summarize(environment, service, "--sentences", "2").returncode == 0
    asked = [{**body} for _, _, body in service.requests]
    for body in asked:
        del body["text"]
    assert asked[0] == {
        "stream": True,
        "length": {"words": 30},
        "num_beams": 4,
        "max_new_tokens": 50,
        "on_overflow": "truncate",
        "timeout_s": 7.5,
    }
    assert asked[1] == {"stream": True, "length": {"sentences": 2}}


def test_summarize_reads_a_file_and_drops_its_byte_order_mark(
    environment: dict[str, str], service: Service, tmp_path: Path
) -> None:
    file = tmp_path / "notes.txt"
    file.write_bytes(b"\xef\xbb\xbfSome notes.")
    assert t5_serve(environment, "summarize", str(file), "--url", service.url).returncode == 0
    assert service.requests[0][2]["text"] == "Some notes."


@pytest.mark.parametrize("stream", [True, False])
def test_summarize_prints_the_whole_answer_as_json(
    environment: dict[str, str], service: Service, stream: bool
) -> None:
    if not stream:
        service.headers = {"Content-Type": "application/json"}
        service.body = json.dumps(ANSWER).encode()
    result = summarize(environment, service, "--json", *([] if stream else ["--no-stream"]))
    assert json.loads(result.stdout) == ANSWER
    assert service.requests[0][2]["stream"] is stream


def test_summarize_without_a_stream_prints_the_summary(
    environment: dict[str, str], service: Service
) -> None:
    service.headers = {"Content-Type": "application/json"}
    service.body = json.dumps(ANSWER).encode()
    result = summarize(environment, service, "--no-stream")
    assert result.stdout.decode() == "A small café.\n"


def test_summarize_says_when_text_was_left_out(
    environment: dict[str, str], service: Service
) -> None:
    service.body = sse(("delta", {"text": "A"}), ("done", {**ANSWER, "truncated": True}))
    result = summarize(environment, service)
    assert result.returncode == 0
    assert b"left out" in result.stderr


def test_summarize_shows_progress_on_a_terminal_only(
    environment: dict[str, str], service: Service
) -> None:
    part = {"index": 0, "chunks": 2, "start": 0, "end": 5, "summary": "x"}
    service.body = sse(
        ("start", {"id": "sum-1", "model": ANSWER["model"], "chunks": 2}),
        ("chunk", {**part, "index": 1}),
        ("chunk", part),
        ("delta", {"text": "A small café."}),
        ("done", ANSWER),
    )
    assert summarize(environment, service).stderr == b""
    ours, theirs = os.openpty()
    arguments = [sys.executable, "-m", "serve_app.cli.main", "summarize", "-", "--url", service.url]
    process = subprocess.Popen(
        arguments,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=theirs,
    )
    out, _ = process.communicate(b"text", timeout=60)
    os.close(theirs)
    shown = os.read(ours, 4096).decode()
    os.close(ours)
    assert out.decode() == "A small café.\n"
    assert "part 1/2" in shown
    assert shown.index("part 1/2") < shown.index("part 2/2")
    assert shown.endswith("\r\033[K")


def test_summarize_uses_the_development_token_for_this_machine_only(
    environment: dict[str, str], service: Service
) -> None:
    secret = Path(environment["T5_SERVE_TOKENS_FILE"]).with_name("dev-token")
    secret.parent.mkdir()
    secret.write_text("t5s_dev\n")
    summarize(environment, service)
    summarize(environment, service, "--token", "t5s_mine")
    summarize({**environment, "T5_SERVE_TOKEN": "t5s_env"}, service)
    sent = [headers["authorization"] for _, headers, _ in service.requests]
    assert sent == ["Bearer t5s_dev", "Bearer t5s_mine", "Bearer t5s_env"]
    # Any other host, here a name of the proxy that stands for it.
    proxied = {**environment, "http_proxy": service.url, "no_proxy": ""}
    remote = ["summarize", "-", "--url", "http://summaries.example.org"]
    assert t5_serve(proxied, *remote, stdin=b"x").returncode == 0
    assert "authorization" not in service.requests[-1][1]


def test_summarize_does_not_ask_a_proxy_for_this_machine(
    environment: dict[str, str], service: Service
) -> None:
    with_proxy = {**environment, "http_proxy": "http://127.0.0.1:1", "no_proxy": ""}
    assert summarize(with_proxy, service).returncode == 0


def test_summarize_tells_a_problem_in_one_line(
    environment: dict[str, str], service: Service
) -> None:
    service.problem(422, "Invalid request", "num_beams: must be at most 8,\nis 9")
    said = refused(summarize(environment, service, "--num-beams", "9"))
    assert said == "Invalid request: num_beams: must be at most 8, is 9"
    assert refused(summarize(environment, service, "--no-stream")) == said
    service.problem(401, "Unauthorized", "a bearer token is required")
    assert "--token" in refused(summarize(environment, service))
    service.problem(503, "Overloaded", "the queue is full", **{"Retry-After": "7"})
    assert "try again in 7 s" in refused(summarize(environment, service))
    service.status, service.headers, service.body = 502, {}, b"<html>bad\ngateway"
    assert "502" in refused(summarize(environment, service))


def test_summarize_tells_a_problem_in_the_middle_of_the_stream(
    environment: dict[str, str], service: Service
) -> None:
    problem = {"title": "Deadline exceeded", "status": 408, "detail": "too late"}
    service.body = sse(("delta", {"text": "A small"}), ("error", problem))
    result = summarize(environment, service)
    assert result.returncode == 2
    assert result.stdout == b"A small\n"
    assert result.stderr == b"t5-serve: Deadline exceeded: too late\n"


@pytest.mark.parametrize("body", [sse(("delta", {"text": "A"})), b"event: delta\ndata: {\n\n"])
def test_summarize_does_not_take_half_a_stream_for_a_summary(
    environment: dict[str, str], service: Service, body: bytes
) -> None:
    service.body = body
    result = summarize(environment, service)
    assert result.returncode == 2
    assert result.stderr.count(b"\n") == 1


def test_summarize_ends_quietly_on_ctrl_c(environment: dict[str, str], service: Service) -> None:
    service.hold = threading.Event()
    service.body = sse(("delta", {"text": "A small"}))
    process = subprocess.Popen(
        [sys.executable, "-m", "serve_app.cli.main", "summarize", "-", "--url", service.url],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # Shells start background jobs, and so perhaps these tests, with SIGINT ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(b"text")
    process.stdin.close()
    process.stdin = None
    assert process.stdout.read(7) == b"A small"  # it is in the middle of the stream
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    service.hold.set()
    assert process.returncode == 130
    assert said == b""


def test_summarize_refuses_what_is_no_answer_of_the_service(
    environment: dict[str, str], service: Service
) -> None:
    service.headers, service.body = {"Content-Type": "text/html"}, b"<html>"
    assert "not what t5-serve sends" in refused(summarize(environment, service))
    assert "not what t5-serve sends" in refused(summarize(environment, service, "--no-stream"))


def test_summarize_tells_what_it_cannot_read_or_reach(
    environment: dict[str, str], tmp_path: Path
) -> None:
    latin = tmp_path / "latin.txt"
    latin.write_bytes(b"caf\xe9")
    assert "not UTF-8 text at byte 3" in refused(t5_serve(environment, "summarize", str(latin)))
    missing = refused(t5_serve(environment, "summarize", str(tmp_path / "missing.txt")))
    assert "missing.txt: No such file" in missing
    assert "directory" in refused(t5_serve(environment, "summarize", str(tmp_path)))
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound, not listening: connections are refused
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
        said = refused(t5_serve(environment, "summarize", "-", "--url", url, stdin=b"x"))
    assert "cannot reach the service" in said
    for url in ("nonsense", "ftp://127.0.0.1", "http://127.0.0.1:x", "http://[::1"):
        assert url in refused(t5_serve(environment, "summarize", "-", "--url", url, stdin=b"x"))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["summarize"], "Missing argument"),
        (["summarize", "-", "--words", "3", "--sentences", "1"], "not both"),
        (["summarize", "-", "--words", "0"], "--words"),
        (["summarize", "-", "--timeout", "0"], "--timeout"),
        (["summarize", "-", "--on-overflow", "guess"], "map_reduce"),
        (["summarize", "-", "--token", "a b"], "token"),
        (["nonsense"], "nonsense"),
        (["run", "--nonsense"], "--nonsense"),
        (["run", "--port", "70000"], "--port"),
        (["run", "--auth", "maybe"], "trusted-header"),
        (["tokens", "create", "shop", "--expires", "soon"], "soon"),
        (["tokens", "create", "shop", "--expires", "0d"], "above 0"),
        (["tokens", "create", "a b"], "a b"),
        (["tokens", "revoke", "nobody"], "nobody"),
    ],
)
def test_usage_errors_are_one_line(
    environment: dict[str, str], arguments: list[str], told: str
) -> None:
    assert told in refused(t5_serve(environment, *arguments))


# tokens


def test_tokens_are_created_listed_and_revoked(environment: dict[str, str]) -> None:
    path = Path(environment["T5_SERVE_TOKENS_FILE"])
    made = t5_serve(environment, "tokens", "create", "web-shop", "--expires", "90d")
    token = made.stdout.decode().removesuffix("\n")
    assert token.startswith("t5s_")
    assert "\n" not in token
    assert b"shown once" in made.stderr
    kept = json.loads(path.read_text())["tokens"][0]
    assert kept["sha256"] == hashlib.sha256(token.encode()).hexdigest()

    [row] = json.loads(t5_serve(environment, "tokens", "list", "--json").stdout)
    assert row == {
        "id": kept["id"],
        "client": "web-shop",
        "created": kept["created"],
        "expires": kept["expires"],
        "expired": False,
    }
    table = t5_serve(environment, "tokens", "list").stdout.decode()
    assert "web-shop" in table
    assert kept["sha256"] not in table

    assert t5_serve(environment, "tokens", "revoke", kept["id"]).stdout == b"revoked 1 token\n"
    assert json.loads(path.read_text())["tokens"] == []


def test_tokens_takes_another_file(environment: dict[str, str], tmp_path: Path) -> None:
    other = str(tmp_path / "other.json")
    t5_serve(environment, "tokens", "create", "job", "--file", other)
    assert json.loads(t5_serve(environment, "tokens", "list", "--json").stdout) == []
    [row] = json.loads(t5_serve(environment, "tokens", "list", "--json", "--file", other).stdout)
    assert row["client"] == "job"


def test_a_broken_tokens_file_is_told_in_one_line(environment: dict[str, str]) -> None:
    path = Path(environment["T5_SERVE_TOKENS_FILE"])
    create(path, "shop", None)
    path.write_text('{"version": 3, "tokens": []}')
    for arguments in (["create", "shop"], ["list"], ["revoke", "shop"]):
        said = refused(t5_serve(environment, "tokens", *arguments))
        assert str(path) in said
        assert "version" in said
    assert "version" in refused(t5_serve(environment, "run"))


# run, as far as it goes without Ray


def test_run_settings_come_from_the_file_and_options_win(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(
        "model: {name: some/model, revision: v1, dtype: float32}\n"
        "replicas: {min: 1, max: 2, num_cpus: 3}\n"
        "auth: trusted-header\n"
    )
    read = read_settings(file, None, None, None, None, None)
    assert (read.model.name, read.model.revision) == ("some/model", "v1")
    assert (read.replicas.min, read.replicas.max, read.replicas.num_cpus) == (1, 2, 3)
    assert read.auth.mode == "trusted-header"

    read = read_settings(file, "demo", None, "transformers", "2:5", "off")
    # Another model's revision does not carry over; what no option names does.
    assert (read.model.name, read.model.revision, read.model.dtype) == ("demo", None, "float32")
    assert (read.replicas.min, read.replicas.max, read.replicas.num_cpus) == (2, 5, 3)
    assert read.auth.mode == "off"
    assert read_settings(file, None, "v2", None, "4", None).replicas.max == 4
    assert read_settings(file, None, "v2", None, None, None).model.revision == "v2"
    assert read_settings(None, None, None, None, None, None).model.name == "demo"


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("modle: demo", ["modle", "unknown setting"]),
        ("limits: {num_beams: 0}", ["limits.num_beams", "greater than or equal to 1", "is 0"]),
        ("replicas: {min: 3, max: 2}", ["replicas", "min (3) is above max (2)"]),
        ("replicas: many", ["replicas", "N or MIN:MAX", "'many'"]),
        ("engine: steam", ["engine.kind", "'transformers'", "'steam'"]),
        ("model: [demo]", ["model"]),
        ("- a list", ["mapping"]),
        ("a: [", ["not YAML"]),
    ],
)
def test_bad_settings_are_told_by_field_limit_and_value(
    environment: dict[str, str], tmp_path: Path, content: str, told: list[str]
) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(content)
    said = refused(t5_serve(environment, "run", "--config", str(file)))
    assert all(part in said for part in told), said


def test_run_checks_options_model_and_port_first(environment: dict[str, str]) -> None:
    assert "MIN:MAX" in refused(t5_serve(environment, "run", "--replicas", "3:x"))
    assert "./nowhere" in refused(t5_serve(environment, "run", "--model", "./nowhere"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = refused(t5_serve(environment, "run", "--port", str(port)))
    assert f"port {port} on 127.0.0.1 is in use" in said
    said = refused(t5_serve(environment, "run", "--host", "192.0.2.77"))
    assert "192.0.2.77" in said


@pytest.mark.parametrize(
    ("host", "auth", "warned"),
    [
        ("0.0.0.0", "off", True),
        ("0.0.0.0", "trusted-header", True),
        ("0.0.0.0", "token", False),
        ("127.0.0.1", "off", False),
        ("localhost", "off", False),
    ],
)
def test_run_warns_of_an_open_service(
    environment: dict[str, str], host: str, auth: str, warned: bool
) -> None:
    with socket.create_server(("0.0.0.0", 0)) as taken:  # so that the command ends there
        port = str(taken.getsockname()[1])
        result = t5_serve(environment, "run", "--host", host, "--port", port, "--auth", auth)
    *before, last = result.stderr.decode().splitlines()
    assert "in use" in last
    assert len(before) == warned
    assert all(line.startswith("t5-serve: warning: ") and host in line for line in before)


# help and version


def test_version_names_what_is_installed(environment: dict[str, str]) -> None:
    lines = t5_serve(environment, "version").stdout.decode().splitlines()
    assert lines[0].startswith("t5-serve ")
    assert lines[1:] == [f"{name} {version(name)}" for name in ("ray", "torch", "transformers")]


COMMANDS = [
    ["run"],
    ["summarize"],
    ["tokens"],
    ["tokens", "create"],
    ["tokens", "rotate"],
    ["tokens", "prune"],
    ["tokens", "list"],
    ["tokens", "revoke"],
]


@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_help_has_examples(environment: dict[str, str], arguments: list[str]) -> None:
    said = t5_serve(environment, *arguments, "--help").stdout.decode()
    assert "Example" in said
    assert f"t5-serve {arguments[0]}" in said


@pytest.mark.parametrize("arguments", ["['--help']", "['version']", "['run', '--help']"])
def test_what_must_be_quick_imports_nothing_slow(
    environment: dict[str, str], arguments: str
) -> None:
    code = (
        "import sys; from serve_app.cli.main import cli\n"
        f"cli.main({arguments}, standalone_mode=False)\n"
        "slow = {'ray', 'torch', 'transformers', 'fastapi', 'httpx', 'pydantic'}\n"
        "sys.exit(' '.join(slow & set(sys.modules)))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert result.stderr.decode().strip() == ""


def test_a_closed_pipe_ends_quietly(environment: dict[str, str]) -> None:
    quiet = subprocess.run(
        ["bash", "-c", f"'{sys.executable}' -m serve_app.cli.main version | true"],
        env=environment,
        capture_output=True,
    )
    assert quiet.stderr == b""
