"""`agent-shim inject`: comments, order, idempotence, removal, and what it refuses."""

from __future__ import annotations

import difflib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from shim.cli.inject.documents import Options, inject, remove
from shim.cli.inject.sidecar import NAME, InjectError
from tests.support.manifests import SHAPES, container, documents, env_of, one, pod_of, vendor_text

IMAGE = "example/agent-shim:v9"
OPTIONS = Options(IMAGE)

MINIMAL = """\
apiVersion: v1
kind: Pod
metadata: {name: one}
spec:
  containers:
    - name: pipeops-agent
      image: agent
"""

BY_REFERENCE = """\
valueFrom:
                secretKeyRef:
                  name: pipeops-agent-config
                  key: token
"""


def agent_shim(*args: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "shim", "inject", *args]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=120, check=False)


def agent_shim_bytes(*args: str) -> bytes:
    command = [sys.executable, "-m", "shim", "inject", *args]
    return subprocess.run(command, capture_output=True, timeout=120, check=True).stdout


@pytest.mark.parametrize("shape", SHAPES)
def test_removal_gives_the_vendors_text_back_to_the_byte(shape: str) -> None:
    text = vendor_text(shape)
    assert remove(inject(text, OPTIONS)) == text


def mixed(text: str) -> str:
    """Every third line ends as on Windows."""
    lines = text.split("\n")
    return "".join(line + ("\r\n" if at % 3 == 0 else "\n") for at, line in enumerate(lines[:-1])) + lines[-1]


FORMS: dict[str, Callable[[str], str]] = {
    "crlf": lambda text: text.replace("\n", "\r\n"),
    "mixed": mixed,
    "bom": lambda text: "\ufeff" + text,
    "bom-crlf-unended": lambda text: "\ufeff" + text.rstrip("\n").replace("\n", "\r\n"),
    "unended": lambda text: text.rstrip("\n"),
    "blank-lines-at-the-end": lambda text: text + "\n\n",
    "wide": lambda text: text.replace("image: ", "image:   "),
    "comment-at-the-end": lambda text: text + "# the end",
    "trailing-spaces": lambda text: text.replace("spec:\n", "spec:  \n"),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [*SHAPES, "minimal"])
def test_the_form_of_the_text_is_kept(shape: str, form: str) -> None:
    text = FORMS[form](MINIMAL if shape == "minimal" else vendor_text(shape))
    options = Options(IMAGE, own_token=shape == "minimal")
    once = inject(text, options)
    assert once != text
    assert inject(once, options) == once
    assert once.startswith("\ufeff") == text.startswith("\ufeff")
    assert once.endswith("\n") == text.endswith("\n")
    if "crlf" in form:
        assert once.count("\n") == once.count("\r\n")
    back = remove(once)
    if (shape, form) == ("chart", "mixed"):  # the line of the URL is replaced, and comes back as most lines end
        back, text = back.replace("\r\n", "\n"), text.replace("\r\n", "\n")
    assert back.encode() == text.encode()


@pytest.mark.parametrize("form", ["bom-crlf-unended", "mixed"])
def test_the_command_writes_the_bytes_that_it_read(form: str, tmp_path: Path) -> None:
    file = tmp_path / "agent.yaml"
    file.write_bytes(FORMS[form](MINIMAL).encode())
    injected = agent_shim_bytes("--image", IMAGE, "--own-token", "-f", str(file))
    file.with_name("with.yaml").write_bytes(injected)
    assert agent_shim_bytes("--remove", "-f", str(file.with_name("with.yaml"))) == file.read_bytes()


@pytest.mark.parametrize("shape", SHAPES)
def test_a_second_time_changes_nothing(shape: str) -> None:
    once = inject(vendor_text(shape), OPTIONS)
    assert inject(once, OPTIONS) == once


@pytest.mark.parametrize("shape", SHAPES)
def test_only_lines_of_ours_are_added(shape: str) -> None:
    before, after = vendor_text(shape).splitlines(), inject(vendor_text(shape), OPTIONS).splitlines()
    diff = difflib.unified_diff(before, after, lineterm="", n=0)
    missing = [line[1:] for line in diff if line.startswith("-") and not line.startswith("---")]
    # The chart's own URL moves to the sidecar; everything else stays, comments included, in its order.
    assert missing == (['              value: "https://api.pipeops.sh"'] if shape == "chart" else [])


def test_another_image_takes_the_place_of_the_first() -> None:
    once = inject(vendor_text("chart"), OPTIONS)
    pod = pod_of(inject(once, Options("example/agent-shim:v10")))
    assert [each["image"] for each in pod["spec"]["initContainers"]] == ["example/agent-shim:v10"]
    assert env_of(container(pod, "agent-shim"))["SHIM_UPSTREAM__URL"] == "https://api.pipeops.sh"
    assert len(pod["spec"]["volumes"]) == 6


def test_the_config_map_stands_in_front_of_the_agent_and_in_its_namespace() -> None:
    kinds = [(each["kind"], each["metadata"]["name"]) for each in documents(inject(vendor_text("installer"), OPTIONS))]
    assert kinds[-2:] == [("ConfigMap", "agent-shim"), ("Deployment", "pipeops-agent")]
    assert (
        one(documents(inject(vendor_text("installer"), OPTIONS)), "ConfigMap")["metadata"]["namespace"]
        == "pipeops-system"
    )
    assert "kind: ConfigMap" not in inject(vendor_text("installer"), Options(IMAGE, config=False))


def test_an_own_token_needs_no_secret() -> None:
    pod = documents(inject(MINIMAL, Options(IMAGE, own_token=True)))[-1]
    assert [each["name"] for each in pod["spec"]["volumes"]] == [
        "agent-shim-config",
        "agent-shim-store",
        "agent-shim-empty",
    ]
    config = documents(documents(inject(MINIMAL, Options(IMAGE, own_token=True)))[0]["data"]["config.yaml"])[0]
    assert "upstream" not in config


def test_a_list_of_kubectl_and_a_named_container() -> None:
    text = "apiVersion: v1\nkind: List\nitems:\n" + "".join(
        f"{'- ' if not at else '  '}{line}\n"
        for at, line in enumerate(MINIMAL.replace("pipeops-agent", "mine").splitlines())
    )
    with pytest.raises(InjectError, match="--container"):
        inject(text, Options(IMAGE, own_token=True))
    found = documents(inject(text, Options(IMAGE, container="mine", own_token=True)))[-1]
    assert found["items"][0]["spec"]["initContainers"][0]["name"] == "agent-shim"
    assert remove(inject(text, Options(IMAGE, container="mine", own_token=True))) == text


def test_every_namespace_of_an_agent_gets_one_config_map() -> None:
    def agent(name: str, namespace: str) -> dict[str, object]:
        template = {"spec": {"containers": [{"name": "pipeops-agent", "image": "x"}]}}
        metadata = {"name": name, "namespace": namespace}
        return {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": metadata, "spec": {"template": template}}

    agents = [agent("one", "a"), agent("two", "b"), agent("three", "a")]
    a_list = {"apiVersion": "v1", "kind": "List", "items": agents}
    for text in (
        yaml.safe_dump(a_list),
        "---\n" + yaml.safe_dump(a_list),
        yaml.safe_dump_all(agents),
        yaml.safe_dump_all([a_list, agents[0]], explicit_start=True),
    ):
        once = inject(text, Options(IMAGE, own_token=True))
        maps = [each["metadata"]["namespace"] for each in documents(once) if each["kind"] == "ConfigMap"]
        assert maps == ["a", "b"]
        assert inject(once, Options(IMAGE, own_token=True)) == once
        assert documents(remove(once)) == documents(text)


def test_keys_in_quotes_and_json_are_read() -> None:
    """`kubectl get --output json` prints such a manifest."""
    text = json.dumps(documents(vendor_text("manifest"))[-1], indent=2)
    assert pod_of(inject(text, OPTIONS)) == pod_of(inject(vendor_text("manifest"), OPTIONS))
    with pytest.raises(InjectError, match=r"not a Pod of Kubernetes: .* at `\$.metadata"):
        inject('{"kind": "Pod", "metadata": "x"}', OPTIONS)


def test_a_value_that_contains_itself_is_no_endless_loop() -> None:
    assert f"name: {NAME}" in inject(f"{MINIMAL}x: &x [*x]\n", Options(IMAGE, own_token=True))


def test_a_source_of_the_url_moves_over_and_comes_back() -> None:
    by_reference = vendor_text("chart").replace(
        'value: "https://api.pipeops.sh"', "valueFrom: {configMapKeyRef: {name: urls, key: api}}"
    )
    pod = pod_of(inject(by_reference, OPTIONS))
    assert env_of(container(pod, "agent-shim"))["SHIM_UPSTREAM__URL"] == {
        "configMapKeyRef": {"name": "urls", "key": "api"}
    }
    assert documents(remove(inject(by_reference, OPTIONS))) == documents(by_reference)


def test_keys_without_a_value_are_as_if_they_were_not_there() -> None:
    empty = MINIMAL + "      env:\n  initContainers:\n  volumes:\n"
    own_token = Options(IMAGE, own_token=True)
    assert documents(inject(empty, own_token)) == documents(inject(MINIMAL, own_token))
    assert documents(remove(inject(empty, own_token))) == documents(MINIMAL)


def test_what_other_places_mean_by_an_alias_is_left_alone() -> None:
    text = """\
apiVersion: apps/v1
kind: Deployment
metadata:
  name: agent
  labels: &labels {app: pipeops-agent}
spec:
  selector:
    matchLabels: *labels
  template:
    metadata:
      labels: *labels
    spec:
      containers:
        - name: other
          env: &env
            - {name: PIPEOPS_API_URL, value: "https://controller.test"}
        - name: agent
          env: *env
"""
    before, after = documents(text)[0], documents(inject(text, Options(IMAGE, own_token=True)))[-1]
    assert after["metadata"] == before["metadata"]
    assert after["spec"]["selector"] == before["spec"]["selector"]  # which Kubernetes lets nobody change
    assert after["spec"]["template"]["metadata"]["labels"] == {"app": "pipeops-agent", "agent-shim/sidecar": "enabled"}
    pod = after["spec"]["template"]
    assert env_of(container(pod, "other"))["PIPEOPS_API_URL"] == "https://controller.test"
    assert env_of(container(pod, "agent"))["PIPEOPS_API_URL"] == "http://127.0.0.1:7080"
    assert documents(remove(inject(text, Options(IMAGE, own_token=True)))) == [before]


def test_lists_indented_in_two_ways_stay_valid() -> None:
    text = vendor_text("chart").replace("          env:\n            - name", "          env:\n          - name", 1)
    text = text.replace('              value: "https://api.pipeops.sh"', '            value: "https://api.pipeops.sh"')
    head, _, rest = text.partition('            value: "https://api.pipeops.sh"\n')
    env, _, tail = rest.partition("          ports:")
    text = (
        f'{head}            value: "https://api.pipeops.sh"\n'
        + "".join(f"{line[2:]}\n" for line in env.splitlines())
        + f"          ports:{tail}"
    )
    assert pod_of(inject(text, OPTIONS)) == pod_of(inject(vendor_text("chart"), OPTIONS))
    assert documents(remove(inject(text, OPTIONS))) == documents(text)


def test_an_agent_that_opted_out_is_none() -> None:
    text = vendor_text("installer").replace(
        "        app: pipeops-agent\n    spec",
        "        app: pipeops-agent\n        agent-shim/inject: disabled\n    spec",
    )
    with pytest.raises(InjectError, match="no agent"):
        inject(text, OPTIONS)


@pytest.mark.parametrize(
    "old, new, said",
    [
        ("serviceAccountName: pipeops-agent", "hostNetwork: true", "hostNetwork, where 127.0.0.1"),
        ("          envFrom:\n            - secretRef:\n                name: pipeops-agent-config\n", "", "no Secret"),
        ("- name: agent\n", "- name: web\n", "no agent in it"),
        ("kind: Deployment", "kind: Deployment\n  x: [", "not valid YAML in line"),
        (
            "      volumes:\n",
            "      volumes:\n        - {name: agent-shim-store}\n",
            "named agent-shim-store",
        ),
        ("      containers:\n", "      containers:\n        - name: agent-shim\n", "named agent-shim, as"),
    ],
)
def test_what_cannot_be_done_is_said(old: str, new: str, said: str) -> None:
    assert old in vendor_text("manifest")
    with pytest.raises(InjectError, match=said):
        inject(vendor_text("manifest").replace(old, new), OPTIONS)


@pytest.mark.parametrize(
    "old, new, said",
    [
        ("https://api.pipeops.sh", "http://127.0.0.1:9000", "is http://127.0.0.1:9000 already"),
        ("https://api.pipeops.sh", "http://localhost:7080/", "is http://localhost:7080/ already"),
        ("https://api.pipeops.sh", "http://[::1]:7080", "already: set the real URL"),
        ("https://api.pipeops.sh", "https://$(REGION).example", "none of the agent's variables"),
        (
            BY_REFERENCE,
            "value: in-the-open\n",
            "in no Secret: use --own-token",
        ),
    ],
)
def test_what_the_vendors_chart_cannot_be_given_is_said(old: str, new: str, said: str) -> None:
    assert old in vendor_text("chart")
    with pytest.raises(InjectError, match=said):
        inject(vendor_text("chart").replace(old, new), OPTIONS)


def test_the_command_reads_files_and_stdin(tmp_path: Path) -> None:
    file = tmp_path / "agent.yaml"
    file.write_text(vendor_text("manifest"))
    by_file = agent_shim("-f", str(file), "--image", IMAGE)
    by_stdin = agent_shim("--image", IMAGE, stdin=vendor_text("manifest"))
    assert by_file.stdout == by_stdin.stdout == inject(vendor_text("manifest"), OPTIONS)
    assert (by_file.returncode, by_file.stderr) == (0, "")
    assert agent_shim("--remove", stdin=by_stdin.stdout).stdout == vendor_text("manifest")


@pytest.mark.parametrize(
    "make, told",
    [
        (lambda file: None, "cannot be read: No such file or directory"),
        (lambda file: file.mkdir(), "cannot be read: Is a directory"),
        (lambda file: file.write_bytes(b"caf\xe9"), "is not UTF-8 text"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_once(make: Callable[[Path], object], told: str, tmp_path: Path) -> None:
    make(tmp_path / "agent.yaml")
    done = agent_shim("--image", IMAGE, "--filename", str(tmp_path / "agent.yaml"))
    assert (done.returncode, done.stderr) == (1, f"Error: {tmp_path / 'agent.yaml'} {told}\n")


def test_a_dry_run_shows_the_difference_and_an_error_ends_with_1(tmp_path: Path) -> None:
    shown = agent_shim("--image", IMAGE, "--dry-run", "--no-config", stdin=vendor_text("installer")).stdout.splitlines()
    assert [line for line in shown if line.startswith("-")] == ["--- stdin"]
    assert "+        - name: PIPEOPS_API_URL" in shown
    failed = agent_shim("--image", IMAGE, stdin="kind: ConfigMap\n")
    assert (failed.returncode, failed.stdout) == (1, "")
    assert "no agent in it" in failed.stderr
    missing = agent_shim("--image", IMAGE, "-f", str(tmp_path / "none.yaml"))
    assert missing.returncode == 1
    assert "cannot be read" in missing.stderr


@pytest.mark.parametrize("image", [(), ("--image=",), ("--image=https://r.example/x",), ("--image=r.example/a b",)])
def test_an_image_must_be_given_that_can_be_pulled(image: tuple[str, ...]) -> None:
    done = agent_shim(*image, stdin=vendor_text("manifest"))
    assert (done.returncode, done.stdout) == (2, "")
    assert "--image must say where your clusters pull the sidecar from" in done.stderr


@pytest.mark.parametrize("image", ["agent-shim:0.1.0", "r.example:5000/team/agent-shim@sha256:" + "a" * 64])
def test_images_of_every_form_are_taken(image: str) -> None:
    done = agent_shim("--image", image, stdin=vendor_text("manifest"))
    assert container(pod_of(done.stdout), "agent-shim")["image"] == image


def test_an_error_of_the_manifest_shows_no_value() -> None:
    with pytest.raises(InjectError) as refused:
        inject("stringData:\n  PIPEOPS_TOKEN: first-secret\n  PIPEOPS_TOKEN: second-secret\n", OPTIONS)
    assert str(refused.value) == 'not valid YAML in line 3 of a document: found duplicate key "PIPEOPS_TOKEN"'


def test_removal_leaves_volumes_of_others_whatever_they_are_called() -> None:
    volumes = "      volumes: [{name: agent-shim-certs, emptyDir: {}}]\n      containers:\n"
    text = vendor_text("installer").replace("      containers:\n", volumes)
    assert "agent-shim-certs" in text
    once = inject(text, OPTIONS)
    assert "agent-shim-certs" in {volume["name"] for volume in pod_of(once)["spec"]["volumes"]}
    assert documents(remove(once)) == documents(text)


def _kind(kind: str, spec: dict[str, object], name: str = "one") -> dict[str, object]:
    return {"kind": kind, "metadata": {"name": name}, "spec": spec}


AGENT_POD = {"spec": {"containers": [{"name": "pipeops-agent", "image": "x"}]}}
NOT_CHANGED = [
    _kind("Job", {"template": AGENT_POD}),
    _kind("CronJob", {"jobTemplate": {"spec": {"template": AGENT_POD}}}),
    _kind("Rollout", {"template": AGENT_POD}),
    _kind("Deployment", {"template": {"metadata": {"labels": {"agent-shim/inject": "disabled"}}, **AGENT_POD}}),
]


def test_every_agent_that_is_left_unchanged_is_reported_with_the_reason() -> None:
    without = [
        _kind("Job", {"template": {"spec": {"containers": [{"name": "migrate", "image": "x"}]}}}),
        {"kind": "Odd", "metadata": "x", **AGENT_POD},
        {"kind": "Odd", "spec": {"containers": [{"name": "pipeops-agent"}, "x"]}},
    ]
    for text in (yaml.safe_dump_all([*NOT_CHANGED, *without]), yaml.safe_dump({"kind": "List", "items": NOT_CHANGED})):
        done = agent_shim("--image", IMAGE, "--own-token", stdin=f"{text}---\n{MINIMAL}")
        assert done.returncode == 0
        reported = [line.partition(" has an agent and is left unchanged: ") for line in done.stderr.splitlines()]
        assert [who for who, _, _ in reported] == ["Job one", "CronJob one", "Rollout one", "Deployment one"]
        reasons = [why for _, _, why in reported]
        assert all("only DaemonSet, Deployment, ReplicaSet, StatefulSet or Pod" in why for why in reasons[:3])
        assert "agent-shim/inject: disabled" in reasons[3]
        assert done.stdout.startswith(text)


def test_an_object_that_is_left_unchanged_is_named_without_a_kind_and_without_control_characters() -> None:
    lines: list[str] = []
    pod = {"metadata": {"name": "one\x1b[1m"}, **AGENT_POD}
    inject(
        f"{yaml.safe_dump({'kind': 'List', 'items': [pod]})}---\n{MINIMAL}",
        Options(IMAGE, own_token=True),
        lines.append,
    )
    assert [line.partition(" has ")[0] for line in lines] == ["Object one?[1m"]


def test_the_reasons_come_before_the_error_that_there_is_no_other_agent() -> None:
    done = agent_shim("--image", IMAGE, "--own-token", stdin=yaml.safe_dump(NOT_CHANGED[0]))
    assert (done.returncode, done.stdout) == (1, "")
    first, error = done.stderr.splitlines()
    assert first.startswith("Job one has an agent and is left unchanged: ")
    assert error.startswith("Error: no agent in it that can be changed: ")
