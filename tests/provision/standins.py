"""What the hosts of the lab lack, played: GPUs on a PCI bus, firmware, a kernel, memory, the vendors' repositories.

    gpus(host, [("0000:01:00.0", "RTX 3090")], driver="nouveau", secure_boot=True)
    kernel(host)                       # the newest of Debian, whose headers apt has: DKMS builds for it
    meminfo(host, total_gib=64, available_gib=60)

It is kept in the host's /opt/standin and mounted over /proc and /sys, at each start of the host again (standin/files/boot).
What reads it is real, or a program of a vendor's that cannot work without a GPU (standin/vendors.py).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.provision.lab import CACHE, FILES, Host, alone, docker
from tests.provision.standin import vendors
from tests.provision.standin.mirror import Mirror
from tests.provision.standin.packages import Package

NOT_IN_CONTROL = ("Filename", "Size", "MD5", "SHA", "Description", "Tag")  # only an archive's list has them


@dataclass(frozen=True)
class Model:
    """A GPU that can be bought. `watts`: default, least and most power limit."""

    name: str
    device: str
    memory_mib: int
    compute: str
    watts: tuple[int, int, int]
    generation: int  # of PCI Express


MODELS = {
    "GTX 980": Model("NVIDIA GeForce GTX 980", "0x13c0", 4096, "5.2", (180, 90, 225), 3),
    "GTX 1080 Ti": Model("NVIDIA GeForce GTX 1080 Ti", "0x1b06", 11264, "6.1", (250, 125, 300), 3),
    "RTX 2080 Ti": Model("NVIDIA GeForce RTX 2080 Ti", "0x1e07", 11264, "7.5", (250, 100, 280), 3),
    "RTX 3090": Model("NVIDIA GeForce RTX 3090", "0x2204", 24576, "8.6", (350, 100, 366), 4),
    "RTX 3090 Ti": Model("NVIDIA GeForce RTX 3090 Ti", "0x2203", 24564, "8.6", (450, 100, 480), 4),
    "RTX 4090": Model("NVIDIA GeForce RTX 4090", "0x2684", 24564, "8.9", (450, 150, 600), 4),
    "RTX 5090": Model("NVIDIA GeForce RTX 5090", "0x2b85", 32607, "12.0", (575, 400, 600), 5),
}
SPEEDS = {3: "8.0 GT/s PCIe", 4: "16.0 GT/s PCIe", 5: "32.0 GT/s PCIe"}

Card = tuple[str, str] | tuple[str, str, Mapping[str, str]]

# --- devices ----------------------------------------------------------------------------------------------


def gpus(
    host: Host,
    cards: Sequence[Card],
    driver: str | None = None,
    secure_boot: bool | None = None,
    p2p: str = "CNS",
    bar1_mib: int = 256,
) -> None:
    """Put GPUs on the host's PCI bus, and nothing else; again, with others, at any time.

    Args:
        cards: (address, name of MODELS), and for what is unlike a card in a slot of its own the files of the
            device's folder in sysfs, such as {"current_link_width": "4"}.
        driver: who serves them: nvidia (of vendors.DRIVER), nouveau, vfio-pci or nobody.
        secure_boot: whether the firmware has it on; None: no UEFI.
        p2p: what nvidia-smi says of one card reading another's memory.
        bar1_mib: size of the window onto a card's memory; with resizable BAR, all of it.
    """
    ordered = enumerate(sorted(cards, key=lambda card: card[0]))
    given = [_gpu(index, card[0], card[1], card[2:], bar1_mib) for index, card in ordered]
    settings = {
        "gpus": given,
        "driver": driver,
        "secure_boot": secure_boot,
        "p2p": p2p,
        "version": vendors.DRIVER,
    }
    host.put("/usr/local/sbin/modprobe", (FILES / "modprobe").read_text(), 0o755)
    host.python(FILES / "make_gpus.py", json.dumps(settings))


def _gpu(index: int, address: str, name: str, unlike: Sequence[Mapping[str, str]], bar1_mib: int) -> dict:
    model = MODELS[name]
    number = str(uuid.uuid5(uuid.NAMESPACE_OID, address))
    bus = f"0000{address.upper()}"
    row = (index, address, bus, model.name, f"GPU-{number}", model.memory_mib, model.compute, *model.watts)
    speed = SPEEDS[model.generation]
    # Registers, then the window, then the rest: start, end, flags (0x14220c: memory, 64 bits, prefetchable).
    base = 0x4000000000 + index * 0x1000000000
    windows = [(0xA0000000 + index * 0x2000000, 16, 0x40200), (base, bar1_mib, 0x14220C), (0, 0, 0)]
    windows += [(base + 0x800000000, 32, 0x14220C), (0, 0, 0)]
    resource = "".join(
        f"0x{start:016x} 0x{start + (size << 20) - 1 if size else 0:016x} 0x{flags:016x}\n"
        for start, size, flags in windows
    )
    own = {
        "vendor": "0x10de",
        "device": model.device,
        "subsystem_vendor": "0x1043",
        "subsystem_device": "0x87af",
        "class": "0x030000",
        "boot_vga": str(int(index == 0)),
        "enable": "1",
        "numa_node": "-1",
        "current_link_width": "16",
        "max_link_width": "16",
        "current_link_speed": speed,
        "max_link_speed": speed,
        "resource": resource.rstrip("\n"),
    }
    sound = {"vendor": "0x10de", "device": "0x1aef", "class": "0x040300"}
    return {
        "address": address,
        "row": "|".join(map(str, row)),
        "files": {**own, **dict(*unlike)},
        "sound": sound,
    }


# --- the kernel and its memory ----------------------------------------------------------------------------


def kernel(host: Host, release: str | None = None) -> str:
    """Have the host take a kernel of Debian for the running one (the newest, if not named); its release.

    True for `uname` and /proc; the system call, and so Python's platform.release() and Ansible's facts, keep the
    machine's. update-initramfs only writes its calls to /opt/standin/initramfs.log.
    """
    if release is None:
        named = host.run("apt-cache depends --important linux-headers-amd64").stdout
        release = next(
            word for word in named.split() if word.startswith("linux-headers-") and word[14].isdigit()
        )
        release = release.removeprefix("linux-headers-")
    # A machine has its kernel as a package; Debian 13's headers ask for it. This one is empty, and otherwise Debian's,
    # or apt would bring Debian's in its place.
    name = f"linux-image-{release}"
    shown = host.run(f"apt-cache show --no-all-versions {name}").stdout
    fields = dict(line.split(": ", 1) for line in shown.splitlines() if re.match(r"[A-Z][\w-]*: ", line))
    fields = {key: text for key, text in fields.items() if not key.startswith(NOT_IN_CONTROL)}
    files = {f"/lib/modules/{release}/modules.{name}": "" for name in ("order", "builtin")}
    packages = [
        Package(name, fields["Version"], fields, {**files, f"/boot/vmlinuz-{release}": ""}),
        Package(
            "standin-initramfs",
            "1",
            {"Provides": "linux-initramfs-tool"},
            {"/usr/sbin/update-initramfs": ((FILES / "update-initramfs").read_text(), 0o755)},
        ),
    ]
    with tempfile.TemporaryDirectory() as scratch:
        for package in packages:
            package.write(Path(scratch))
        docker("cp", scratch, f"{host.container}:/opt/standin/debs")
    host.put("/usr/local/bin/uname", (FILES / "uname").read_text(), 0o755)
    host.put("/opt/standin/osrelease", f"{release}\n")
    host.run(
        "apt-get -qq install -y --no-install-recommends /opt/standin/debs/*.deb && rm -r /opt/standin/debs"
        f" && depmod {release} && ln -sfn /lib/modules/{release} /opt/standin/modules && /opt/standin/boot mounts"
    )
    return release


def meminfo(host: Host, total_gib: float, available_gib: float) -> None:
    """Have the host see this much memory; its swap stays what it is now."""
    lines = []
    for line in host.read("/proc/meminfo").splitlines():
        name = line.partition(":")[0]
        gib = {"MemTotal": total_gib, "MemAvailable": available_gib, "MemFree": available_gib * 0.9}.get(name)
        lines.append(line if gib is None else f"{name + ':':<16}{int(gib * 2**20):>8} kB")
    host.put("/opt/standin/meminfo", "\n".join(lines) + "\n")
    host.run("/opt/standin/boot mounts")


def tiny_image(host: Host, name: str = "tiny") -> None:
    """Give the host's Docker an image that holds a shell and its C library, and nothing else."""
    host.run(
        f"""set -e
        root=$(mktemp -d)
        mkdir -p $root/usr/bin $root/usr/lib $root/usr/lib64 $root/tmp
        for folder in bin lib lib64; do ln -s usr/$folder $root/$folder; done
        cp /usr/bin/dash $root/usr/bin/sh
        for file in $(ldd /usr/bin/dash | grep -o '/lib[^ ]*'); do cp --parents $file $root; done
        tar -C $root -c . | docker import - {name}
        rm -r $root"""
    )


# --- repositories -----------------------------------------------------------------------------------------


def serve_repositories(mirror: Mirror, debian_images: Mapping[str, str]) -> dict[str, str]:
    """Have the mirror answer for the vendors (vendors.py), made when they are not in the cache; their keys' fingerprints.

    /nvidia/debian12/x86_64/, /nvidia/debian13/x86_64/ (key: /nvidia/key.pub), /toolkit/stable/deb/amd64/ (/toolkit/gpgkey),
    /docker/debian/ (/docker/gpg), /ubuntu/ (/ubuntu/key.pub).
    """
    beside = Path(vendors.__file__).parent
    sources = [
        beside / name for name in ("vendors.py", "packages.py", "files/nvidia-smi", "files/nvidia-ctk")
    ]
    digest = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()
    folder = CACHE / f"repositories-{digest[:12]}"
    with alone():
        for old in CACHE.glob("repositories-*"):
            if old != folder and old.stat().st_mtime < time.time() - 86400:
                shutil.rmtree(old)
        if not folder.exists():
            part = CACHE / "repositories-part"
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir()
            with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
                vendors.build(
                    part, lambda release: _download(Path(scratch), release, mirror, debian_images[release])
                )
            part.rename(folder)
        os.utime(folder)
    for name in vendors.VENDORS:
        mirror.serve(name, folder / name)
    return json.loads((folder / "fingerprints.json").read_text())


def _download(folder: Path, release: str, mirror: Mirror, image: str) -> dict[str, Path]:
    """Debian's packages of Docker, fetched by the apt of a host of that release, which checks the signatures."""
    names = vendors.DEBIAN_DOCKER[release]
    get = f"apt-get -qq -o Acquire::http::Proxy={mirror.address} -o APT::Sandbox::User=root"
    scratch = folder / release
    scratch.mkdir()
    command = f"cd /scratch && {get} update && {get} download {' '.join(names)}"
    docker("run", "--rm", f"--volume={scratch}:/scratch", image, "sh", "-c", command)
    return {name: next(scratch.glob(f"{name}_*.deb")) for name in names}


def ubuntu(host: Host, version: str) -> None:
    """Make a host of Debian look like Ubuntu 22.04 or 24.04: its name, and apt's sources with packages that are empty."""
    codename = next(name for name, number in vendors.UBUNTU_RELEASES.items() if number == version)
    key = "/usr/share/keyrings/ubuntu-archive-keyring.asc"
    address = f"{host.mirror.address}/ubuntu"
    folder = host.mirror.folders["ubuntu"]
    host.run("apt-get update && apt-get install -y python3-apt")  # every Ubuntu has it, and Ansible needs it
    host.put(key, (folder / "key.pub").read_text())
    host.put(
        "/usr/lib/os-release",
        f'PRETTY_NAME="Ubuntu {version} LTS"\nNAME="Ubuntu"\nVERSION_ID="{version}"\nVERSION="{version} LTS"\n'
        f"VERSION_CODENAME={codename}\nID=ubuntu\nID_LIKE=debian\nUBUNTU_CODENAME={codename}\n",
    )
    host.put(
        "/etc/apt/sources.list.d/ubuntu.sources",
        f"Types: deb\nURIs: {address}\nSuites: {codename} {codename}-updates {codename}-security\n"
        f"Components: {' '.join(vendors.UBUNTU_COMPONENTS)}\nSigned-By: {key}\n",
    )
    host.run("rm /etc/apt/sources.list.d/debian.sources; apt-get update")
