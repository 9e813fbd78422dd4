"""All ways of injection make the same pod from the vendor's manifests, and a second time changes nothing."""

from __future__ import annotations

from pathlib import Path

import kubernetes_validate
import pytest

from shim.tools.inject.documents import Options, inject
from tests.support.manifests import (
    HELMS,
    NAMESPACE,
    ROOT,
    SHAPES,
    Refused,
    container,
    documents,
    env_of,
    one,
    pod_of,
    rendered,
    run,
    vendor_text,
)
from tests.support.policy import admit

IMAGE = "example/agent-shim:v9"
POST_RENDERER = ROOT / "helm" / "post-renderer"
WITH_POLICY = "injection.admissionPolicy.enabled=true"


def by_command(shape: str) -> dict:
    return pod_of(inject(vendor_text(shape), Options(IMAGE, config=False)))


def policy(*sets: str) -> dict:
    image = ("image.repository=example/agent-shim", "image.tag=v9")
    return one(rendered(WITH_POLICY, *image, *sets), "MutatingAdmissionPolicy")


def kustomized(shape: str, folder: Path, *components: str) -> str:
    """The vendor's manifest with our components, as an overlay that stands anywhere in a user's repository."""
    (folder / "agent.yaml").write_text(vendor_text(shape))
    run("cp", "-RL", ROOT / "config" / "kustomize", folder / "agent-shim")
    names = "".join(f"  - agent-shim/{name}\n" for name in (SHAPES[shape], *components))
    images = "images:\n  - {name: agent-shim, newName: example/agent-shim, newTag: v9}\n"
    (folder / "kustomization.yaml").write_text(f"resources: [agent.yaml]\ncomponents:\n{names}{images}")
    return run("kubectl", "kustomize", folder)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.needs("helm4")
def test_the_policy_makes_the_pod_that_the_command_makes(shape: str) -> None:
    made = admit(policy(f"agent.install={SHAPES[shape]}"), pod_of(vendor_text(shape)), NAMESPACE)
    assert made == by_command(shape)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.needs("kubectl")
def test_kustomize_makes_the_pod_that_the_command_makes(shape: str, tmp_path: Path) -> None:
    assert pod_of(kustomized(shape, tmp_path)) == by_command(shape)


@pytest.mark.needs("kubectl")
def test_the_config_component_gives_the_config_map_that_the_command_gives(tmp_path: Path) -> None:
    ours = one(documents(kustomized("manifest", tmp_path, "config")), "ConfigMap", "agent-shim")
    theirs = one(documents(inject(vendor_text("manifest"), Options(IMAGE))), "ConfigMap", "agent-shim")
    assert documents(ours["data"]["config.yaml"]) == documents(theirs["data"]["config.yaml"])


@pytest.mark.needs("helm4")
def test_the_chart_gives_the_config_map_that_the_command_gives() -> None:
    ours = one(rendered(), "ConfigMap")
    theirs = one(documents(inject(vendor_text("manifest"), Options(IMAGE))), "ConfigMap", "agent-shim")
    assert documents(ours["data"]["config.yaml"]) == documents(theirs["data"]["config.yaml"])


def vendor_chart(folder: Path, shape: str = "chart") -> Path:
    (folder / "templates").mkdir(parents=True)
    (folder / "Chart.yaml").write_text("apiVersion: v2\nname: pipeops-agent\nversion: 0.0.1\n")
    (folder / "templates" / "all.yaml").write_text(vendor_text(shape))
    return folder


def post_rendered(helm: str, folder: Path, *args: str, shape: str = "chart") -> str:
    """`helm template` of a chart like the vendor's through our post-renderer, as this Helm wants to be told."""
    env = {"HELM_DATA_HOME": str(folder / "data"), "HELM_CACHE_HOME": str(folder / "cache")}
    renderer = str(POST_RENDERER / "agent-shim-sidecar.sh")
    if helm == "helm4":
        run(helm, "plugin", "install", POST_RENDERER, env=env)
        renderer = "agent-shim-sidecar"
    more = [part for arg in args for part in ("--post-renderer-args", arg)]
    chart = vendor_chart(folder / "vendor", shape)
    return run(helm, "template", "pipeops-agent", chart, "--post-renderer", renderer, *more, env=env)


@pytest.mark.parametrize("helm", HELMS)
@pytest.mark.needs("helm3", "helm4", "kubectl")
def test_the_post_renderer_makes_the_pod_that_the_command_makes(helm: str, tmp_path: Path) -> None:
    text = post_rendered(helm, tmp_path, "--image", IMAGE)
    assert pod_of(text) == by_command("chart")
    assert not [
        each for each in documents(text) if each["kind"] == "ConfigMap" and each["metadata"]["name"] == "agent-shim"
    ]


@pytest.mark.needs("helm3", "kubectl")
def test_the_post_renderer_takes_manifest_shapes_and_adds_the_config_map_if_asked(tmp_path: Path) -> None:
    text = post_rendered(
        "helm3", tmp_path, "--install", "manifest", "--with-config", "--image", IMAGE, shape="manifest"
    )
    assert pod_of(text) == by_command("manifest")
    assert "token_file" in one(documents(text), "ConfigMap", "agent-shim")["data"]["config.yaml"]


@pytest.mark.parametrize(
    "args, change, said",
    [
        ((), ("serviceAccountName:", "hostNetwork: true\n      serviceAccountName:"), "hostNetwork"),
        ((), ("name: pipeops-agent\n", "name: other\n"), "no Deployment named pipeops-agent"),
        (("--colour",), ("", ""), "unknown argument --colour"),
        (("--install", "magic"), ("", ""), "--install is chart or manifest"),
    ],
)
@pytest.mark.needs("kubectl")
def test_the_post_renderer_refuses(args: tuple[str, ...], change: tuple[str, str], said: str) -> None:
    script = POST_RENDERER / "agent-shim-sidecar.sh"
    with pytest.raises(Refused, match=said):
        run(script, "--install", "manifest", *args, stdin=vendor_text("manifest").replace(*change))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("version", ["1.29", "1.31", "1.34", "1.36"])
def test_the_injected_manifest_is_valid_as_a_whole(shape: str, version: str) -> None:
    text = vendor_text(shape)
    for each in [*documents(text), *documents(inject(text, Options(IMAGE)))]:
        kubernetes_validate.validate(each, version, strict=True)


class TestPolicy:
    """What the API server does with pods that are not quite the vendor's."""

    pytestmark = pytest.mark.needs("helm4")

    def test_a_second_time_changes_nothing(self) -> None:
        ours = policy()
        once = admit(ours, pod_of(vendor_text("manifest")), NAMESPACE)
        assert admit(ours, once, NAMESPACE) == once

    def test_pods_that_are_none_of_ours_stay_as_they_are(self) -> None:
        ours = policy()
        base = pod_of(vendor_text("manifest"))
        opted_out = {**base, "metadata": {"labels": {**base["metadata"]["labels"], "agent-shim/inject": "disabled"}}}
        host = {**base, "spec": {**base["spec"], "hostNetwork": True}}
        stranger = {**base, "metadata": {"labels": {"app": "web"}}}
        nameless = {**base, "metadata": {}}
        monitoring = {**base, "spec": {**base["spec"], "containers": [{"name": "prometheus"}]}}
        for pod in (opted_out, host, stranger, nameless, monitoring):
            assert admit(ours, pod, NAMESPACE) == pod
        assert admit(ours, base, "default") == base

    def test_init_containers_of_others_come_after_ours(self) -> None:
        pod = pod_of(vendor_text("manifest"))
        pod["spec"]["initContainers"] = [{"name": "mesh", "image": "mesh", "restartPolicy": "Always"}]
        made = admit(policy(), pod, NAMESPACE)
        assert [each["name"] for each in made["spec"]["initContainers"]] == ["agent-shim", "mesh"]

    def test_a_pod_with_next_to_nothing_gets_all_of_it(self) -> None:
        pod = {"metadata": {"labels": {"app": "pipeops-agent"}}, "spec": {"containers": [{"name": "agent"}]}}
        made = admit(policy(), pod, NAMESPACE)
        assert env_of(container(made, "agent")) == {"PIPEOPS_API_URL": "http://127.0.0.1:7080"}
        assert len(made["spec"]["volumes"]) == 4

    def test_the_agent_is_found_behind_another_container(self) -> None:
        pod = pod_of(vendor_text("manifest"))
        pod["spec"]["containers"].insert(0, {"name": "logs", "image": "logs"})
        made = admit(policy(), pod, NAMESPACE)
        assert "PIPEOPS_API_URL" not in env_of(container(made, "logs"))
        assert env_of(container(made, "agent"))["PIPEOPS_API_URL"] == "http://127.0.0.1:7080"

    def test_a_url_of_the_chart_without_a_value_is_left_to_the_configuration(self) -> None:
        pod = pod_of(vendor_text("chart"))
        del pod["spec"]["containers"][0]["env"][0]
        made = admit(policy("agent.install=chart"), pod, NAMESPACE)
        assert "SHIM_UPSTREAM__URL" not in env_of(container(made, "agent-shim"))

    def test_with_a_claim_the_pod_can_write_it(self) -> None:
        pod = pod_of(vendor_text("installer"))
        made = admit(policy("store.type=pvc"), pod, NAMESPACE)
        assert made["spec"]["securityContext"] == {"fsGroup": 10001}
        vendors = admit(policy("store.type=pvc"), pod_of(vendor_text("manifest")), NAMESPACE)
        assert vendors["spec"]["securityContext"]["fsGroup"] == 1000
        pod["spec"]["securityContext"] = {"runAsUser": 5}
        assert admit(policy("store.type=pvc"), pod, NAMESPACE)["spec"]["securityContext"]["fsGroup"] == 10001

    def test_a_gateway_changes_nothing_but_the_url(self) -> None:
        ours = policy("mode=gateway", "agent.namespaces={a,b}")
        pod = pod_of(vendor_text("manifest"))
        made = admit(ours, pod, "a")
        url = "http://agent-shim.pipeops-system.svc:7080"
        assert env_of(container(made, "agent"))["PIPEOPS_API_URL"] == url
        assert "initContainers" not in made["spec"]
        assert made["spec"]["volumes"] == pod["spec"]["volumes"]
        assert admit(ours, made, "b") == made
        assert admit(ours, pod, NAMESPACE) == pod
