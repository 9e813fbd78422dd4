"""podman and buildah on a machine without an engine, and the project's image built from the Dockerfile."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import subprocess
from pathlib import Path
from typing import Any

from tests.support.manifests import ROOT, Refused

TOOLS = ("buildah", "podman", "runc", "mmdebstrap")
BASE = "localhost/python-base:ci"
OURS = "localhost/agent-shim"
KEPT = 8
CERTIFICATES = "/etc/ssl/certs/ca-certificates.crt"
# The image has no controller: a test's container gets the checkout's, mounted here and found through PYTHONPATH.
CHECKOUT = "/checkout"
DEVTOOLS_MOUNT = f"{CHECKOUT}/devtools"
_STORAGE = '[storage]\ndriver="overlay"\ngraphroot="{0}/graph"\nrunroot="{0}/run"\n'
# crun fails on some cgroup layouts, and default limits cannot be raised in a sandbox.
_ENGINE = """\
[containers]
default_ulimits=["nofile=1024:1024","nproc=4096:4096"]
[engine]
runtime="runc"
cgroup_manager="cgroupfs"
events_logger="file"
[network]
network_backend="netavark"
"""


class Engine:
    """podman and buildah with a storage of their own in `work`, which is kept: the base image takes a minute."""

    def __init__(self, work: Path) -> None:
        self.work = work
        work.mkdir(parents=True, exist_ok=True)
        (work / "storage.conf").write_text(_STORAGE.format(work))
        (work / "containers.conf").write_text(_ENGINE)
        (work / "pip.conf").write_text(f"[global]\ncert = {CERTIFICATES}\n")
        self._env = {
            **os.environ,
            "CONTAINERS_STORAGE_CONF": str(work / "storage.conf"),
            "CONTAINERS_CONF": str(work / "containers.conf"),
        }

    def run(self, *command: str | Path, stdin: str = "", timeout_s: float = 60, check: bool = True) -> str:
        """Run a program and return both of its outputs. Raises `Refused` if it fails, unless `check` is off."""
        done = subprocess.run(
            [str(part) for part in command],
            input=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_s,
            check=False,
            env=self._env,
        )
        if check and done.returncode:
            raise Refused(f"{command[:3]}: exit code {done.returncode}\n{done.stdout}")
        return done.stdout

    def podman(self, *args: str | Path, **how: Any) -> str:
        """`podman …`"""
        return self.run("podman", *args, **how)

    def inspect(self, name: str) -> dict[str, Any]:
        """Return the description of a container or an image by podman."""
        found: dict[str, Any] = json.loads(self.podman("inspect", name))[0]
        return found

    def has_image(self, name: str) -> bool:
        done = subprocess.run(["podman", "image", "exists", name], env=self._env, check=False, timeout=120)
        return done.returncode == 0

    def build(self) -> str:
        """The name of the image of this checkout; built once for each content."""
        image = f"{OURS}:{_digest()}"
        with (self.work / "lock").open("w") as lock:
            # Two workers of one run would tidy up and build at the same time.
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not self.has_image(image):
                self._build(image)
        return image

    def _build(self, image: str) -> None:
        self._tidy()
        if not self.has_image(BASE):
            self.run("sh", ROOT / "tests/support/make-python-base.sh", self.work, BASE, timeout_s=240)
        options = ("--format", "docker", "--layers", "--pull-never", "--isolation=chroot", "--network=host")
        mounts = ("-v", f"{CERTIFICATES}:{CERTIFICATES}:ro", "-v", f"{self.work}/pip.conf:/etc/pip.conf:ro")
        args = ("--build-arg", f"PYTHON_IMAGE={BASE}", "--build-arg", "VERSION=ci", "--build-arg", "REVISION=abc")
        self.run("buildah", "bud", *options, *args, *mounts, "-t", image, ROOT, timeout_s=240)

    def _tidy(self) -> None:
        """Images of former contents go when they become many; with them the layers that only they had."""
        names = [name for name in self.podman("images", "--format", "{{.Repository}}:{{.Tag}}").split() if OURS in name]
        if len(names) > KEPT:
            self.podman("rmi", "-f", *names)
            self.podman("image", "prune", "-f")


def _digest() -> str:
    """Of everything that the image is made of."""
    digest = hashlib.sha256()
    files = [ROOT / name for name in ("Dockerfile", ".dockerignore", "pyproject.toml", "config/agent-shim.yaml")]
    files += [ROOT / "requirements" / name for name in ("run.txt", "tools.txt")]
    files += sorted((ROOT / "shim").rglob("*.py"))
    for path in files:
        digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]
