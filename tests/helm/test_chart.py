"""The chart under Helm 3 and 4: lint, rendering, schemas of four Kubernetes versions, refusals, what matters in it."""

from __future__ import annotations

import json
import re
import shutil
import tarfile
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml
from click.testing import CliRunner

from shim import __version__
from shim.cli.commands import store as store_command
from shim.config import loader
from shim.store.sqlite import SqliteStore
from tests.support.manifests import (
    CHART,
    HELMS,
    NAMESPACE,
    REGISTRY,
    ROOT,
    Refused,
    assert_valid,
    container,
    documents,
    env_of,
    one,
    pod_of,
    rendered,
    run,
    template,
    vendor_text,
)
from tests.support.policy import admit
from tests.support.stores import StoreClient, put

pytestmark = pytest.mark.needs("helm3", "helm4")

DATABASE = ("mode=gateway", "store.postgresql.secretName=db")
VALUE_SETS = sorted(path.name for path in (CHART / "ci").glob("*.yaml"))
KUBERNETES = ("1.29", "1.31", "1.34", "1.36")
POLICIES = {"1.29": "false", "1.31": "false", "1.34": "true", "1.36": "true"}
"""Whether the API server has MutatingAdmissionPolicies."""


@pytest.mark.parametrize("values", VALUE_SETS)
@pytest.mark.parametrize("helm", HELMS)
def test_lint(helm: str, values: str) -> None:
    assert "0 chart(s) failed" in run(helm, "lint", "--strict", CHART, "--values", CHART / "ci" / values)


@pytest.mark.parametrize("values", VALUE_SETS)
def test_both_helms_render_the_same(values: str) -> None:
    on = "injection.admissionPolicy.enabled=true"
    three, four = (rendered(on, helm=helm, values=CHART / "ci" / values) for helm in HELMS)
    assert three == four


@pytest.mark.parametrize("values", VALUE_SETS)
@pytest.mark.parametrize("version", KUBERNETES)
def test_every_object_is_valid(version: str, values: str) -> None:
    policy = f"injection.admissionPolicy.enabled={POLICIES[version]}"
    objects = rendered(policy, kube=version, values=CHART / "ci" / values)
    for each in objects:
        if not each["apiVersion"].startswith("monitoring.coreos.com/"):
            assert_valid(each, version)
    kinds = {each["kind"] for each in objects}
    assert ("MutatingAdmissionPolicy" in kinds) == (POLICIES[version] == "true")


@pytest.mark.parametrize(
    "has, kube, version",
    [
        ("admissionregistration.k8s.io/v1/MutatingAdmissionPolicy", "1.36", "v1"),
        ("admissionregistration.k8s.io/v1beta1/MutatingAdmissionPolicy", "1.34", "v1beta1"),
        ("", "1.31", ""),
    ],
)
def test_the_policy_is_there_if_the_api_is(has: str, kube: str, version: str) -> None:
    # Helm 3.17 knows of neither by itself.
    more = ["--api-versions", has] if has else []
    image = ("--set", "image.registry=registry.example")
    objects = documents(run("helm3", "template", "x", CHART, "--kube-version", kube, *image, *more))
    found = {
        each["apiVersion"].partition("/")[2] for each in objects if each["kind"].startswith("MutatingAdmissionPolicy")
    }
    assert found == ({version} if version else set())


def test_the_policy_can_be_forced_and_left_out() -> None:
    forced = one(rendered("injection.admissionPolicy.enabled=true", kube="1.35"), "MutatingAdmissionPolicy")
    assert forced["apiVersion"] == "admissionregistration.k8s.io/v1beta1"
    named = one(
        rendered("injection.admissionPolicy.enabled=true", "injection.admissionPolicy.apiVersion=v1", kube="1.35"),
        "MutatingAdmissionPolicy",
    )
    assert named["apiVersion"] == "admissionregistration.k8s.io/v1"
    off = rendered("injection.admissionPolicy.enabled=false", helm="helm4")
    assert not [each for each in off if each["kind"].startswith("Mutating")]


KYVERNO = ("v1alpha1", "v1beta1", "v1")


def with_apis(*apis: str, sets: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The objects of the chart for a cluster of 1.31 that has these APIs."""
    more = [part for api in apis for part in ("--api-versions", api)]
    more += [part for each in (f"image.registry={REGISTRY}", *sets) for part in ("--set", each)]
    return documents(
        run("helm3", "template", "agent-shim", CHART, "--namespace", NAMESPACE, "--kube-version", "1.31", *more)
    )


@pytest.mark.parametrize("count", [1, 2, 3])
def test_kyverno_has_the_policy_of_its_newest_version(count: int) -> None:
    apis = [f"policies.kyverno.io/{version}/MutatingPolicy" for version in KYVERNO[:count]]
    policy = one(with_apis(*apis), "MutatingPolicy")
    assert policy["apiVersion"] == f"policies.kyverno.io/{KYVERNO[count - 1]}"
    kubernetes = one(rendered("injection.admissionPolicy.enabled=true"), "MutatingAdmissionPolicy")
    assert policy["spec"] == {**kubernetes["spec"], "evaluation": {"background": {"enabled": False}}}
    # Kyverno derives rules for Deployments only from policies without selectors: the pod alone may change here.
    assert policy["spec"]["matchConstraints"]["namespaceSelector"]["matchExpressions"]


def test_kubernetes_own_policy_is_preferred_to_kyvernos_and_both_can_be_left_out() -> None:
    both = ("admissionregistration.k8s.io/v1/MutatingAdmissionPolicy", "policies.kyverno.io/v1/MutatingPolicy")

    def kinds(*sets: str, apis: Sequence[str] = both) -> set[str]:
        return {each["kind"] for each in with_apis(*apis, sets=sets) if each["kind"].endswith("Policy")}

    assert kinds() == {"MutatingAdmissionPolicy"}
    assert kinds("injection.admissionPolicy.enabled=false") == set()
    assert kinds("injection.admissionPolicy.enabled=false", "injection.kyverno.enabled=true") == {"MutatingPolicy"}
    assert kinds("injection.kyverno.enabled=false", apis=both[1:]) == set()
    assert kinds(apis=both[1:]) == {"MutatingPolicy"}
    assert kinds(apis=()) == set()
    assert kinds("injection.kyverno.enabled=true", apis=()) == {"MutatingPolicy"}


def test_kyvernos_policy_checks_the_sidecar_at_installation_and_says_so(tmp_path: Path) -> None:
    sets = ("injection.admissionPolicy.enabled=false", "injection.kyverno.enabled=true")
    one(rendered(*sets), "PodTemplate")
    shown = notes(tmp_path / "chart", *sets)
    assert "MutatingPolicy of Kyverno" in shown
    assert "kubectl get mutatingpolicies" in shown
    assert "feature gate" not in shown


@pytest.mark.parametrize(
    "sets, said",
    [
        (["injection.kyverno.enabled=maybe"], "enabled"),
        (["mode=side"], "mode"),
        (["config.rollout.percnt=10"], "percnt"),
        (["config.poll.max_hold_s=99"], "max_hold_s"),
        (["config.mode=off"], "mode"),
        (["config.listen.port=9"], "port"),
        (["config.upstream.token=abc"], "token"),
        (["ports.legacy=70000"], "legacy"),
        (["image.tag=12"], "tag"),
        (["image.digest=sha256:abc"], "digest"),
        (["upstream.url=api.pipeops.io"], "url"),
        (["store.type=hostPath"], "type"),
        (["gateway.replicas=0"], "replicas"),
        (["unknown=1"], "unknown"),
        (["injection.admissionPolicy.failurePolicy=Maybe"], "failurePolicy"),
        (["ports.legacy=8080"], "ports.legacy is 8080, which belongs to the vendor's agent"),
        (["ports.admin=8090"], "ports.admin is 8090, which belongs to the vendor's agent"),
        (["ports.admin=7080"], "ports.legacy and ports.admin are the same"),
        (["agent.hostNetwork=true"], "agents in the node's network cannot have a sidecar"),
        (["agent.podLabels=null"], "agent.podLabels is empty"),
        (["agent.namespaces={a}"], "agent.namespaces is for mode: gateway"),
        (["networkPolicy.enabled=true"], "it must also allow what the agent itself needs"),
        (["mode=gateway", "gateway.replicas=2"], "more than one replica needs a database (store.postgresql"),
        (["store.postgresql.secretName=db"], "store.postgresql is for mode: gateway"),
        ([*DATABASE, "store.type=pvc"], "store.type: pvc is for a file"),
        ([*DATABASE, "ports.cluster=7090"], "ports.cluster is the same as"),
        ([*DATABASE, "ports.cluster=8080"], "ports.cluster is 8080, which belongs to the vendor's agent"),
        ([*DATABASE, "gateway.drainSeconds=25"], "must be more than 5 s longer"),
        ([*DATABASE, "config.cluster.host=0.0.0.0"], "host"),
        ([*DATABASE, "config.store.url=postgresql://a:b@c/d"], "store"),
        (["mode=gateway", "store.url=postgresql://a:b@c/d"], "url"),
        (["mode=gateway", "store.postgresql.secretName=postgresql://a:b@c/d"], "secretName"),
        (["mode=gateway", "store.postgresql.caSecretName=ca"], "store.postgresql.secretName is missing"),
        (["mode=gateway", "extraEnv[0].name=SHIM_STORE__URL", "extraEnv[0].value=x"], "store.postgresql.secretName"),
        ([*DATABASE, "extraEnv[0].name=PGPASSWORD", "extraEnv[0].value=x"], "store.postgresql.passwordKey"),
        (["upstream.token.from=secret"], "upstream.token.secretName is missing"),
        (["upstream.token.from=value"], "upstream.token.value is missing"),
        (["upstream.token.value=x"], "upstream.token.from is not value"),
        (["image.registry="], "image.registry is missing"),
        (["image.registry=", "image.repository=team/agent-shim"], "image.registry is missing"),
        (["upstream.url=http://127.0.0.1:7080"], "upstream.url is the shim's own address"),
        (["upstream.url=http://[::1]:7080/"], "upstream.url is the shim's own address"),
        (["mode=gateway", "fullnameOverride=1shim"], "begins with a letter"),
        (["fullnameOverride=Shim_1"], "fullnameOverride"),
        (["extraEnv[0].name=A", "extraEnv[0].value=1"], "extraEnv"),
        (["extraEnv[0].name=A", "extraEnv[0].value=true"], "extraEnv"),
        (["resources.limits.memory=1x"], "memory"),
        (["resources.requests.cpu=ten"], "cpu"),
        (["resources.limit.cpu=1"], "limit"),
        (["commonLabels.a=1"], "commonLabels"),
        (["upstream.url=http://controller.local"], "upstream.url is not encrypted"),
        (["config.fallback.url=http://127.0.0.1.evil.test"], "config.fallback.url is not encrypted"),
        (["upstream.token.from=agent", "config.fallback.use_upstream_token=true"], "there is no upstream token"),
        (["store.existingClaim=mine"], "store.type is not pvc"),
        (["mode=gateway", "config.listen.auth=off"], "off is for 127.0.0.1"),
        (["extraVolumes[0].name=ca"], "must begin with agent-shim-"),
        (["extraEnv[0].name=SHIM_UPSTREAM__URL", "extraEnv[0].value=x"], "use config, upstream, admin or ports"),
        (["extraEnv[0].name=SHIM_MODE", "extraEnv[0].value=http"], "a variable beats the file"),
        (["image.registry=https://r.example"], "registry"),
        (["image.repository=Agent-Shim"], "repository"),
        (["image.tag=v 1"], "tag"),
        (["upstream.url=https://a:b@c.example"], "url"),
        (["upstream.url=https://c.example/#x"], "url"),
        (["upstream.url=https://c.example/?token=x"], "upstream.url must not contain a token"),
        (["config.fallback.url=https://a:b@c.example"], "fallback"),
        (["config.upstream.path=api"], "path"),
        (["config.upstream.proxy=proxy.example:3128"], "proxy"),
        (["config.upstream.gateway_hosts={https://c.example}"], "gateway_hosts"),
        (["config.commands.types={}", "config.commands.types[0]="], "types"),
        (["config.rollout.include[0]="], "include"),
        (["config.sunset.at=tomorrow"], "sunset"),
        # A section without a value, as a values file has it when all its keys are comments.
        (["upstream=null"], "upstream"),
        (["config=null"], "config"),
        (["store=null"], "store"),
    ],
)
@pytest.mark.parametrize("helm", HELMS)
def test_values_that_make_no_sense_are_refused(helm: str, sets: list[str], said: str) -> None:
    with pytest.raises(Refused) as refused:
        template(*sets, helm=helm)
    message = str(refused.value)
    assert said in message
    assert "template:" not in message.partition("Error:")[2].partition("at (")[0]


@pytest.mark.parametrize("values", ["", *VALUE_SETS])
def test_the_shim_takes_the_configuration(values: str, tmp_path: Path) -> None:
    objects = rendered(values=CHART / "ci" / values if values else None)
    file = tmp_path / "config.yaml"
    file.write_text(one(objects, "ConfigMap", "agent-shim")["data"]["config.yaml"])
    given = {
        "SHIM_ADMIN__HOST": '["127.0.0.1","10.0.0.7"]',
        "SHIM_STORE__URL": "postgresql://shim@db.example/shim",
        "SHIM_CLUSTER__HOST": "10.0.0.7",
        "SHIM_CLUSTER__REPLICA": "agent-shim-6b9f-abcde",
    }
    names = env_of(container(one(objects, "Pod"), "agent-shim"))
    settings = loader.load(str(file), {name: value for name, value in given.items() if name in names}, [])
    assert settings.listen.host == "127.0.0.1"
    assert (settings.listen.port, settings.admin.port) == (7080, 7090)


def test_everything_of_the_configuration_can_be_said_and_the_rest_is_the_charts() -> None:
    schema = yaml.safe_load((CHART / "values.schema.json").read_text())["properties"]["config"]
    assert schema["properties"]["poll"]["properties"]["max_hold_s"] == {"type": "number", "minimum": 0.1, "maximum": 25}
    assert "store" not in schema["properties"]
    assert "token" not in schema["properties"]["upstream"]["properties"]


def pods(objects: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every pod that the chart owns or makes of the vendor's."""
    found = [each for each in objects if each["kind"] == "Pod"]
    found += [each["spec"]["template"] for each in objects if each["kind"] == "Deployment"]
    for policy in objects:
        if policy["kind"] == "MutatingAdmissionPolicy":
            shape = (
                "chart"
                if "pipeops-agent" in str(policy["spec"]["matchConditions"][0]).partition("c.name in")[2]
                else "manifest"
            )
            namespace = policy["spec"]["matchConstraints"]["namespaceSelector"]["matchExpressions"][0]["values"][0]
            found.append(admit(policy, pod_of(vendor_text(shape)), namespace))
    return found


@pytest.mark.parametrize("values", ["", *VALUE_SETS])
def test_our_containers_are_restricted_and_get_no_rights(values: str) -> None:
    on = "injection.admissionPolicy.enabled=true"
    objects = rendered(on, values=CHART / "ci" / values if values else None)
    assert not [each["kind"] for each in objects if "Role" in each["kind"]]
    checked = 0
    for pod in pods(objects):
        spec = pod["spec"]
        for each in [*spec["containers"], *spec.get("initContainers", [])]:
            if each["name"] != "agent-shim":
                continue
            checked += 1
            context = each["securityContext"]
            assert context["runAsNonRoot"] is True
            assert isinstance(context["runAsUser"], int)
            assert context["allowPrivilegeEscalation"] is False
            assert context["readOnlyRootFilesystem"] is True
            assert context["capabilities"] == {"drop": ["ALL"]}
            assert context["seccompProfile"] == {"type": "RuntimeDefault"}
            assert each["resources"] == {"requests": {"cpu": "10m", "memory": "64Mi"}, "limits": {"memory": "128Mi"}}
            mounts = {mount["mountPath"]: mount["name"] for mount in each["volumeMounts"]}
            # Not the agent's cluster-admin token.
            assert mounts["/var/run/secrets/kubernetes.io/serviceaccount"] == "agent-shim-empty"
        if spec["containers"][0]["name"] == "agent-shim":
            assert spec["automountServiceAccountToken"] is False
    assert checked


def test_the_sidecar_is_native_and_comes_first() -> None:
    (pod,) = [
        pod for pod in pods(rendered("injection.admissionPolicy.enabled=true")) if "initContainers" in pod["spec"]
    ]
    sidecar = pod["spec"]["initContainers"][0]
    assert (sidecar["name"], sidecar["restartPolicy"]) == ("agent-shim", "Always")
    assert sidecar["startupProbe"]["httpGet"] == {"path": "/readyz", "port": "shim-admin", "scheme": "HTTP"}
    assert [port["containerPort"] for port in sidecar["ports"]] == [7090]
    env = env_of(sidecar)
    assert env["POD_IP"] == {"fieldRef": {"apiVersion": "v1", "fieldPath": "status.podIP"}}
    # Kubernetes fills in $(POD_IP), which must stand before it.
    assert list(env)[:2] == ["POD_IP", "SHIM_ADMIN__HOST"]
    assert json.loads(env["SHIM_ADMIN__HOST"]) == ["127.0.0.1", "$(POD_IP)"]
    agent = container(pod, "agent")
    assert env_of(agent)["PIPEOPS_API_URL"] == "http://127.0.0.1:7080"
    assert agent["envFrom"] == [{"secretRef": {"name": "pipeops-agent-config"}}]
    used = {port["containerPort"] for each in [agent, sidecar] for port in each["ports"]}
    assert used == {8080, 8090, 7090}


def test_other_ports_reach_all_that_must_know_them() -> None:
    sets = ("injection.admissionPolicy.enabled=true", "ports.legacy=7081", "ports.admin=7091")
    objects = rendered(*sets)
    (pod,) = [pod for pod in pods(objects) if "initContainers" in pod["spec"]]
    assert container(pod, "agent-shim")["ports"][0]["containerPort"] == 7091
    assert env_of(container(pod, "agent"))["PIPEOPS_API_URL"] == "http://127.0.0.1:7081"
    settings = yaml.safe_load(one(objects, "ConfigMap")["data"]["config.yaml"])
    assert (settings["listen"]["port"], settings["admin"]["port"]) == (7081, 7091)


def test_extras_go_into_agents_pods() -> None:
    objects = rendered("injection.admissionPolicy.enabled=true", values=CHART / "ci" / "sidecar.yaml")
    (pod,) = [pod for pod in pods(objects) if "initContainers" in pod["spec"]]
    sidecar = container(pod, "agent-shim")
    assert env_of(sidecar)["HTTPS_PROXY"] == "http://proxy.example:3128"
    assert sidecar["volumeMounts"][-1]["mountPath"] == "/etc/company-ca"
    assert {"name": "agent-shim-ca", "configMap": {"name": "company-ca"}} in pod["spec"]["volumes"]
    assert sidecar["image"].startswith("registry.example/agent-shim:")


def test_whole_numbers_as_quantities_are_texts_in_the_policy() -> None:
    (pod,) = [
        pod
        for pod in pods(rendered("injection.admissionPolicy.enabled=true", "resources.requests.cpu=1"))
        if "initContainers" in pod["spec"]
    ]
    assert container(pod, "agent-shim")["resources"]["requests"] == {"cpu": "1", "memory": "64Mi"}


@pytest.mark.parametrize("word", ["1234567", "1e5", "0x1f", "null", "true", "no", "1_000"])
@pytest.mark.parametrize("helm", HELMS)
def test_texts_that_yaml_takes_for_something_else_stay_texts(helm: str, word: str, tmp_path: Path) -> None:
    texts: dict[str, Any] = {
        "image": {"registry": "registry.example", "tag": word},
        "commonLabels": {"l": word},
        "commonAnnotations": {"a": word},
        "agent": {"secretName": word, "podLabels": [{"app": word}], "namespaces": [word]},
        "upstream": {"token": {"from": "value", "secretKey": word, "value": word}},
        "admin": {"tokenSecret": word, "tokenKey": word},
        "store": {"type": "pvc", "storageClass": word},
        "extraEnv": [{"name": "A", "value": word}],
        "gateway": {"tlsSecretName": word, "priorityClassName": word, "nodeSelector": {"n": word}},
        "serviceAccount": {"name": word},
        "networkPolicy": {"enabled": True, "agentEgress": [{}]},
        "monitoring": {"podMonitor": {"enabled": True, "labels": {"m": word}}, "dashboards": {"enabled": True}},
    }
    file = tmp_path / "values.yaml"
    file.write_text(json.dumps(texts))
    gateway = ("--set", "mode=gateway", "--set", "fullnameOverride=shim")
    sidecar = ("--set-json", "agent.namespaces=[]", "--set", "injection.admissionPolicy.enabled=true")
    for more in (gateway, sidecar):
        release = word if re.fullmatch(r"[a-z0-9-]+", word) else "shim"
        command = (helm, "template", release, CHART, "--namespace", release, "--kube-version", "1.36")
        for each in documents(run(*command, "--values", file, *more)):
            if not each["apiVersion"].startswith("monitoring.coreos.com/"):
                assert_valid(each, "1.36")
            metadata = each["metadata"]
            texts_of = [metadata["name"], *metadata["labels"].values(), *metadata.get("annotations", {}).values()]
            assert [text for text in texts_of if not isinstance(text, str)] == []


def test_a_parent_chart_may_switch_it_by_a_condition(tmp_path: Path) -> None:
    parent = tmp_path / "parent"
    (parent / "charts").mkdir(parents=True)
    shutil.copytree(CHART, parent / "charts" / "agent-shim")
    dependency = {"name": "agent-shim", "version": __version__, "condition": "agent-shim.enabled"}
    chart = {"apiVersion": "v2", "name": "parent", "version": "0.0.1", "dependencies": [dependency]}
    (parent / "Chart.yaml").write_text(yaml.safe_dump(chart))
    base = ("helm4", "template", "x", parent, "--set", "agent-shim.image.registry=r.example")
    assert documents(run(*base, "--set", "agent-shim.enabled=true"))
    assert documents(run(*base, "--set", "agent-shim.enabled=false")) == []


def test_the_api_server_is_shown_the_sidecar_at_installation() -> None:
    objects = rendered("injection.admissionPolicy.enabled=true", "resources.limits.cpu=2", "extraEnv[0].name=A")
    (sidecar,) = one(objects, "PodTemplate")["template"]["spec"]["initContainers"]
    (pod,) = [pod for pod in pods(objects) if len(pod["spec"].get("volumes", [])) > 4]
    assert sidecar | {"resources": None} == container(pod, "agent-shim") | {"resources": None}
    assert not [each for each in rendered("injection.admissionPolicy.enabled=false") if each["kind"] == "PodTemplate"]


def test_an_image_without_a_registry_is_for_those_who_say_so() -> None:
    (pod,) = [each for each in rendered("image.registry=", "image.allowBareName=true") if each["kind"] == "Pod"]
    assert pod["spec"]["containers"][0]["image"] == f"agent-shim:{__version__}"
    rendered("image.registry=", "image.repository=r.example/team/agent-shim")


@pytest.mark.parametrize("mode", ["sidecar", "gateway"])
def test_helm_test_has_a_store_of_its_own(mode: str) -> None:
    pod = one(rendered(f"mode={mode}", "store.type=pvc"), "Pod")
    (store,) = [each for each in pod["spec"]["volumes"] if each["name"] == "agent-shim-store"]
    assert set(store) == {"name", "emptyDir"}


@pytest.mark.parametrize("mode", ["sidecar", "gateway"])
def test_sections_that_are_taken_away_leave_no_null(mode: str) -> None:
    sets = ("resources=null", "securityContext=null", "podSecurityContext=null", f"mode={mode}")
    text = template("injection.admissionPolicy.enabled=true", *sets)
    assert "resources" not in container(one(documents(text), "Pod"), "agent-shim")
    assert "null" not in text


def test_a_digest_wins() -> None:
    digest = "sha256:" + "a" * 64
    (pod,) = [
        each for each in rendered(f"image.digest={digest}", "image.registry=r.example/x/") if each["kind"] == "Pod"
    ]
    assert pod["spec"]["containers"][0]["image"] == f"r.example/x/agent-shim@{digest}"


def test_the_gateway() -> None:
    objects = rendered(values=CHART / "ci" / "gateway.yaml")
    deployment, service = one(objects, "Deployment"), one(objects, "Service")
    spec = deployment["spec"]["template"]["spec"]
    assert deployment["spec"]["strategy"] == {"type": "Recreate"}
    assert service["spec"]["ports"] == [{"name": "https", "port": 7080, "targetPort": "shim-legacy", "protocol": "TCP"}]
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    for selector in (service["spec"]["selector"], deployment["spec"]["selector"]["matchLabels"]):
        assert selector.items() <= labels.items()
    assert one(objects, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"].items() <= labels.items()
    assert one(objects, "ServiceAccount")["automountServiceAccountToken"] is False
    env = env_of(spec["containers"][0])
    assert env["SHIM_LISTEN__HOST"] == env["POD_IP"]
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    assert volumes["agent-shim-store"]["persistentVolumeClaim"] == {"claimName": "shim-store"}
    assert volumes["agent-shim-tls"]["secret"]["secretName"] == "shim-tls"
    assert one(objects, "Secret")["data"] == {"token": "YS10b2tlbg=="}
    ingress = one(objects, "NetworkPolicy")["spec"]["ingress"][0]["from"]
    assert [each["namespaceSelector"]["matchLabels"]["kubernetes.io/metadata.name"] for each in ingress] == [
        "team-a",
        "team-b",
    ]


def test_a_gateway_on_a_database_takes_everything_from_secrets() -> None:
    objects = rendered(values=CHART / "ci" / "gateway-postgresql.yaml")
    pod = one(objects, "Deployment")["spec"]["template"]
    shim = container(pod, "agent-shim")
    env = env_of(shim)
    assert env["SHIM_STORE__URL"] == {"secretKeyRef": {"name": "shim-database", "key": "uri"}}
    assert env["SHIM_CLUSTER__HOST"] == env["POD_IP"]
    assert env["SHIM_CLUSTER__REPLICA"]["fieldRef"]["fieldPath"] == "metadata.name"
    config = yaml.safe_load(one(objects, "ConfigMap", "agent-shim")["data"]["config.yaml"])
    assert config["cluster"] == {"lease_s": 21.5, "port": 7081}
    assert {"name": "shim-cluster", "containerPort": 7081, "protocol": "TCP"} in shim["ports"]
    volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
    assert "agent-shim-store" not in volumes
    mounts = {mount["name"]: mount["mountPath"] for mount in shim["volumeMounts"]}
    assert set(mounts) == set(volumes)
    projected = volumes["agent-shim-database"]["projected"]
    paths = {item["path"] for source in projected["sources"] for item in source["secret"]["items"]}
    keys = ("password_file", "ca_file", "client_cert_file", "client_key_file")
    assert {config["store"][key] for key in keys} == {f"{mounts['agent-shim-database']}/{path}" for path in paths}
    # libpq refuses a key that others may read, and takes one of root's with 0640 or less.
    assert projected["defaultMode"] & 0o137 == 0


def test_the_example_reads_what_the_operator_of_the_database_makes() -> None:
    examples = ROOT / "helm" / "examples"
    (cluster,) = documents((examples / "cloudnative-pg.yaml").read_text())
    name = cluster["metadata"]["name"]
    objects = rendered(values=examples / "cloudnative-pg-values.yaml")
    pod = one(objects, "Deployment")["spec"]["template"]
    url = env_of(container(pod, "agent-shim"))["SHIM_STORE__URL"]
    assert url == {"secretKeyRef": {"name": f"{name}-app", "key": "uri"}}
    assert f"'{name}-ca'" in str(pod["spec"]["volumes"])
    egress = one(objects, "NetworkPolicy")["spec"]["egress"]
    assert f"'cnpg.io/cluster': '{name}'" in str(egress)
    needed = 16 + 3 * (one(objects, "Deployment")["spec"]["replicas"] + 1)
    assert int(cluster["spec"]["postgresql"]["parameters"]["max_connections"]) > needed
    assert cluster["spec"]["postgresql"]["synchronous"]["dataDurability"] == "required"


def test_a_replica_that_waits_for_its_database_is_not_restarted() -> None:
    probes = container(one(rendered(*DATABASE), "Deployment")["spec"]["template"], "agent-shim")
    paths = {name: probes[name]["httpGet"]["path"] for name in ("startupProbe", "livenessProbe", "readinessProbe")}
    assert paths == {"startupProbe": "/healthz", "livenessProbe": "/healthz", "readinessProbe": "/readyz"}


@pytest.mark.needs("postgresql")
def test_the_pod_that_copies_a_store_is_valid_and_its_command_copies(
    tmp_path: Path, postgres: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page's own manifest, whose paths and addresses are replaced by those of the test."""
    (text,) = re.findall(r"```yaml\n(.*?)```", (CHART / "UPGRADING.md").read_text(), re.DOTALL)
    (pod,) = documents(textwrap.dedent(text))
    assert_valid(pod, "1.29")
    copying = container(pod, "store-copy")
    gateway = one(rendered("mode=gateway", "store.type=pvc"), "Deployment")["spec"]["template"]
    (claim,) = [each for each in gateway["spec"]["volumes"] if "persistentVolumeClaim" in each]
    assert claim["persistentVolumeClaim"] in [each.get("persistentVolumeClaim") for each in pod["spec"]["volumes"]]
    (place,) = [
        each["mountPath"] for each in container(gateway, "agent-shim")["volumeMounts"] if each["name"] == claim["name"]
    ]
    store = f"{place}/agent-shim.db"
    assert copying["args"][:4] == ["store", "copy", "--from", store]

    client = StoreClient(lambda post: SqliteStore(tmp_path / "agent-shim.db", post))
    client.open()
    client.run(put("waiting"))
    client.close()
    url = urlsplit(postgres.create("copied"))
    (tmp_path / "password").write_text(url.password or "")
    (mount,) = [each["mountPath"] for each in copying["volumeMounts"] if each["name"] == "database"]
    for name, value in env_of(copying).items():
        if not name.endswith("CA_FILE"):  # the server of the test has no TLS
            monkeypatch.setenv(name, value.replace(mount, str(tmp_path)))
    here = f"@127.0.0.1:{postgres.port}/copied?sslmode=disable"
    args = [
        each.replace(store, str(tmp_path / "agent-shim.db")).replace("@shim-database-rw:5432/shim", here)
        for each in copying["args"]
    ]
    done = CliRunner().invoke(store_command, args[1:])
    assert (done.exit_code, "commands: 1" in done.output) == (0, True), done.output


def test_one_replica_becomes_several_by_their_number_alone() -> None:
    one_, three = (one(rendered(*DATABASE, f"gateway.replicas={number}"), "Deployment")["spec"] for number in (1, 3))
    assert (one_.pop("replicas"), three.pop("replicas")) == (1, 3)
    assert one_ == three
    assert three["strategy"] == {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}}
    assert three["minReadySeconds"] == 10
    (shim,) = three["template"]["spec"]["containers"]
    assert "time.sleep(5)" in shim["lifecycle"]["preStop"]["exec"]["command"][-1]


def test_longer_leases_settle_longer() -> None:
    spec = one(rendered(values=CHART / "ci" / "gateway-postgresql.yaml"), "Deployment")["spec"]
    assert spec["minReadySeconds"] == 44


def test_replicas_reach_the_database_and_each_other() -> None:
    objects = rendered(values=CHART / "ci" / "gateway-postgresql.yaml")
    policy = one(objects, "NetworkPolicy")["spec"]
    replicas = {"podSelector": {"matchLabels": policy["podSelector"]["matchLabels"]}}
    cluster = [{"protocol": "TCP", "port": 7081}]
    assert {"from": [replicas], "ports": cluster} in policy["ingress"]
    assert {"to": [replicas], "ports": cluster} in policy["egress"]
    assert [5432] in [[port["port"] for port in rule["ports"]] for rule in policy["egress"]]
    assert [rule for rule in policy["ingress"] if rule["ports"] == cluster and len(rule["from"]) > 1] == []
    file = one(rendered("mode=gateway", "networkPolicy.enabled=true"), "NetworkPolicy")["spec"]
    assert not {5432, 7081} & {port["port"] for rule in file["egress"] + file["ingress"] for port in rule["ports"]}


def test_tls_connections_fit_into_the_memory_limit() -> None:
    def listen(*sets: str) -> dict[str, Any]:
        found: dict[str, Any] = yaml.safe_load(one(rendered("mode=gateway", *sets), "ConfigMap")["data"]["config.yaml"])
        return found["listen"]  # type: ignore[no-any-return]

    assert listen("gateway.tlsSecretName=tls")["max_connections"] == 1024
    assert listen("gateway.tlsSecretName=tls", "config.listen.max_connections=4000")["max_connections"] == 4000
    assert "max_connections" not in listen()


def test_only_changes_that_need_it_restart_the_gateway() -> None:
    def checksum(*sets: str) -> str:
        found = one(rendered("mode=gateway", "config.fallback.url=https://api.pipeops.io", *sets), "Deployment")
        mark: str = found["spec"]["template"]["metadata"]["annotations"]["checksum/config"]
        return mark

    base = checksum()
    assert checksum("config.rollout.percent=50") == base
    assert checksum("config.mode=http") == base
    assert checksum("config.upstream.ping_interval_s=20") != base


def test_helm_test_runs_doctor_with_the_same_configuration() -> None:
    pod = one(rendered(), "Pod")
    assert pod["metadata"]["annotations"]["helm.sh/hook"] == "test"
    assert pod["spec"]["containers"][0]["args"] == ["doctor", "--config", "/etc/agent-shim/config.yaml"]
    assert pod["spec"]["restartPolicy"] == "Never"
    assert not [each for each in rendered("tests.enabled=false") if each["kind"] == "Pod"]


def test_rules_and_dashboards_are_those_of_config(tmp_path: Path) -> None:
    files = [yaml.safe_load(path.read_text()) for path in sorted((ROOT / "config" / "prometheus").glob("*.y*ml"))]
    groups = [group for file in files for group in (file or {}).get("groups", [])]
    on = ("monitoring.prometheusRule.enabled=true", "monitoring.dashboards.enabled=true")
    objects = rendered(*on)
    assert one(objects, "PrometheusRule")["spec"]["groups"] == groups
    of_gateway = one(rendered("mode=gateway", *on), "PrometheusRule")["spec"]["groups"]
    assert [group["name"] for group in groups if group not in of_gateway] == ["agent-shim-sidecar"]
    dashboards = one(objects, "ConfigMap", "agent-shim-dashboards")
    assert dashboards["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert set(dashboards["data"] or {}) == {path.name for path in (ROOT / "config" / "grafana").glob("*.json")}


@pytest.mark.needs("promtool")
def test_promtool_takes_the_rule_object(tmp_path: Path) -> None:
    spec = one(rendered("monitoring.prometheusRule.enabled=true"), "PrometheusRule")["spec"]
    file = tmp_path / "rules.yaml"
    file.write_text(yaml.safe_dump(spec))
    assert "SUCCESS" in run("promtool", "check", "rules", file)


@pytest.mark.needs("promtool")
def test_the_gap_alert(tmp_path: Path) -> None:
    assert "SUCCESS" in run("promtool", "test", "rules", ROOT / "tests" / "helm" / "sidecar.test.yaml")


def test_the_pod_monitor_finds_injected_pods() -> None:
    objects = rendered("injection.admissionPolicy.enabled=true", "monitoring.podMonitor.enabled=true")
    monitor = one(objects, "PodMonitor")["spec"]
    (pod,) = [pod for pod in pods(objects) if "initContainers" in pod["spec"]]
    assert monitor["selector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
    names = [port["name"] for port in container(pod, "agent-shim")["ports"]]
    assert [endpoint["port"] for endpoint in monitor["podMetricsEndpoints"]] == names


def test_the_network_policy_leaves_the_agent_what_it_needs() -> None:
    spec = one(rendered(values=CHART / "ci" / "sidecar.yaml"), "NetworkPolicy")["spec"]
    assert spec["policyTypes"] == ["Egress"]
    assert [sorted({port["port"] for port in rule["ports"]}) for rule in spec["egress"]] == [[53], [443], [6443]]


def notes(folder: Path, *sets: str) -> str:
    """Return what `helm install` shows, rendered as a manifest: without a cluster Helm renders no notes."""
    if not folder.exists():
        shutil.copytree(CHART, folder)
        text = (folder / "templates" / "NOTES.txt").read_text()
        shown = '{{ include "notes" . | quote }}'
        manifest = f'{{{{- define "notes" }}}}{text}{{{{ end }}}}kind: Notes\nnotes: {shown}\n'
        (folder / "templates" / "notes.yaml").write_text(manifest)
    more = [part for pair in ("image.registry=registry.example", *sets) for part in ("--set", pair)]
    command = ("helm3", "template", "agent-shim", folder, "--namespace", NAMESPACE, *more)
    found: str = one(documents(run(*command)), "Notes")["notes"]
    return found


def test_notes_tell_what_to_check_next(tmp_path: Path) -> None:
    chart = tmp_path / "chart"
    assert "NOTHING IS INJECTED YET" in notes(chart, "injection.admissionPolicy.enabled=false")
    with_policy = notes(chart, "injection.admissionPolicy.enabled=true")
    assert "rollout restart deployment pipeops-agent" in with_policy
    assert "feature gate MutatingAdmissionPolicy" in with_policy
    assert "helm test agent-shim --namespace pipeops-system" in with_policy
    assert "http://agent-shim.pipeops-system.svc:7080" in notes(chart, "mode=gateway")
    assert "Prefer a Secret" in notes(chart, "upstream.token.from=value", "upstream.token.value=t")


@pytest.mark.parametrize("shape", ["manifest", "installer", "chart"])
@pytest.mark.needs("kubectl")
def test_the_command_before_the_restart_makes_the_agents_pod(shape: str, tmp_path: Path) -> None:
    shown = notes(tmp_path / "chart", "injection.admissionPolicy.enabled=true")
    (path,) = re.findall(r"get deployment pipeops-agent --output (jsonpath='.*')", shown)
    assert path in (ROOT / "docs" / "how-to" / "kubernetes.md").read_text()
    deployment = tmp_path / "deployment.yaml"
    deployment.write_text(yaml.safe_dump(one(documents(vendor_text(shape)), "Deployment")))
    # Without a cluster kubectl prints by a path what it was given, where the command is a local one.
    text = run("kubectl", "label", "--local", "--filename", deployment, "a=b", "--output", path.replace("'", ""))
    pod = yaml.safe_load(text)
    assert_valid(pod, "1.36")
    assert pod["spec"] == pod_of(vendor_text(shape))["spec"]
    assert pod["metadata"]["labels"] == pod_of(vendor_text(shape))["metadata"]["labels"]


@pytest.mark.parametrize("helm", HELMS)
def test_the_package_holds_what_it_needs_and_renders_the_same(helm: str, tmp_path: Path) -> None:
    run(helm, "package", CHART, "--destination", tmp_path)
    package = tmp_path / f"agent-shim-{__version__}.tgz"
    with tarfile.open(package) as archive:
        names = archive.getnames()
    assert "agent-shim/files/prometheus/sidecar.yaml" in names
    assert not [name for name in names if "/ci/" in name or "/schema/" in name]
    sets = ("image.registry=registry.example", "monitoring.prometheusRule.enabled=true")
    more = [part for pair in sets for part in ("--set", pair)]
    packed = run(helm, "template", "agent-shim", package, "--namespace", NAMESPACE, "--kube-version", "1.36", *more)
    assert documents(packed) == rendered(*sets, helm=helm)


def test_one_number_for_chart_program_and_components() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert (chart["version"], chart["appVersion"]) == (__version__, __version__)
    assert f"agent-shim:{__version__}" in chart["annotations"]["artifacthub.io/images"]
    plugin = yaml.safe_load((ROOT / "helm" / "post-renderer" / "plugin.yaml").read_text())
    assert plugin["version"] == __version__
