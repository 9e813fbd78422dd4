"""What is read from where, what is a fault, and that no fault shows a value."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml

from shim.config.loader import dump, leaves, load, read_secret, read_token, redacted, secrets, sections
from shim.config.settings import Settings
from shim.errors import ConfigError

EXAMPLE = Path(__file__).parents[2] / "config" / "agent-shim.yaml"


def faults_of(tmp_path: Path, text: str, *sets: str, env: dict[str, str] | None = None) -> dict[str, str]:
    """All faults of a file, by key path; messages of one path are joined with `; `."""
    file = tmp_path / "shim.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(str(file), env or {}, sets)
    found: dict[str, str] = {}
    for fault in caught.value.faults:
        found[fault.path] = f"{found[fault.path]}; {fault.message}" if fault.path in found else fault.message
    return found


def settings_of(tmp_path: Path, text: str, *sets: str, env: dict[str, str] | None = None) -> Settings:
    file = tmp_path / "shim.yaml"
    file.write_text(text)
    return load(str(file), env or {}, sets)


def test_nothing_given_gives_the_defaults() -> None:
    assert load(None, {}, ()) == Settings()


def test_the_example_has_all_keys_with_their_defaults() -> None:
    assert load(str(EXAMPLE), {}, ()) == Settings()
    tree = yaml.safe_load(EXAMPLE.read_text())
    for path, _, _ in leaves():
        below = tree
        for name in path.split("."):
            assert name in below, path
            below = below[name]


@pytest.mark.parametrize("text", ["", "# only a comment\n", "listen:\nupstream:\n  reconnect:\npoll: ~\n"])
def test_empty_files_and_sections_are_defaults(tmp_path: Path, text: str) -> None:
    assert settings_of(tmp_path, text) == Settings()


def test_set_wins_over_environment_wins_over_file(tmp_path: Path) -> None:
    text = "listen: {port: 1}\nadmin: {port: 2}\nupstream: {reconnect: {max_s: 3, initial_s: 2}}\n"
    env = {"SHIM_ADMIN__PORT": "20", "SHIM_UPSTREAM__RECONNECT__MAX_S": "30", "SHIM_MODE": "websocket"}
    settings = settings_of(tmp_path, text, "upstream.reconnect.max_s=300", env=env)
    assert (settings.listen.port, settings.admin.port) == (1, 20)
    assert (settings.upstream.reconnect.max_s, settings.upstream.reconnect.initial_s) == (300.0, 2)


def test_the_last_set_of_a_key_wins() -> None:
    assert load(None, {}, ["listen.port=1", "listen.port=2"]).listen.port == 2


def test_only_keys_of_known_sections_in_the_environment_count() -> None:
    env = {
        "SHIM_PORT": "tcp://10.0.0.1:7080",
        "SHIM_SERVICE_HOST": "10.0.0.1",
        "SHIM_UPSTREAM": "x",
        "SHIM_OTHER__KEY": "x",
        "AGENT_SHIM_LISTEN__PORT": "1",
        "LISTEN__PORT": "1",
    }
    assert load(None, env, ()) == Settings()


def test_text_is_converted_by_the_type_of_its_key() -> None:
    env = {
        "SHIM_COMMANDS__TYPES": '["command", "deploy"]',
        "SHIM_IDENTITY__LABELS": '{"team": "a"}',
        "SHIM_UPSTREAM__TOKEN": "12345",
        "SHIM_UPSTREAM__SHARE_LINK": "false",
        "SHIM_POLL__HOLD": "7.5",
    }
    settings = load(None, env, ["upstream.url=https://h/x?a=b=c", 'upstream.reconnect={"max_s": 9}'])
    assert settings.commands.types == ("command", "deploy")
    assert settings.identity.labels == {"team": "a"}
    assert settings.upstream.token == "12345"
    assert settings.upstream.share_link is False
    assert settings.poll.hold == 7.5
    assert settings.upstream.url == "https://h/x?a=b=c"
    assert settings.upstream.reconnect.max_s == 9


def test_an_override_changes_one_of_two_sections_that_share_an_anchor(tmp_path: Path) -> None:
    settings = settings_of(
        tmp_path, "listen: &a {host: localhost, port: 1}\nadmin: {<<: *a, port: 2}\n", "admin.host=::1"
    )
    assert (settings.listen.host, settings.listen.port) == ("localhost", 1)
    assert (settings.admin.host, settings.admin.port) == ("::1", 2)


@pytest.mark.parametrize("word", ["off", "auto"])
def test_words_of_yaml_1_1_stay_words(tmp_path: Path, word: str) -> None:
    assert settings_of(tmp_path, f"poll: {{hold: {word}}}\n").poll.hold == word


def test_dates_stay_text_and_seconds_may_be_whole(tmp_path: Path) -> None:
    settings = settings_of(tmp_path, "sunset: {at: 2026-12-31}\npoll: {hold: 5}\nidentity: {name: yes, region: 1:30}\n")
    assert settings.sunset.at == "2026-12-31"
    assert settings.poll.hold == 5.0
    assert (settings.identity.name, settings.identity.region) == ("yes", "1:30")


def test_all_faults_are_told_at_once_with_their_paths(tmp_path: Path) -> None:
    found = faults_of(
        tmp_path,
        "mode: htp\nlisten: {port: 70000, prot: 1, host: 0.0.0.0, auth: off}\nlistn: 3\nstore: [1]\n"
        "upstream: {token: [x], reconnect: {max_s: fast}}\n",
        "nonsense",
        env={"SHIM_POLL__HOLDD": "1", "SHIM_LISTEN__ALLOWED_HOSTS": "a,b"},
    )
    assert found == {
        "": "--set needs section.key=value",
        "mode": "must be one of websocket, http, auto",
        "listen.prot": "unknown key, did you mean listen.port?",
        "listen.allowed_hosts": 'must be a list of texts, in JSON: ["a", "b"] (from SHIM_LISTEN__ALLOWED_HOSTS)',
        "listen.port": "must be from 0 to 65535",
        "listen.auth": "must not be off while listen.host is reachable from other machines",
        "listn": "unknown key, did you mean listen?",
        "store": "must be a map of its keys",
        "upstream.token": "must be a text (in quotes if need be)",
        "upstream.reconnect.max_s": "must be a number",
        "poll.holdd": "unknown key, did you mean poll.hold? (from SHIM_POLL__HOLDD)",
    }


@pytest.mark.parametrize(
    "text,path,message",
    [
        ("poll: {hold: sometimes}", "poll.hold", "must be one of auto, off or a number"),
        ("poll: {hold: .nan}", "poll.hold", "must be one of auto, off or a number"),
        ("listen: {port: '7080'}", "listen.port", "must be a whole number"),
        ("listen: {port: 010}", "listen.port", "must be a whole number"),
        ("listen: {port: true}", "listen.port", "must be a whole number"),
        ("listen: {port: 7080.5}", "listen.port", "must be a whole number"),
        ("upstream: {share_link: yes}", "upstream.share_link", "must be true or false"),
        ("upstream: {share_link: 1}", "upstream.share_link", "must be true or false"),
        ("identity: {name: 12}", "identity.name", "must be a text (in quotes if need be)"),
        ("identity: {labels: {a: 1}}", "identity.labels", "must be a map of texts to texts"),
        ("commands: {types: command}", "commands.types", "must be a list of texts"),
        ("upstream: {port: 1}", "upstream.port", "unknown key, did you mean listen.port?"),
        ("zzz: {a: 1}", "zzz", "unknown key"),
        ("1: 2", "1", "unknown key"),
        ("listen: {tls: yes}", "listen.tls", "must be a map of its keys"),
    ],
)
def test_wrong_types_and_keys(tmp_path: Path, text: str, path: str, message: str) -> None:
    assert faults_of(tmp_path, text) == {path: message}


@pytest.mark.parametrize(
    "item,path",
    [
        ("commands.ttl_s=inf", "commands.ttl_s"),
        ("listen.port=", "listen.port"),
        ("identity.labels.team=a", "identity.labels"),
        ("commands.types=[[1]]", "commands.types"),
        ("commands.types=" + "[" * 100_000, "commands.types"),
        ("listen.tls={", "listen.tls"),
        ("listen.tls=[]", "listen.tls"),
        ("listen.tls.cert.file=x", "listen.tls.cert"),
        ("mode.x=1", "mode"),
    ],
)
def test_overrides_with_faults(tmp_path: Path, item: str, path: str) -> None:
    assert list(faults_of(tmp_path, "", item)) == [path]


@pytest.mark.parametrize(
    "text,part",
    [
        ("listen: {port: 1\n", "is not valid YAML: line 2, column 1"),
        ("a: !!python/object:os.system x\n", "is not valid YAML: line 1, column 4"),
        ("a: 1\n---\nb: 2\n", "is not valid YAML: line 2"),
        ("a: \x07\n", "is not valid YAML"),
        ("[" * 3000, "is not valid YAML"),
        ("- a\n", "must be a map of sections"),
        ("upstream: {token: !!int hunter2}", "line 1, column 19: not a value of its type"),
        ("upstream: {token: !!timestamp hunter2}", "line 1, column 19: not a value of its type"),
        ("upstream: {token: !!bool hunter2}", "line 1, column 19: not a value of its type"),
        ("upstream: {token: !hunter2 x}", "could not determine a constructor for the tag"),
        ("upstream: {token: *hunter2}", "found undefined alias"),
        ("upstream: {token: !h!hunter2 x}", "found undefined tag handle"),
        ("listen: {port: " + "9" * 5000 + "}", "line 1, column 16: not a value of its type"),
        ("? [a]\n: 1\n", "found unhashable key"),
        ("upstream:\n  token: a\n  token: b\n", "line 3: the key 'token' is given twice"),
    ],
)
def test_files_that_are_no_configuration(tmp_path: Path, text: str, part: str) -> None:
    assert part in faults_of(tmp_path, text)[""]


def test_files_that_grow_when_they_are_read_hurt_nobody(tmp_path: Path) -> None:
    """Aliases double at each level, as items and as merged keys."""
    lists = "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 60))
    maps = "".join(f"m{n}: &m{n} {{<<: [*m{n - 1}, *m{n - 1}]}}\n" for n in range(1, 60))
    found = faults_of(tmp_path, f"a0: &a0 [x, x]\n{lists}m0: &m0 {{k: 1, l: 1}}\n{maps}")
    assert len(found) == 101


def test_a_file_of_very_many_unknown_keys_names_some(tmp_path: Path) -> None:
    found = faults_of(tmp_path, "".join(f"key{number}: v\n" for number in range(3000)))
    assert len(found) == 101
    assert found[""] == "and 2900 more"


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    assert "larger than 262144 bytes" in faults_of(tmp_path, "#" * 5_000_000)[""]


@pytest.mark.parametrize("text", ["", "# a comment\n", "---\n", "~\n", "\n \n"])
def test_a_file_without_content_is_a_fault_at_a_reload_only(tmp_path: Path, text: str) -> None:
    file = tmp_path / "shim.yaml"
    file.write_text(text)
    assert load(str(file), {}, ()) == Settings()
    with pytest.raises(ConfigError, match="is empty"):
        load(str(file), {}, (), reload=True)
    file.write_text("{}")
    assert load(str(file), {}, (), reload=True) == Settings()


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    file = tmp_path / "shim.yaml"
    file.write_bytes(b"upstream: {token: hunter2\xff}")
    with pytest.raises(ConfigError) as caught:
        load(str(file), {}, ())
    assert str(caught.value) == f"{file} is not valid YAML"


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    for path in (str(tmp_path / "none.yaml"), str(tmp_path), "a\0b"):
        with pytest.raises(ConfigError, match="cannot be read") as caught:
            load(path, {}, ())
        assert len(caught.value.faults) == 1


@pytest.mark.parametrize(
    "text",
    [
        "upstream: {token: [hunter2]}",
        "upstream: {token: 'two hunter2 words', url: 'https://u:hunter2@h'}",
        "upstream: {url: 'https://u:hunter2@h:port', proxy: 'socks://u:hunter2@h'}",
        "store: {url: 'redis://u:hunter2@h'}",
        "upstream: {token: 'hunter2'",
        "mode: hunter2",
        "upstream: {share_link: hunter2}",
        "upstream: {token: hunter2, token_file: /x}",
        'upstream: {token: "hunter2\\n"}',
        "upstream: {token: !!int hunter2}",
        "upstream: {token: !!float hunter2}",
        "upstream: {token: !!binary hunter2}",
        "upstream: {token: !hunter2 x}",
        "upstream: {token: !h!hunter2 x}",
        "upstream: {token: *hunter2}",
        "upstream: {token: &hunter2 a, url: &hunter2 b}",
        "upstream: {token:hunter2}",
        "upstream: {token=hunter2}",
        "upstream:\n  token:hunter2\n  url: x",
        "upstream: {token: %hunter2}",
        "upstream: {token: @hunter2}",
        "upstream: {token: 'a' hunter2}",
        'upstream: {token: "\\hunter2"}',
    ],
)
def test_no_fault_shows_a_value(tmp_path: Path, text: str) -> None:
    assert "hunter2" not in str(faults_of(tmp_path, text))
    assert "hunter2" not in str(faults_of(tmp_path, "", "hunter2", "listen.port=hunter2", "listen.tls=hunter2"))


SECRET = load(
    None,
    {"SHIM_UPSTREAM__TOKEN": "tok-hunter2"},
    [
        "upstream.url=https://h/base?key=url-hunter2",
        "upstream.proxy=http://user:proxy-hunter2@p:3128",
        "fallback.url=https://h/base?key=url-hunter2",
        "fallback.proxy=http://user:other%40hunter2@p:3128",
        "store.url=postgresql://u:store-hunter2@a,b/shim",
        "telemetry.otlp_url=https://h/v1/traces?api-key=trace-hunter2",
    ],
)


def test_dump_masks_secrets_and_reads_back() -> None:
    text = dump(SECRET)
    assert "hunter2" not in text
    plain = redacted(SECRET)
    assert plain["upstream"]["token"] == "***"
    assert plain["upstream"]["url"] == "https://h/base?***"
    assert plain["upstream"]["proxy"] == "http://***@p:3128"
    assert plain["store"]["url"] == "postgresql://u:***@a,b/shim"


def test_dump_of_settings_without_secrets_is_a_configuration(tmp_path: Path) -> None:
    settings = settings_of(tmp_path, "poll: {hold: off}\nsunset: {at: 2026-12-31}\nidentity: {labels: {ä: '1'}}\n")
    assert settings_of(tmp_path, dump(settings)) == settings


def test_secrets_are_the_texts_to_be_masked_in_logs() -> None:
    found = secrets(SECRET)
    assert {"tok-hunter2", "url-hunter2", "proxy-hunter2", "trace-hunter2"} < set(found)
    assert "dXNlcjpwcm94eS1odW50ZXIy" in found  # as Proxy-Authorization carries user and password
    assert secrets(Settings()) == []


def test_the_token_file_is_read_each_time(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("  first\n")
    settings = load(None, {}, [f"upstream.token_file={file}"])
    assert read_token(settings) == "first"
    file.write_text("second")
    assert read_token(settings) == "second"


@pytest.mark.parametrize("data", [b"hunter2", b"\xef\xbb\xbfhunter2\r\n", b"\n hunter2 \n"])
def test_what_editors_write_around_a_secret_is_no_part_of_it(data: bytes, tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_bytes(data)
    assert read_secret(str(file), "upstream.token_file") == "hunter2"


def test_a_token_in_the_settings_and_none() -> None:
    assert read_token(load(None, {}, ["upstream.token=abc"])) == "abc"
    assert read_token(Settings()) == ""


@pytest.mark.parametrize(
    "data,message",
    [
        (b" \n", "the file is empty"),
        (b"\xef\xbb\xbf\n", "the file is empty"),
        (b"hunter2 hunter2", "the file must hold one word of printable ASCII"),
        (b"hunter2\x00", "the file must hold one word of printable ASCII"),
        (b"\xff\xfehunter2", "the file must hold one word of printable ASCII"),
        (b"hunter2" * 10_000, "cannot be read: larger than 65536 bytes"),
        (None, "cannot be read: No such file or directory"),
    ],
)
def test_secret_files_that_hold_no_secret(tmp_path: Path, data: bytes | None, message: str) -> None:
    file = tmp_path / "token"
    if data is not None:
        file.write_bytes(data)
    with pytest.raises(ConfigError) as caught:
        read_secret(str(file), "upstream.token_file")
    assert str(caught.value) == f"upstream.token_file: {message}"


@pytest.mark.timeout(5)
def test_a_fifo_in_the_place_of_a_file_is_refused_without_waiting(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with pytest.raises(ConfigError, match=r"upstream\.token_file: cannot be read: not a regular file"):
        read_secret(str(fifo), "upstream.token_file")
    with pytest.raises(ConfigError, match="cannot be read: not a regular file"):
        load(str(fifo), {}, ())


def test_sections_are_the_parents_of_all_keys() -> None:
    assert {"listen", "listen.tls", "upstream.reconnect", "log"} <= sections()
    assert not sections() & {path for path, _, _ in leaves()}


def test_the_path_of_a_webhook_is_a_secret(tmp_path: Path) -> None:
    settings = settings_of(
        tmp_path, "notify: {url: 'https://me:pw@hooks.example:8443/services/T00/hunter2-hunter2?a=b'}"
    )
    assert redacted(settings)["notify"]["url"] == "https://hooks.example:8443/***"
    assert "services/T00/hunter2-hunter2" in secrets(settings)
    assert not [text for text in secrets(settings_of(tmp_path, "notify: {url: 'https://x/alerts'}")) if text]
