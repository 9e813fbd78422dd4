"""The image's bill of materials, from what its own interpreter finds in it."""

from __future__ import annotations

import json

from supply import sbom
from supply.locked import packages
from tests.support.containers import Engine


def test_the_bill_names_what_the_image_runs(engine: Engine, image: str) -> None:
    options = ("--rm", "--network=none", "--entrypoint", "/opt/agent-shim/bin/python")
    said = engine.podman("run", *options, image, "-c", sbom._ASK)
    found = json.loads(said.splitlines()[-1])  # above it stand warnings of the engine
    bill = json.loads(sbom.render(sbom.image(image, found)))
    named = {(each["name"], each["version"]) for each in bill["components"]}
    # typing-extensions is only for Python below 3.13, tzdata only for Windows.
    installed = [each for each in packages() if each.name not in ("typing-extensions", "tzdata")]
    assert [each for each in installed if (each.name, each.version) not in named] == []
    assert ("python", found["python"]) in named
    debian = [each for each in bill["components"] if each["purl"].startswith("pkg:deb/debian/")]
    assert len(debian) > 20
