"""Runs on a host: GPUs on the PCI bus, and firmware with or without Secure Boot (tests/provision/standins.py, `gpus`).

/opt/standin holds it all: pci/ADDRESS as /sys/bus/pci/devices has it, gpus with a line for each that the stand-in of
nvidia-smi reads, loaded with the version of the driver in the kernel.
"""

import json
import os
import shutil
import subprocess
import sys

STANDIN = "/opt/standin"
SECURE_BOOT = "SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c"
NODES = ("nvidiactl", "nvidia-uvm")


def write(path, text):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as file:
        file.write(text if isinstance(text, bytes) else text.encode())


def device(address, files, driver, group):
    folder = f"{STANDIN}/pci/{address}"
    for name, text in files.items():
        write(f"{folder}/{name}", f"{text}\n")
    os.makedirs(f"{STANDIN}/iommu_groups/{group}", exist_ok=True)
    os.symlink(f"{STANDIN}/iommu_groups/{group}", f"{folder}/iommu_group")
    if driver:
        os.symlink(f"{STANDIN}/drivers/{driver}", f"{folder}/driver")


def main(given):
    for path in ("/sys/bus/pci/devices", "/sys/firmware"):
        while subprocess.run(["mountpoint", "-q", path]).returncode == 0:
            subprocess.run(["umount", path], check=True)
    for name in ("pci", "drivers", "iommu_groups", "power", "firmware"):
        shutil.rmtree(f"{STANDIN}/{name}", ignore_errors=True)
    for name in ("loaded", "persistence"):
        if os.path.exists(f"{STANDIN}/{name}"):
            os.unlink(f"{STANDIN}/{name}")
    for name in os.listdir("/dev"):
        if name.startswith("nvidia"):
            os.unlink(f"/dev/{name}")

    for driver in ("nvidia", "nouveau", "vfio-pci", "snd_hda_intel"):
        os.makedirs(f"{STANDIN}/drivers/{driver}")
    for name in ("pci", "power", "firmware"):
        os.makedirs(f"{STANDIN}/{name}")
    for number, gpu in enumerate(given["gpus"]):
        device(gpu["address"], gpu["files"], given["driver"], 10 + number)
        device(gpu["address"][:-1] + "1", gpu["sound"], "snd_hda_intel", 10 + number)
    write(f"{STANDIN}/gpus", "".join(gpu["row"] + "\n" for gpu in given["gpus"]))
    write(f"{STANDIN}/p2p", given["p2p"] + "\n")
    if given["driver"] == "nvidia":
        write(f"{STANDIN}/loaded", given["version"] + "\n")
        for node in (*(f"nvidia{number}" for number in range(len(given["gpus"]))), *NODES):
            os.mknod(f"/dev/{node}", 0o20666, os.makedev(1, 3))
            os.chmod(f"/dev/{node}", 0o666)
    if given["secure_boot"] is not None:
        # Four bytes of attributes, then the value.
        value = b"\x06\0\0\0" + bytes([given["secure_boot"]])
        write(f"{STANDIN}/firmware/efi/efivars/{SECURE_BOOT}", value)
    subprocess.run([f"{STANDIN}/boot", "mounts"], check=True)


main(json.loads(sys.argv[1]))
