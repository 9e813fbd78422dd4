"""All ways of injection make the same pod from the vendor's manifests, and a second time changes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from shim.cli.inject.documents import Options, inject
from shim.cli.inject.missing_sidecars import agents
from tests.support.manifests import (
    HELMS,
    NAMESPACE,
    ROOT,
    SHAPES,
    Refused,
    assert_valid,
    container,
    documents,
    env_of,
    one,
    pod_of,
    rendered,
    run,
    vendor_text,
)
from tests.support.policy import ServerPanic, admit, plain

IMAGE = "example/agent-shim:v9"
POST_RENDERER = ROOT / "helm" / "post-renderer"
WITH_POLICY = "injection.admissionPolicy.enabled=true"


def by_command(shape: str) -> dict:
    return pod_of(inject(vendor_text(shape), Options(IMAGE, config=False)))


def policy(*sets: str) -> dict:
    image = ("image.registry=example", "image.tag=v9")
    return one(rendered(WITH_POLICY, *image, *sets), "MutatingAdmissionPolicy")


def kustomized(shape: str, folder: Path, *components: str, text: str = "") -> str:
    """The vendor's manifest with our components, as an overlay that stands anywhere in a user's repository."""
    (folder / "agent.yaml").write_text(text or vendor_text(shape))
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


@pytest.mark.parametrize("namespace", ["", "elsewhere"])
@pytest.mark.parametrize("shape", ["manifest", "installer"])
@pytest.mark.needs("kubectl")
def test_the_config_map_of_the_component_is_where_the_agent_is(shape: str, namespace: str, tmp_path: Path) -> None:
    text = kustomized(shape, tmp_path, "config")
    if namespace:
        with (tmp_path / "kustomization.yaml").open("a") as file:
            file.write(f"namespace: {namespace}\n")
        text = run("kubectl", "kustomize", tmp_path)
    agent = one(documents(text), "Deployment", "pipeops-agent")["metadata"]["namespace"]
    assert one(documents(text), "ConfigMap", "agent-shim")["metadata"]["namespace"] == agent == (namespace or NAMESPACE)


OTHER_SOURCES = {
    "secret": {"secretKeyRef": {"name": "urls", "key": "api"}},
    "config-map": {"configMapKeyRef": {"name": "urls", "key": "api", "optional": True}},
    "field": {"fieldRef": {"apiVersion": "v1", "fieldPath": "metadata.annotations['api']"}},
}


def with_source(text: str, source: dict) -> str:
    """Return the vendor's rendered chart with `PIPEOPS_API_URL` taken from somewhere instead of a value."""
    found = documents(text)
    agent = one(found, "Deployment")["spec"]["template"]["spec"]["containers"][0]
    (entry,) = [entry for entry in agent["env"] if entry["name"] == "PIPEOPS_API_URL"]
    del entry["value"]
    entry["valueFrom"] = source
    return yaml.safe_dump_all(found)


@pytest.mark.parametrize("kind", OTHER_SOURCES)
@pytest.mark.needs("helm3", "helm4", "kubectl")
def test_the_agents_url_moves_to_the_sidecar_whatever_it_is_taken_from(kind: str, tmp_path: Path) -> None:
    source = OTHER_SOURCES[kind]
    text = with_source(vendor_text("chart"), source)
    by_policy = admit(policy("agent.install=chart"), pod_of(text), NAMESPACE)
    assert env_of(container(by_policy, "agent-shim"))["SHIM_UPSTREAM__URL"] == source
    assert by_policy == pod_of(inject(text, Options(IMAGE, config=False)))
    assert pod_of(post_rendered("helm3", tmp_path, "--image", IMAGE, text=text)) == by_policy
    assert pod_of(kustomized("chart", tmp_path, text=text)) == by_policy


@pytest.mark.parametrize("name", ["prod", "prod-pipeops-agent", "1234567"])
@pytest.mark.needs("helm3", "kubectl")
def test_the_vendors_release_may_have_any_name(name: str, tmp_path: Path) -> None:
    text = vendor_text("chart").replace("  name: pipeops-agent\n  namespace", f'  name: "{name}"\n  namespace')
    for made in (
        post_rendered("helm3", tmp_path, "--image", IMAGE, text=text),
        kustomized("chart", tmp_path, text=text),
    ):
        template = one(documents(made), "Deployment", name)["spec"]["template"]
        assert {"apiVersion": "v1", "kind": "Pod", **template} == by_command("chart")


@pytest.mark.needs("helm3", "kubectl")
def test_other_deployments_of_the_release_stay_as_they_are(tmp_path: Path) -> None:
    web = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": "web", "labels": {"app.kubernetes.io/name": "web"}},
        "spec": {"template": {"spec": {"containers": [{"name": "pipeops-agent", "image": "web"}]}}},
    }
    made = post_rendered("helm3", tmp_path, "--image", IMAGE, text=f"{vendor_text('chart')}---\n{yaml.safe_dump(web)}")
    assert pod_of(made) == by_command("chart")
    assert one(documents(made), "Deployment", "web") == web


def vendor_chart(folder: Path, text: str) -> Path:
    (folder / "templates").mkdir(parents=True)
    (folder / "Chart.yaml").write_text("apiVersion: v2\nname: pipeops-agent\nversion: 0.0.1\n")
    (folder / "templates" / "all.yaml").write_text(text)
    return folder


def post_rendered(helm: str, folder: Path, *args: str, shape: str = "chart", text: str = "") -> str:
    """`helm template` of a chart like the vendor's through our post-renderer, as this Helm wants to be told."""
    env = {"HELM_DATA_HOME": str(folder / "data"), "HELM_CACHE_HOME": str(folder / "cache")}
    renderer = str(POST_RENDERER / "agent-shim-sidecar.sh")
    if helm == "helm4":
        run(helm, "plugin", "install", POST_RENDERER, env=env)
        renderer = "agent-shim-sidecar"
    more = [part for arg in args for part in ("--post-renderer-args", arg)]
    chart = vendor_chart(folder / "vendor", text or vendor_text(shape))
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
        ((), ("name: pipeops-agent\n", "name: other\n"), "no Deployment of the agent"),
        (("--colour",), ("", ""), "unknown argument --colour"),
        (("--install", "magic"), ("", ""), "--install is chart or manifest"),
        (("--install",), ("", ""), "--install is chart or manifest"),
        (("--image", ""), ("", ""), "--image must say where"),
        (("--image", "https://r.example/x"), ("", ""), "--image must say where"),
        (("--image", 'r.example/x"'), ("", ""), "--image must say where"),
        (("--image",), ("", ""), "--image must say where"),
    ],
)
@pytest.mark.needs("kubectl")
def test_the_post_renderer_refuses(args: tuple[str, ...], change: tuple[str, str], said: str) -> None:
    script = POST_RENDERER / "agent-shim-sidecar.sh"
    with pytest.raises(Refused, match=said):
        run(script, "--image", IMAGE, "--install", "manifest", *args, stdin=vendor_text("manifest").replace(*change))


@pytest.mark.needs("kubectl")
def test_the_post_renderer_asks_for_an_image_and_takes_windows_line_ends() -> None:
    script, text = POST_RENDERER / "agent-shim-sidecar.sh", vendor_text("chart")
    with pytest.raises(Refused, match="--image must say where"):
        run(script, stdin=text)
    assert pod_of(run(script, "--image", IMAGE, stdin=text.replace("\n", "\r\n"))) == by_command("chart")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("version", ["1.29", "1.31", "1.34", "1.36"])
def test_the_injected_manifest_is_valid_as_a_whole(shape: str, version: str) -> None:
    text = vendor_text(shape)
    for each in [*documents(text), *documents(inject(text, Options(IMAGE)))]:
        assert_valid(each, version)


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

    def test_an_explicit_variable_beats_the_secret_as_it_does_for_the_agent(self) -> None:
        pod = pod_of(vendor_text("manifest"))
        pod["spec"]["containers"][0].setdefault("env", []).append(
            {"name": "PIPEOPS_API_URL", "value": "https://eu.example"}
        )
        made = admit(policy("extraEnv[0].name=HTTPS_PROXY", "extraEnv[0].value=http://p:1"), pod, NAMESPACE)
        (given,) = [e for e in container(made, "agent-shim")["env"] if e["name"] == "SHIM_UPSTREAM__URL"]
        assert given == {"name": "SHIM_UPSTREAM__URL", "value": "https://eu.example"}
        assert env_of(container(made, "agent-shim"))["HTTPS_PROXY"] == "http://p:1"
        assert env_of(container(made, "agent"))["PIPEOPS_API_URL"] == "http://127.0.0.1:7080"

    @pytest.mark.parametrize("url", ["http://127.0.0.1:7080", "http://localhost:7080/"])
    def test_the_shims_own_address_does_not_take_the_secrets_place(self, url: str) -> None:
        pod = pod_of(vendor_text("manifest"))
        pod["spec"]["containers"][0].setdefault("env", []).append({"name": "PIPEOPS_API_URL", "value": url})
        made = admit(policy(), pod, NAMESPACE)
        assert env_of(container(made, "agent-shim"))["SHIM_UPSTREAM__URL"]["secretKeyRef"]["key"] == "PIPEOPS_API_URL"

    @pytest.mark.parametrize("mode", ["sidecar", "gateway"])
    def test_the_last_of_several_entries_with_one_name_counts(self, mode: str) -> None:
        pod = pod_of(vendor_text("manifest"))
        urls = [{"name": "PIPEOPS_API_URL", "value": f"https://{name}.example"} for name in ("first", "last")]
        pod["spec"]["containers"][0].setdefault("env", []).extend(urls)
        made = admit(policy(f"mode={mode}"), pod, NAMESPACE)
        # As in Kubernetes, of entries with one name `env_of` shows the last one.
        assert env_of(container(made, "agent"))["PIPEOPS_API_URL"].startswith("http://")
        if mode == "sidecar":
            assert env_of(container(made, "agent-shim"))["SHIM_UPSTREAM__URL"] == "https://last.example"

    def test_a_url_that_refers_to_the_agents_variables_leaves_the_pod_as_it_is(self) -> None:
        pod = pod_of(vendor_text("chart"))
        (entry,) = [e for e in pod["spec"]["containers"][0]["env"] if e["name"] == "PIPEOPS_API_URL"]
        entry["value"] = "https://$(REGION).example"
        assert admit(policy("agent.install=chart"), pod, NAMESPACE) == pod
        (found,) = agents([pod])
        assert "has no sidecar" in found.fault
        given = admit(policy("agent.install=chart", "upstream.url=https://c.example"), pod, NAMESPACE)
        assert env_of(container(given, "pipeops-agent"))["PIPEOPS_API_URL"] == "http://127.0.0.1:7080"

    def test_a_url_that_the_values_give_is_the_only_one(self) -> None:
        made = admit(
            policy("agent.install=chart", "upstream.url=https://c.example"), pod_of(vendor_text("chart")), NAMESPACE
        )
        assert "SHIM_UPSTREAM__URL" not in env_of(container(made, "agent-shim"))

    @pytest.mark.parametrize("mode", ["sidecar", "gateway"])
    @pytest.mark.parametrize("install", ["manifest", "chart"])
    @pytest.mark.parametrize("store", ["emptyDir", "pvc"])
    @pytest.mark.parametrize("lacking", ["env", "volumes", "securityContext", "all"])
    def test_no_pod_makes_the_api_server_panic(self, mode: str, install: str, store: str, lacking: str) -> None:
        pod = pod_of(vendor_text(install))
        agent = pod["spec"]["containers"][0]
        for key, parent in (("env", agent), ("volumes", pod["spec"]), ("securityContext", pod["spec"])):
            if lacking in (key, "all"):
                parent.pop(key, None)
        made = admit(policy(f"mode={mode}", f"agent.install={install}", f"store.type={store}"), pod, NAMESPACE)
        assert "127.0.0.1:7080" in str(made) or "agent-shim.pipeops-system.svc" in str(made)

    def test_a_list_of_typed_objects_as_a_value_is_found(self) -> None:
        with pytest.raises(ServerPanic):
            plain('[JSONPatch{op: "add", path: "/x", value: [Object.x{a: 1}]}]')

    def test_names_that_are_taken_leave_the_pod_as_it_is_and_show_as_a_gap(self) -> None:
        ours = policy()
        named = pod_of(vendor_text("manifest"))
        named["spec"]["containers"].append({"name": "agent-shim", "image": "another"})
        mounted = pod_of(vendor_text("manifest"))
        mounted["spec"].setdefault("volumes", []).append({"name": "agent-shim-store", "emptyDir": {}})
        for pod in (named, mounted):
            assert admit(ours, pod, NAMESPACE) == pod
            (found,) = agents([pod])
            assert "has no sidecar" in found.fault

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
