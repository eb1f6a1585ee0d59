"""The edge of the command line: exit codes, one document on stdout, help with examples, no traceback."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import click
import pytest

from cli import config
from cli.main import COMMANDS, EXIT, cli, exit_code, run
from cli.output import Command
from registry.core import errors
from registry.core.errors import LoractlError, refusals


def commands(group: click.Group = cli, path: str = "loractl") -> Iterator[tuple[str, click.Command]]:
    with click.Context(group) as context:
        for name in group.list_commands(context):
            found = group.get_command(context, name)
            assert found is not None
            if isinstance(found, click.Group):
                yield from commands(found, f"{path} {name}")
            else:
                yield f"{path} {name}", found


ALL = dict(commands())
CONTRACT = """
up · login · whoami · doctor
base push · base list · base show · base diff · base digest
push · pull · list · show · log · diff
alias set · alias list · promote · rollback
policy show · policy set · dataset push · suite push
train · evaluate · merge · rebase · combine · compress · extract
upgrade plan · upgrade start · upgrade status · upgrade abort · upgrade report
upgrade pause · upgrade resume · upgrade ledger
schedule add · schedule list · schedule rm
jobs list · jobs show · jobs watch · jobs logs · jobs cancel · jobs retry
token create · token list · token revoke · completion
"""
LATER = ["gc"]


@pytest.fixture(autouse=True)
def nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A home without a login."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("LORACTL_URL", "LORACTL_TOKEN"):
        monkeypatch.delenv(name, raising=False)


def test_every_command_of_the_contract_is_there_and_none_of_later() -> None:
    wanted = {f"loractl {name.strip()}" for line in CONTRACT.split("\n") for name in line.split("·") if name.strip()}
    assert wanted <= ALL.keys()
    assert not {f"loractl {name}" for name in LATER} & ALL.keys()


@pytest.mark.parametrize("path", ALL)
def test_every_command_takes_json_and_shows_an_example_of_itself(path: str) -> None:
    found = ALL[path]
    assert isinstance(found, Command)
    assert any(path in example for example in found.examples)
    with click.Context(found, info_name=path) as context:
        text = found.get_help(context)
    assert "--json" in text
    assert all(example in text for example in found.examples)
    assert found.help
    assert found.help[0].isupper()


@pytest.mark.parametrize("path", ALL)
def test_every_option_in_an_example_exists(path: str) -> None:
    import shlex

    for example in ALL[path].examples:  # type: ignore[attr-defined]  # the test above says they are Commands
        words = shlex.split(example.partition(" > ")[0].partition('"$(')[0].removeprefix("eval "))
        if words[:1] != ["loractl"] or any(word.startswith("--token") for word in words):
            continue
        arguments = words[len(path.split()) :]
        used = {option for word in arguments if word.startswith("-") for option in [word]}
        known = {option for param in ALL[path].params for option in (*param.opts, *param.secondary_opts)}
        assert used <= known, example


@pytest.mark.parametrize("refusal", refusals(), ids=lambda refusal: refusal.code)
def test_every_refusal_has_an_exit_code(refusal: type[LoractlError]) -> None:
    assert exit_code(refusal(**dict.fromkeys(refusal.fact_names(), ""))) in {1, 2, 3, 4}


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.AdapterNotFound(name="team/bot", nearest=""), 1),
        (errors.BadReference(value="x", what="an adapter", rule="y", examples="z"), 2),
        (errors.NotLoggedIn(), 2),
        (errors.RegistryUnreachable(url="http://x", reason="y"), 3),
        (errors.DatabaseDown(reason="y"), 3),
        (errors.GateNotPassed(alias="prod", name="team/bot", version="v1", reason="y"), 4),
        (errors.DiskFull(path="x"), 1),
    ],
    ids=lambda value: getattr(value, "code", str(value)),
)
def test_exit_codes_are_those_of_the_contract(error: LoractlError, code: int) -> None:
    assert exit_code(error) == code
    assert set(EXIT.values()) == {1, 2, 3, 4}


def test_output_that_does_not_go_out_is_a_full_disk() -> None:
    with Path("/dev/full").open("wb") as full:
        ended = subprocess.run(
            [sys.executable, "-m", "cli.main", "completion", "bash"], stdout=full, stderr=subprocess.PIPE, check=False
        )
    assert ended.returncode == 1
    assert ended.stderr.startswith(b"Error: No room left on this machine while writing 'what it prints'.\nHelp:  Free")
    assert b"Traceback" not in ended.stderr
    assert b"Exception ignored" not in ended.stderr


def test_a_refusal_is_a_sentence_and_a_command_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["whoami"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == (
        "Error: No registry is configured.\n"
        "Help:  Start one here: loractl up; then: loractl login URL --token TOKEN\n"
    )


@pytest.mark.parametrize(
    ("arguments", "code", "name"),
    [
        (["whoami", "--json"], 2, "not-logged-in"),
        (["show", "no slash", "--json"], 2, "bad-reference"),
        (["base", "digest", "--json"], 2, "usage"),
        (["list", "--engine", "vllm", "--json"], 2, "usage"),
        (["nonsense", "--json"], 2, "usage"),
        (["jobs", "cancel", "--json", "--nonsense"], 2, "usage"),
    ],
)
def test_with_json_a_refusal_is_one_document_on_stdout(
    arguments: list[str], code: int, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments) == code
    said = capsys.readouterr()
    document = json.loads(said.out)
    assert document["error"]["code"] == name
    assert document["error"]["detail"] in said.err


def test_nobody_there_exits_with_3(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("LORACTL_URL", "http://127.0.0.1:9")
    monkeypatch.setattr("registry.client.PAUSE_S", 0)
    assert run(["whoami", "--json"]) == 3
    assert json.loads(capsys.readouterr().out)["error"]["facts"]["url"] == "http://127.0.0.1:9"


def test_a_failure_that_is_no_refusal_is_a_sentence_and_debug_shows_where(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(config, "load", broken)
    assert run(["whoami"]) == 1
    assert "Traceback" not in capsys.readouterr().err
    assert run(["whoami", "--debug"]) == 1
    said = capsys.readouterr().err
    assert "Traceback" in said
    assert "RuntimeError: a bug" in said


def test_a_request_that_is_wrong_is_refused_before_it_is_sent(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LORACTL_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("LORACTL_TOKEN", "t")
    assert run(["yank", "team/bot@v1", "-m", "m" * 2001, "--json"]) == 2
    said = json.loads(capsys.readouterr().out)["error"]
    assert said["code"] == "bad-request"
    assert "reason" in said["detail"]
    assert "pydantic" not in said["detail"]


def test_a_terminal_that_knows_few_letters_gets_question_marks() -> None:
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "LORACTL_URL": "http://127.0.0.1:9/→"}
    line = [sys.executable, "-m", "cli.main", "whoami"]
    done = subprocess.run(line, env=environment, capture_output=True, check=False)
    assert done.returncode == 3
    assert b"?" in done.stderr
    assert b"Unicode" not in done.stderr


def test_a_pipe_that_nobody_reads_is_no_traceback(tmp_path: Path) -> None:
    line = [sys.executable, "-m", "cli.main", "completion", "bash"]
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.close()
        assert child.stderr is not None
        assert b"Traceback" not in child.stderr.read()


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script_that_calls_us(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert "_LORACTL_COMPLETE" in script
    assert "loractl" in script


def test_the_help_imports_no_torch_server_http_or_model_library() -> None:
    code = (
        "import sys; from cli.main import run; run(['--help']);"
        "print([name for name in ('torch', 'httpx', 'pydantic', 'fastapi', 'celery', 'rich', 'plotext', 'blake3')"
        " if name in sys.modules], file=sys.stderr)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stderr.strip() == "[]"
    assert all(name in ended.stdout for name in COMMANDS)


def test_ctrl_c_exits_with_130_and_says_what_is_kept(tmp_path: Path) -> None:
    """A registry that never answers: the connection is taken, and nothing is said."""
    import socket

    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        env = {**os.environ, "LORACTL_URL": f"http://127.0.0.1:{silent.getsockname()[1]}"}
        line = [sys.executable, "-m", "cli.main", "pull", "team/bot", "--out", str(tmp_path / "bot"), "--json"]
        with subprocess.Popen(
            line, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            # What a shell runs in the background ignores SIGINT, and so would the children of tests there.
            preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
        ) as child:  # fmt: skip
            connection, _ = silent.accept()
            with connection:
                connection.recv(100)
                for _ in range(30):  # one that comes between the last look for signals and the wait is not heard there
                    child.send_signal(signal.SIGINT)
                    with suppress(subprocess.TimeoutExpired):
                        out, err = child.communicate(timeout=5)
                        break
    assert child.returncode == 130
    assert ".partial" in err
    assert json.loads(out)["error"]["code"] == "interrupted"
