"""How the tests call the playbook: the vendors' repositories are the lab's, and the sizes are small."""

import json

from tests.provision.lab import Host, Played
from tests.provision.standin.mirror import Mirror

TWO_CARDS = [("0000:01:00.0", "RTX 3090"), ("0000:02:00.0", "RTX 3090")]
# On the volume of Docker's data, which is ext4: the container's own overlay can hold no swap file.
SWAP_FOLDER = "/var/lib/docker"


def settings(mirror: Mirror, release: str, **more: object) -> dict:
    """Variables for a host of the lab."""
    address = mirror.address
    fingerprints = json.loads((mirror.folders["nvidia"].parent / "fingerprints.json").read_text())
    number = {"bookworm": "12", "trixie": "13"}[release]
    return {
        "driver_nvidia_repository": f"{address}/nvidia/debian{number}/x86_64/",
        "driver_nvidia_key_url": f"{address}/nvidia/key.pub",
        "driver_nvidia_fingerprint": fingerprints["nvidia"],
        "docker_repository": f"{address}/docker/debian",
        "docker_key_url": f"{address}/docker/gpg",
        "docker_fingerprint": fingerprints["docker"],
        "container_toolkit_repository": f"{address}/toolkit/stable/deb/amd64",
        "container_toolkit_key_url": f"{address}/toolkit/gpgkey",
        "container_toolkit_fingerprint": fingerprints["toolkit"],
        "recipe_config": "recipe/configs/smollm2-135m.yaml",
        "memory_swap": "file",
        "memory_swap_folder": SWAP_FOLDER,
        "memory_swap_gib": 0.25,
        "project_image": "none",
        **more,
    }


def provision(host: Host, *options: str, check: bool = True, **more: object) -> Played:
    return host.play(
        "provision.yml", *options, extra=settings(host.mirror, host.release, **more), check=check
    )


def unprovision(host: Host, *options: str, check: bool = True) -> Played:
    return host.play("unprovision.yml", *options, extra=settings(host.mirror, host.release), check=check)


def add_vendor(host: Host, name: str, place: str, key: str, suites: str = "/") -> None:
    """A vendor's repository, with its key, in apt's sources."""
    address, keyring = host.mirror.address, f"/etc/apt/keyrings/{name}.asc"
    host.put(keyring, (host.mirror.folders[name] / key).read_text())
    host.put(
        f"/etc/apt/sources.list.d/{name}.sources",
        f"Types: deb\nURIs: {address}/{name}/{place}\nSuites: {suites}\nSigned-By: {keyring}\n",
    )


def install(host: Host, *packages: str) -> None:
    host.run(
        f"DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends {' '.join(packages)}"
    )
