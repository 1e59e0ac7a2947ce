"""The vendors' repositories of the lab: NVIDIA's driver and container toolkit, Docker's packages, Ubuntu's names.

Real is what can be: signatures, dependencies, maintainer scripts that enable units and call DKMS, a kernel module that
DKMS compiles, and all of Docker (Debian's, under Docker's names). A stand-in is what needs a GPU: nvidia-smi, nvidia-ctk.
"""

from __future__ import annotations

import io
import json
import subprocess
import tarfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path

from tests.provision.standin.packages import Package, Signer, write_flat, write_suites

FILES = Path(__file__).parent / "files"
DRIVER = "580.95.05"
# By release. The branch's newest must win over an older one of its own and over the branch that dropped old GPUs; Debian
# 13's repository never had 580 (NVIDIA/cuda-repo-management issue 38).
DRIVERS = {
    "12": ("575.57.08", "580.82.07", DRIVER, "590.48.01"),
    "13": ("590.44.01", "590.48.01", "610.43.02"),
}
TOOLKIT = "1.18.0"
DOCKER_RELEASES = {"bookworm": "12", "trixie": "13"}
UBUNTU_RELEASES = {"jammy": "22.04", "noble": "24.04"}
VENDORS = ("nvidia", "toolkit", "docker", "ubuntu")

SERVICE_POSTINST = """#!/bin/sh
set -e
if [ "$1" = configure ]; then
  {before}
  deb-systemd-helper enable {unit} >/dev/null || true
  if [ -d /run/systemd/system ]; then
    systemctl daemon-reload || true
    deb-systemd-invoke start {unit} || true
  fi
fi
"""
SERVICE_PRERM = """#!/bin/sh
set -e
if [ "$1" = remove ] && [ -d /run/systemd/system ]; then deb-systemd-invoke stop {unit} || true; fi
"""
SERVICE_POSTRM = """#!/bin/sh
set -e
if [ "$1" = purge ] && [ -x /usr/bin/deb-systemd-helper ]; then deb-systemd-helper purge {unit} >/dev/null || true; fi
if [ -d /run/systemd/system ]; then systemctl daemon-reload || true; fi
"""
# What dh_dkms makes.
DKMS_POSTINST = """#!/bin/sh
set -e
if [ "$1" = configure ]; then
  /usr/lib/dkms/common.postinst nvidia {version} /usr/share/nvidia-dkms "" "$2"
fi
"""
DKMS_PRERM = """#!/bin/sh
set -e
case "$1" in
remove | upgrade | deconfigure)
  if [ "$(dkms status -m nvidia -v {version})" ]; then dkms remove -m nvidia -v {version} --all; fi
  ;;
esac
"""
DKMS_CONF = """PACKAGE_NAME="nvidia"
PACKAGE_VERSION="{version}"
BUILT_MODULE_NAME[0]="nvidia"
DEST_MODULE_LOCATION[0]="/updates/dkms"
MAKE[0]="make -C ${{kernel_source_dir}} M=${{dkms_tree}}/${{PACKAGE_NAME}}/${{PACKAGE_VERSION}}/build modules"
CLEAN="true"
AUTOINSTALL="yes"
"""
MODULE = """#include <linux/init.h>
#include <linux/module.h>

static int __init nvidia_start(void) {{ return 0; }}
static void __exit nvidia_stop(void) {{ }}

module_init(nvidia_start);
module_exit(nvidia_stop);
MODULE_LICENSE("{licence}");
MODULE_VERSION("{version}");
"""
PERSISTENCED = """#!/bin/sh
# Keeps the driver loaded, and says so.
read -r loaded </opt/standin/loaded || { echo "Failed to query NVIDIA devices" >&2; exit 1; }
case " $* " in *" --no-persistence-mode "*) ;; *) : >/opt/standin/persistence ;; esac
exec sleep infinity
"""
# As Ubuntu's own starts it; Debian's has the driver awake from the beginning.
PERSISTENCED_UNIT = """[Unit]
Description=NVIDIA Persistence Daemon

[Service]
Type=exec
ExecStart=/usr/bin/nvidia-persistenced --user nvidia-persistenced --no-persistence-mode --verbose

[Install]
WantedBy=multi-user.target
"""
# The true ones say /lib/modules/%v, which is the machine's kernel; this link leads to those of the host's (`kernel`).
CDI_SERVICE = """[Unit]
Description=Refresh NVIDIA CDI specification file
ConditionPathExists=|/usr/bin/nvidia-smi
ConditionPathExists=|/usr/sbin/nvidia-smi
ConditionPathExists=/usr/bin/nvidia-ctk

[Service]
Type=oneshot
Environment=NVIDIA_CTK_CDI_OUTPUT_FILE_PATH=/var/run/cdi/nvidia.yaml
EnvironmentFile=-/etc/nvidia-container-toolkit/nvidia-cdi-refresh.env
ExecCondition=/usr/bin/grep -qE '/nvidia.ko' /opt/standin/modules/modules.dep
ExecStart=/usr/bin/nvidia-ctk cdi generate
CapabilityBoundingSet=CAP_SYS_MODULE CAP_SYS_ADMIN CAP_MKNOD

[Install]
WantedBy=multi-user.target
"""
CDI_PATH = """[Unit]
Description=Trigger CDI refresh on NVIDIA driver or toolkit install / upgrade events

[Path]
PathChanged=/opt/standin/modules/modules.dep
PathChanged=/opt/standin/modules/modules.dep.bin
PathChanged=/usr/bin/nvidia-ctk

[Install]
WantedBy=multi-user.target
"""
# As the toolkit's own does it: not by Debian's helpers, so nothing takes the links away when it is removed.
TOOLKIT_POSTINST = """#!/bin/sh
set -e
[ "$1" = configure ] || exit 0
/usr/bin/nvidia-ctk --quiet config --config-file=/etc/nvidia-container-runtime/config.toml --in-place
case $(systemctl is-system-running 2>/dev/null || true) in
running | degraded)
  systemctl daemon-reload || true
  systemctl enable --now nvidia-cdi-refresh.path || true
  systemctl enable --now nvidia-cdi-refresh.service || true
  systemctl start nvidia-cdi-refresh.service || true
  ;;
esac
"""


def build(folder: Path, download: Callable[[str], Mapping[str, Path]]) -> None:
    """Write all repositories into a folder, and fingerprints.json with the key of each.

    `download(release)` fetches the packages of DEBIAN_DOCKER from Debian: their files by name.
    """
    fingerprints = {}
    with ExitStack() as stack:
        signers = {name: stack.enter_context(Signer(name)) for name in VENDORS}
        _nvidia(folder / "nvidia", signers["nvidia"])
        _toolkit(folder / "toolkit", signers["toolkit"])
        _docker(folder / "docker", signers["docker"], download)
        _ubuntu(folder / "ubuntu", signers["ubuntu"])
        for name, signer in signers.items():
            fingerprints[name] = signer.fingerprint
    (folder / "fingerprints.json").write_text(json.dumps(fingerprints))


def _nvidia(folder: Path, signer: Signer) -> None:
    fields = {"Origin": "NVIDIA", "Label": "NVIDIA CUDA"}
    for release, versions in DRIVERS.items():
        packages = [package for version in versions for package in driver_packages(version)]
        write_flat(folder / f"debian{release}/x86_64", packages, signer, fields)
    (folder / "key.pub").write_text(signer.public)


def driver_packages(version: str) -> list[Package]:
    """The driver's packages of one version, as NVIDIA's repository for Debian names them."""
    branch, full = version.partition(".")[0], f"{version}-1"
    same = f"(= {full})"
    pinning = f"/etc/apt/preferences.d/nvidia-driver-pinning-{branch}"
    pinned = "*nvidia-driver* nvidia-kernel* nvidia-persistenced* cuda-drivers*"
    unit = "nvidia-persistenced.service"
    user = "getent passwd nvidia-persistenced >/dev/null || useradd --system --no-create-home nvidia-persistenced"
    smi = (FILES / "nvidia-smi").read_text().replace("@VERSION@", version)
    return [
        Package(
            f"nvidia-driver-pinning-{branch}",
            full,
            files={pinning: f"Package: {pinned}\nPin: version {branch}.*\nPin-Priority: 1000\n"},
            conffiles=(pinning,),
        ),
        _module("nvidia-kernel-open-dkms", "nvidia-kernel-dkms", version, "Dual MIT/GPL"),
        _module("nvidia-kernel-dkms", "nvidia-kernel-open-dkms", version, "NVIDIA"),
        Package(
            "nvidia-persistenced",
            full,
            {"Pre-Depends": "init-system-helpers"},
            {
                "/usr/bin/nvidia-persistenced": (PERSISTENCED, 0o755),
                f"/usr/lib/systemd/system/{unit}": PERSISTENCED_UNIT,
            },
            {
                "postinst": SERVICE_POSTINST.format(unit=unit, before=user),
                "prerm": SERVICE_PRERM.format(unit=unit),
                "postrm": SERVICE_POSTRM.format(unit=unit),
            },
        ),
        Package(
            "nvidia-driver-cuda",
            full,
            {
                "Depends": f"nvidia-kernel-open-dkms {same} | nvidia-kernel-dkms {same}, nvidia-persistenced {same}",
            },
            {"/usr/bin/nvidia-smi": (smi, 0o755)},
        ),
        Package("cuda-drivers", full, {"Depends": f"nvidia-driver-cuda {same}, nvidia-kernel-dkms {same}"}),
    ]


def _module(name: str, other: str, version: str, licence: str) -> Package:
    source = f"/usr/src/nvidia-{version}"
    return Package(
        name,
        f"{version}-1",
        {"Depends": "dkms", "Conflicts": other, "Provides": f"nvidia-kernel-{version}"},
        {
            f"{source}/dkms.conf": DKMS_CONF.format(version=version),
            f"{source}/Makefile": "obj-m := nvidia.o\n",
            f"{source}/nvidia.c": MODULE.format(version=version, licence=licence),
        },
        {"postinst": DKMS_POSTINST.format(version=version), "prerm": DKMS_PRERM.format(version=version)},
    )


def _toolkit(folder: Path, signer: Signer) -> None:
    full = f"{TOOLKIT}-1"
    ctk = (FILES / "nvidia-ctk").read_text().replace("@VERSION@", TOOLKIT)
    units = "/etc/systemd/system/nvidia-cdi-refresh"
    environment = "/etc/nvidia-container-toolkit/nvidia-cdi-refresh.env"
    packages = [
        Package(
            "nvidia-container-toolkit-base",
            full,
            {"Depends": "python3"},
            {
                "/usr/bin/nvidia-ctk": (ctk, 0o755),
                "/usr/bin/nvidia-container-runtime": ('#!/bin/sh\nexec runc "$@"\n', 0o755),
                f"{units}.service": CDI_SERVICE,
                f"{units}.path": CDI_PATH,
                environment: "# NAME=value, for nvidia-ctk cdi generate\n",
            },
            {"postinst": TOOLKIT_POSTINST},
            (f"{units}.service", f"{units}.path", environment),
        ),
        Package(
            "nvidia-container-toolkit",
            full,
            {"Depends": f"nvidia-container-toolkit-base (= {full}), libnvidia-container-tools (= {full})"},
            {"/usr/bin/nvidia-container-runtime-hook": ("#!/bin/sh\nexit 0\n", 0o755)},
        ),
        Package("libnvidia-container-tools", full, {"Depends": f"libnvidia-container1 (= {full})"}),
        Package("libnvidia-container1", full),
    ]
    write_flat(
        folder / "stable/deb/amd64",
        packages,
        signer,
        {"Origin": "https://nvidia.github.io", "Label": "toolkit"},
    )
    (folder / "gpgkey").write_text(signer.public)


# --- Docker -----------------------------------------------------------------------------------------------

# Debian 13's packages run on Debian 12 as they are, but for what is linked with its newer C library: that is Debian 12's.
DEBIAN_DOCKER = {
    "trixie": ("docker.io", "docker-cli", "containerd", "docker-buildx", "docker-compose"),
    "bookworm": ("runc", "tini"),
}
# Docker's name: (version, Debian's packages whose files it holds, dependencies, what it takes the place of).
DOCKER = {
    "containerd.io": (
        "1.7.28-1",
        ("containerd", "runc"),
        "libc6, libseccomp2 (>= 2.5.0)",
        "containerd, runc",
    ),
    "docker-ce": (
        "5:28.5.1-1",
        ("docker.io", "tini"),
        "containerd.io (>= 1.7.27), docker-ce-cli, iptables, libc6, libsystemd0, adduser",
        "docker.io",
    ),
    "docker-ce-cli": ("5:28.5.1-1", ("docker-cli",), "libc6", "docker-cli, docker.io"),
    "docker-buildx-plugin": ("0.29.1-1", ("docker-buildx",), "libc6", "docker-buildx"),
    "docker-compose-plugin": ("2.40.3-1", ("docker-compose",), "libc6", "docker-compose"),
}
# Not Docker's: documentation, a script that empties /var/lib/docker at purge, names of the old compose.
DOCKER_LEFT_OUT = (
    "./usr/share/",
    "./usr/bin/docker-compose",
    "./usr/bin/runc",  # a link to /usr/sbin/runc
    "./usr/bin/containerd-shim-runc-v1",
    "./usr/bin/docker-init",  # a link to tini's
)
DOCKER_MOVED = {"./usr/sbin/runc": "./usr/bin/runc", "./usr/bin/tini-static": "./usr/bin/docker-init"}
SCRIPTS = ("preinst", "postinst", "prerm", "postrm")


def _docker(folder: Path, signer: Signer, download: Callable[[str], Mapping[str, Path]]) -> None:
    files: dict[str, Path] = {}
    for release in DEBIAN_DOCKER:
        files |= download(release)
    suites: dict[str, dict[str, list[Package]]] = {release: {"stable": []} for release in DOCKER_RELEASES}
    for name, (version, sources, depends, replaced) in DOCKER.items():
        data = _files_of([files[source] for source in sources])
        scripts, conffiles = _scripts_of(files[sources[0]])
        provided = replaced if name == "containerd.io" else ""
        fields = {"Depends": depends, "Conflicts": replaced, "Replaces": replaced, "Provides": provided}
        for release, number in DOCKER_RELEASES.items():
            full = f"{version}~debian.{number}~{release}"
            suites[release]["stable"].append(Package(name, full, fields, {}, scripts, conffiles, data))
    write_suites(folder / "debian", suites, signer, {"Origin": "Docker", "Label": "Docker CE"})
    for place in ("gpg", "debian/gpg"):
        (folder / place).write_text(signer.public)


def _files_of(packages: list[Path]) -> bytes:
    """The files of Debian packages in one tar, without what Docker's have not."""
    out = io.BytesIO()
    seen: set[str] = set()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for path in packages:
            unpacked = subprocess.run(
                ["dpkg-deb", "--fsys-tarfile", path], capture_output=True, check=True
            ).stdout
            with tarfile.open(fileobj=io.BytesIO(unpacked)) as source:
                for entry in source:
                    left_out = f"{entry.name}/".startswith(DOCKER_LEFT_OUT) and entry.name not in DOCKER_MOVED
                    entry.name = DOCKER_MOVED.get(entry.name, entry.name)
                    if not left_out and entry.name not in seen:
                        seen.add(entry.name)
                        tar.addfile(entry, source.extractfile(entry) if entry.isreg() else None)
    return out.getvalue()


def _scripts_of(package: Path) -> tuple[dict[str, str], tuple[str, ...]]:
    """(maintainer scripts, conffiles) of a Debian package."""
    control = subprocess.run(["dpkg-deb", "--ctrl-tarfile", package], capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(control)) as tar:
        found = {
            entry.name.removeprefix("./"): tar.extractfile(entry).read().decode()  # type: ignore[union-attr]
            for entry in tar
            if entry.isreg()
        }
    scripts = {name: text for name, text in found.items() if name in SCRIPTS}
    return scripts, tuple(found.get("conffiles", "").split())


# --- Ubuntu -----------------------------------------------------------------------------------------------

UBUNTU_COMPONENTS = {
    "main": {
        "linux-headers-generic": "6.8.0-88.89",
        "linux-headers-6.8.0-88-generic": "6.8.0-88.89",
        "git": "1:2.43.0-1ubuntu7",
        "make": "4.3-4.1build2",
        "python3-venv": "3.12.3-0ubuntu2",
    },
    "restricted": {
        name: "580.95.05-0ubuntu1"
        for name in (
            "linux-modules-nvidia-580-server-generic",
            "linux-modules-nvidia-580-server-open-generic",
            "nvidia-headless-no-dkms-580-server",
            "nvidia-headless-no-dkms-580-server-open",
            "nvidia-headless-580-server",
            "nvidia-headless-580-server-open",
            "nvidia-utils-580-server",
        )
    },
    "universe": {
        "docker.io": "28.2.2-0ubuntu1",
        "docker-buildx": "0.21.3-0ubuntu1",
        "docker-compose-v2": "2.37.1+ds1-0ubuntu2",
        "earlyoom": "1.7-2",
        "systemd-zram-generator": "1.1.2-3",
    },
}


def _ubuntu(folder: Path, signer: Signer) -> None:
    suites: dict[str, dict[str, list[Package]]] = {}
    for release, number in UBUNTU_RELEASES.items():
        suites[release] = {
            component: [Package(name, f"{version}~{number}") for name, version in versions.items()]
            for component, versions in UBUNTU_COMPONENTS.items()
        }
        for pocket in ("updates", "security"):
            suites[f"{release}-{pocket}"] = {component: [] for component in UBUNTU_COMPONENTS}
    write_suites(folder, suites, signer, {"Origin": "Ubuntu", "Label": "Ubuntu"})
    (folder / "key.pub").write_text(signer.public)
