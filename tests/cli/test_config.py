"""The login: kept for its owner only, and sent to no other registry."""

import json
import stat
from pathlib import Path

import pytest

from cli import config
from registry.core.errors import NotLoggedIn, PathUnusable


def test_what_was_saved_is_loaded_and_only_its_owner_can_read_it(tmp_path: Path) -> None:
    env = {"XDG_CONFIG_HOME": str(tmp_path)}
    kept = config.save(config.Login("http://a", "secret", ""), env)
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    assert config.load(env) == config.Login("http://a", "secret", str(kept))
    assert "secret" not in repr(config.load(env))


def test_a_file_that_others_could_read_is_replaced_by_one_that_they_cannot(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_text("old")
    file.chmod(0o644)
    config.write_secret(file, "new")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert file.read_text() == "new"
    assert list(tmp_path.iterdir()) == [file]


def test_the_environment_goes_first(tmp_path: Path) -> None:
    env = {"XDG_CONFIG_HOME": str(tmp_path)}
    config.save(config.Login("http://a", "kept", ""), env)
    found = config.load({**env, "LORACTL_URL": "http://b", "LORACTL_TOKEN": "given"})
    assert (found.url, found.token, found.source) == ("http://b", "given", "LORACTL_URL")
    assert config.load({**env, "LORACTL_TOKEN": "given"}).token == "given"


def test_a_kept_token_is_not_sent_to_another_registry(tmp_path: Path) -> None:
    env = {"XDG_CONFIG_HOME": str(tmp_path)}
    config.save(config.Login("http://a", "kept", ""), env)
    assert config.load({**env, "LORACTL_URL": "http://b"}).token is None
    assert config.load({**env, "LORACTL_URL": "http://a"}).token == "kept"
    assert config.load({**env, "LORACTL_URL": "http://a/"}).token == "kept"


def test_no_login_is_said_with_the_command_that_helps(tmp_path: Path) -> None:
    with pytest.raises(NotLoggedIn):
        config.load({"XDG_CONFIG_HOME": str(tmp_path)})


def test_a_damaged_file_is_said_and_not_taken_for_no_login(tmp_path: Path) -> None:
    env = {"XDG_CONFIG_HOME": str(tmp_path)}
    file = config.path(env)
    file.parent.mkdir()
    file.write_text("{")
    with pytest.raises(PathUnusable, match="log in again"):
        config.load(env)
    file.write_text(json.dumps([]))
    with pytest.raises(NotLoggedIn):
        config.load(env)
