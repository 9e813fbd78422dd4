"""`make sbom`: CycloneDX bills of materials of the wheel's locked dependencies and of a built image.

`python -m supply.sbom OUT.json` writes that of `requirements/run.txt`, with the hashes of the locked files.
`python -m supply.sbom OUT.json --image NAME` starts the image's own interpreter (podman or docker) and asks it what it
has: Python packages, the interpreter, and the operating system's packages. Both are validated against the schema.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cyclonedx.model import HashAlgorithm, HashType
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.output import make_outputter
from cyclonedx.schema import OutputFormat, SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from packageurl import PackageURL

from shim import __version__
from supply.licenses import vendored
from supply.locked import RUN, Package, normalised

SCHEMA = SchemaVersion.V1_6
_TIMEOUT_S = 120
_ENTRY = re.compile(r"^(?P<name>[A-Za-z0-9._-]+)==(?P<version>[^ ;\\]+)(?P<rest>(?:.*\\\n)*.*)$", re.MULTILINE)
_HASH = re.compile(r"--hash=sha256:([0-9a-f]{64})")
_ASK = """
import json, pathlib, platform
from importlib import metadata
found = {"python": platform.python_version(), "os": {}, "debian": []}
found["packages"] = sorted({(d.metadata["Name"], d.version) for d in metadata.distributions()})
release = pathlib.Path("/etc/os-release")
for line in release.read_text().splitlines() if release.exists() else ():
    key, _, value = line.partition("=")
    found["os"][key] = value.strip('"')
status = pathlib.Path("/var/lib/dpkg/status")
for block in status.read_text().split("\\n\\n") if status.exists() else ():
    fields = dict(line.split(": ", 1) for line in block.splitlines() if ": " in line and not line.startswith(" "))
    if fields.get("Status", "").endswith(" installed"):
        found["debian"].append((fields["Package"], fields["Version"], fields["Architecture"]))
print(json.dumps(found))
"""


def wheel() -> Bom:
    """The wheel, what is vendored in it, and its locked dependencies with the hashes of all files that may be taken."""
    components = [_python(Package(normalised(m["name"]), m["version"]), _HASH.findall(m["rest"])) for m in _locked()]
    for row, _ in vendored():
        purl = PackageURL("npm", name=row.name.lower(), version=row.version)
        components.append(_component(ComponentType.LIBRARY, row.name, row.version, purl))
    return _bom("agent-shim", __version__, PackageURL("pypi", name="agent-shim", version=__version__), components)


def image(name: str, found: dict[str, Any]) -> Bom:
    """An image, by what its own interpreter has found in it."""
    system = found["os"].get("ID", "linux")
    components = [_python(Package(normalised(each), version), ()) for each, version in found["packages"]]
    purl = PackageURL("generic", name="python", version=found["python"])
    components.append(_component(ComponentType.APPLICATION, "python", found["python"], purl))
    for each, version, architecture in found["debian"]:
        purl = PackageURL("deb", system, each, version, {"arch": architecture})
        components.append(_component(ComponentType.LIBRARY, each, version, purl))
    tag = name.rpartition("/")[2]
    purl = PackageURL("oci", name=tag.partition(":")[0], qualifiers={"tag": tag.partition(":")[2] or "latest"})
    return _bom(name, __version__, purl, components, ComponentType.CONTAINER)


def ask(name: str) -> dict[str, Any]:
    """Return what an image's interpreter finds in it. Raises `RuntimeError` without an engine, `CalledProcessError`."""
    command = [
        _engine(name),
        "run",
        "--rm",
        "--network=none",
        "--entrypoint",
        "/opt/agent-shim/bin/python",
        name,
        "-c",
        _ASK,
    ]
    done = subprocess.run(  # noqa: S603 - our own command, with the image that whoever runs make has named
        command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=True
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _engine(name: str) -> str:
    """Return podman or docker, whichever has the image; the first one that is installed if neither has it.

    A machine may have both, and each keeps images of its own.
    """
    engines = [path for path in map(shutil.which, ("podman", "docker")) if path is not None]
    if not engines:
        raise RuntimeError("neither podman nor docker is there to start the image")
    for engine in engines:
        done = subprocess.run(  # noqa: S603 - as above
            [engine, "image", "inspect", name], capture_output=True, timeout=_TIMEOUT_S, check=False
        )
        if done.returncode == 0:
            return engine
    return engines[0]


def render(bom: Bom) -> str:
    """The bill as JSON, validated. It is the same for the same components: without a time or a number of its own."""
    text = make_outputter(bom, OutputFormat.JSON, SCHEMA).output_as_string(indent=2)
    plain = json.loads(text)
    plain.pop("serialNumber", None)
    plain.get("metadata", {}).pop("timestamp", None)
    text = json.dumps(plain, indent=2, sort_keys=True) + "\n"
    fault = JsonStrictValidator(SCHEMA).validate_str(text)
    if fault is not None:
        raise ValueError(f"the bill of materials is not valid: {fault}")
    return text


def _locked() -> Iterator[re.Match[str]]:
    return _ENTRY.finditer(RUN.read_text())


def _python(package: Package, hashes: Sequence[str]) -> Component:
    purl = PackageURL("pypi", name=package.name, version=package.version)
    component = _component(ComponentType.LIBRARY, package.name, package.version, purl)
    component.hashes.update(HashType(alg=HashAlgorithm.SHA_256, content=each) for each in hashes)
    return component


def _component(kind: ComponentType, name: str, version: str, purl: PackageURL) -> Component:
    return Component(type=kind, name=name, version=version, purl=purl, bom_ref=str(purl))


def _bom(
    name: str,
    version: str,
    purl: PackageURL,
    components: Sequence[Component],
    kind: ComponentType = ComponentType.APPLICATION,
) -> Bom:
    bom = Bom()
    bom.metadata.component = _component(kind, name, version, purl)
    bom.components.update(components)
    bom.register_dependency(bom.metadata.component, components)
    return bom


def main(args: Sequence[str]) -> int:
    """Write a bill; returns the exit code."""
    target, *rest = args
    bom = image(rest[1], ask(rest[1])) if rest else wheel()
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    Path(target).write_text(render(bom))
    print(f"{target}: {len(bom.components)} components")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
