"""Every command of the plan, held against the argument parsers of the gcloud and bq installed here.

Nothing is sent anywhere: gcloud's command tree is loaded, and parses.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.pipeline.conftest import ROOT

# Run by gcloud's own Python. Answers a line per command: empty, or what the parser said.
PARSE = """
import contextlib, io, json, sys
from googlecloudsdk import gcloud_main
from googlecloudsdk.core import log
from googlecloudsdk.core.resource import resource_printer

parser = gcloud_main.CreateCLI([])._TopElement()._parser
for line in sys.stdin:
    said = io.StringIO()
    log.Reset(said, said)
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            arguments = parser.parse_args(json.loads(line))
            if arguments.format:
                resource_printer.Printer(arguments.format, out=io.StringIO())
        print()
    except (Exception, SystemExit) as error:
        print(json.dumps(said.getvalue() or repr(error)))
"""


def gcloud_parser(lines: list[list[str]], home: Path) -> list[str]:
    """What gcloud's parser has against each of these command lines."""
    gcloud = shutil.which("gcloud")
    if gcloud is None:
        pytest.skip("gcloud is not installed: its parser is what the commands are held against")
    environment = {
        "PATH": "/usr/bin:/bin",
        "HOME": str(home),
        "CLOUDSDK_CONFIG": str(home),
        "CLOUDSDK_CORE_DISABLE_USAGE_REPORTING": "1",
        "CLOUDSDK_COMPONENT_MANAGER_DISABLE_UPDATE_CHECK": "1",
    }
    where = subprocess.run(
        [gcloud, "info", "--format=value(basic.python_location,installation.sdk_root)"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    python, root = where.strip().split("\t")
    # Parsing opens files, those that a command would write as well.
    (home / "kuberay").symlink_to(ROOT / "kuberay")
    done = subprocess.run(
        [python, "-c", PARSE],
        input="".join(json.dumps(line[1:]) + "\n" for line in lines),
        cwd=home,
        env={**environment, "PYTHONPATH": f"{root}/lib:{root}/lib/third_party"},
        capture_output=True,
        text=True,
        check=True,
    )
    answers = [json.loads(line) if line else "" for line in done.stdout.splitlines()]
    assert len(answers) == len(lines), done.stderr
    return answers


def gpu_pool(**environment: str) -> list[str]:
    """The command that the node pool's script prints."""
    done = subprocess.run(
        [ROOT / "kuberay/gpu-node-pool.sh"],
        env={"PATH": "/usr/bin:/bin", **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return shlex.split(done.stdout)


def test_gcloud_takes_every_command(all_commands: list[list[str]], tmp_path: Path) -> None:
    lines = [argv for argv in all_commands if argv[0] == "gcloud"]
    # The pool's script as the plan calls it, and alone.
    [pool] = [argv for argv in all_commands if argv[0] == "env"]
    lines.append(gpu_pool(**dict(word.split("=") for word in pool[1:-2])))
    lines.append(gpu_pool(CLUSTER="c", LOCATION="europe-west4", SPOT="1"))
    assert len(lines) > 55
    answers = gcloud_parser(lines, tmp_path)
    assert {shlex.join(line): said for line, said in zip(lines, answers, strict=True) if said} == {}


def test_gcloud_takes_what_the_page_says(tmp_path: Path) -> None:
    page = (ROOT / "docs/google-cloud.md").read_text().splitlines()
    lines = [
        shlex.split(line.replace("PROJECT", "my-project"))
        for line in page
        if line.startswith("gcloud ")
    ]
    assert len(lines) > 15
    answers = gcloud_parser(lines, tmp_path)
    assert {shlex.join(line): said for line, said in zip(lines, answers, strict=True) if said} == {}


def test_gcloud_refuses_what_is_mistyped(tmp_path: Path) -> None:
    complaints = {
        "gcloud artifacts repositories describe images --loction=x": "--loction",
        "gcloud container clusters create t5 --location=x --num-nodes=some": "--num-nodes",
        "gcloud compute addresses reserve a": "Invalid choice",
        "gcloud iam service-accounts keys create": "OUTPUT-FILE",
        "gcloud logging sinks describe s --format=value(": "value(",
    }
    answers = gcloud_parser([line.split() for line in complaints], tmp_path)
    for (line, complaint), said in zip(complaints.items(), answers, strict=True):
        assert complaint in said, line


def test_bq_knows_every_flag(all_commands: list[list[str]], tmp_path: Path) -> None:
    bq = shutil.which("bq")
    if bq is None:
        pytest.skip("bq is not installed: its help is what the commands are held against")

    def flags(*topic: str) -> set[str]:
        said = subprocess.run(
            [bq, *topic],
            env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "CLOUDSDK_CONFIG": str(tmp_path)},
            capture_output=True,
            text=True,
            check=False,
        ).stdout
        found = re.findall(r"--(\[no\])?(\w+):", said)
        return {name for _, name in found} | {f"no{name}" for switch, name in found if switch}

    lines = [argv[1:] for argv in all_commands if argv[0] == "bq"]
    known: dict[str, set[str]] = {}
    for argv in lines:
        command = next(word for word in argv if not word.startswith("--"))
        if command not in known:
            known[command] = flags("help", command)
        at = argv.index(command)
        used = [word[2:].split("=")[0] for word in argv[at + 1 :] if word.startswith("--")]
        assert known[command].issuperset(used), (command, used)
    everywhere = {word[2:].split("=")[0] for argv in lines for word in argv[:3]}
    assert everywhere - {"headless", "project_id", "location"} == set()
    assert flags("--help").issuperset({*everywhere, "format"})
    assert set(known) == {"show", "mk", "update", "query"}
