"""Checks of the host: release, kernel, systemd, RAM, swap, disks, packages, Docker, network."""

from __future__ import annotations

from judging.case import Case, Check, Row, decimal, judged, row, yes
from judging.known import NO_SWAP_FILE, OLDEST_DOCKER, THIN_MARGIN, major

SUPPORTED = {
    ("debian", "12"): "Debian 12",
    ("debian", "13"): "Debian 13",
    ("ubuntu", "22.04"): "Ubuntu 22.04",
    ("ubuntu", "24.04"): "Ubuntu 24.04",
}
SLOW_KINDS = {"hdd": "a hard disk", "network": "a network file system"}
# Variables of the roles that say where something large lies.
FOLDER_SETTINGS = ("models_folder", "runs_folder", "memory_swap_folder")


# --- the system -----------------------------------------------------------------------------------------


def release(case: Case) -> Row:
    found = case.machine.get("release") or {}
    good = (found.get("id"), found.get("version")) in SUPPORTED
    name = found.get("name") or "unknown"
    remedy = "install one of them; on others set the host up by hand (docs/image.md names what is needed)"
    return judged("release", good, name, "one of " + ", ".join(SUPPORTED.values()), remedy)


def architecture(case: Case) -> Row:
    found = case.machine.get("architecture") or "unknown"
    remedy = "the container image is built for x86_64 only: use such a machine"
    return judged("architecture", found in ("x86_64", "amd64"), found, "x86_64", remedy)


def kernel(case: Case) -> Row:
    """Headers come from the package that the kernel came from: without one, no module can be built for it."""
    found, package = case.machine.get("kernel") or "unknown", case.machine.get("kernel_package")
    if not case.builds_modules or case.machine.get("headers_for_kernel") or package:
        return row("kernel", "ok", f"{found}{f' of {package}' if package else ''}")
    image = "linux-image-amd64" if case.release_id == "debian" else "linux-generic"
    return row(
        "kernel",
        "warn",
        f"{found}, which no package brought, and its headers are not there: the driver cannot be built for it",
        "a kernel of the distribution",
        f"`sudo apt install {image}` and reboot into it, or put the kernel's headers into /lib/modules/{found}/build (then `-e driver_headers=false`)",
    )


def systemd(case: Case) -> Row:
    if case.machine.get("systemd"):
        return row("systemd", "ok", "it runs the services")
    remedy = "use a host, or a container whose first program is systemd"
    if case.machine.get("wsl2"):
        remedy = "write `[boot]` and `systemd=true` to /etc/wsl.conf, then `wsl --shutdown` in Windows and start it again"
    return row("systemd", "fail", "it does not run", "systemd as the first program", remedy)


def wsl2(case: Case) -> Row | None:
    if not case.machine.get("wsl2"):
        return None
    return row("wsl2", "ok", "WSL2: Windows brings the driver, so none is installed here")


def reboot(case: Case) -> Row:
    """Modules are built for the kernel that runs: without its headers, only the newer one's boot helps."""
    machine, running = case.machine, case.machine.get("kernel", "")
    newer, candidates = machine.get("newer_kernel"), machine.get("candidates") or {}
    no_headers = not machine.get("headers_for_kernel") and f"linux-headers-{running}" not in candidates
    # Of a bare machine's apt nothing is known yet; where it knows Docker, it has lists.
    apt_knows = "docker.io" in candidates
    if no_headers and case.builds_modules and (newer or (machine.get("kernel_package") and apt_knows)):
        found = (
            f"{running} runs, {newer} is installed, and" if newer else f"{running} runs, and in apt's sources"
        )
        remedy = (
            "`sudo reboot`"
            if newer
            else "install them yourself, or `sudo apt full-upgrade` and `sudo reboot` into the newest kernel"
        )
        return row(
            "reboot",
            "fail",
            f"{found} there are no headers for {running}: the driver cannot be built for it",
            "the newest installed kernel" if newer else "a kernel that apt has headers for",
            f"{remedy}, then provision again",
        )
    if not machine.get("reboot_required"):
        return row("reboot", "ok", "none pending")
    to_come = f"{running} runs, {newer} is installed" if newer else "a reboot is pending"
    return row("reboot", "warn", to_come, "none pending", "it goes on; `sudo reboot` when it suits you")


# --- memory and disks -----------------------------------------------------------------------------------


def ram(case: Case) -> Row:
    there, needed = decimal(case.machine.get("ram_gib")), case.ram_needed_gib
    if there is None or needed is None:
        found = "unknown" if there is None else f"{there:.1f} GiB"
        return row(
            "ram",
            "skip",
            f"{found}; {'the system does not tell' if there is None else 'the need is not known'}",
        )
    remedy = case.reason("host RAM") or "more RAM, more GPUs, or another config (`recipe_config`)"
    if there < needed:
        return row("ram", "fail", f"{there:.1f} GiB", f"{needed:.1f} GiB for the plan", remedy)
    return row("ram", "ok", f"{there:.1f} GiB, {needed:.1f} needed")


def swap(case: Case) -> Row:
    """Swap replaces no RAM (pinned memory cannot be swapped); it lets other programs give way."""
    choice, there = case.chosen("swap"), decimal(case.machine.get("swap_gib")) or 0.0
    ram_gib, needed = decimal(case.machine.get("ram_gib")), case.ram_needed_gib
    kind, gib = choice.get("kind", "none"), decimal(choice.get("gib")) or 0.0
    found = f"{there:.1f} GiB there"
    if kind == "none":
        thin = ram_gib is not None and needed is not None and needed <= ram_gib < needed * (1 + THIN_MARGIN)
        remedy = "it goes on; RAM is thin for the plan: `-e memory_swap=auto` makes some"
        return judged("swap", not thin or there >= 1, found, "some where RAM is thin", remedy, "warn")
    folder = choice.get("folder", "")
    if choice.get("there"):
        ours = "zram" if kind == "zram" else f"file in {folder}"
        return row("swap", "ok", f"{found}, {gib:g} GiB of it the recipe's {ours}")
    if kind == "zram":
        return row("swap", "ok", f"{found}, zram of {gib:g} GiB to come")
    disk = case.disk(folder)
    found += f", a file of {gib:g} GiB to come in {folder}"
    if str(disk.get("filesystem", "")).startswith(NO_SWAP_FILE):
        remedy = "`-e memory_swap_folder=` a folder on ext4, xfs or btrfs, or `-e memory_swap=zram`"
        return row(
            "swap", "fail", f"{found}, which is {disk['filesystem']}", "a file system that can swap", remedy
        )
    if disk.get("kind") == "hdd":
        return row(
            "swap",
            "warn",
            f"{found}, on a hard disk",
            "an SSD",
            "it goes on: `-e memory_swap=zram` is faster",
        )
    return row("swap", "ok", found)


def disk(case: Case) -> list[Row]:
    """Free space by file system: folders on the same one share it."""
    by_mount: dict[str, list[str]] = {}
    for folder, gib in (case.choices.get("disk") or {}).items():
        if decimal(gib):
            place = case.disk(folder)
            by_mount.setdefault(f"{place.get('device')} {place.get('mount')}", []).append(folder)
    return [_disk_row(case, folders) for folders in by_mount.values()]


# --- packages, Docker, network --------------------------------------------------------------------------


def apt_lock(case: Case) -> Row:
    holder = case.machine.get("apt_lock")
    if not holder:
        return row("apt", "ok", "nobody else installs packages")
    found = f"{holder.get('name')} (process {holder.get('pid')}) is installing packages"
    remedy = f"wait until it has ended (`ps -p {holder.get('pid')}`), then provision again"
    return row("apt", "fail", found, "apt's lock is free", remedy)


def dpkg_interrupted(case: Case) -> Row | None:
    if not case.machine.get("dpkg_interrupted"):
        return None
    remedy = "it goes on: `dpkg --configure -a` is run first"
    return row("dpkg", "warn", "an earlier installation was cut off", "no half-installed packages", remedy)


def docker(case: Case) -> Row:
    found, choice = case.machine.get("docker") or {}, case.chosen("docker")
    version, origin, running = found.get("version"), found.get("origin"), found.get("running") or 0
    expected = f"an engine from {OLDEST_DOCKER} on, of the distribution or of Docker"
    if found.get("settings_error"):
        return row(
            "docker",
            "fail",
            str(found["settings_error"]),
            "JSON",
            "correct /etc/docker/daemon.json, or move it away",
        )
    if origin == "other":
        remedy = "`sudo snap remove docker`, `sudo apt remove podman-docker` or remove the copied programs: they would hide ours"
        if case.machine.get("wsl2"):
            remedy = "switch off Docker Desktop's WSL integration for this distribution, or " + remedy
        return row(
            "docker", "fail", f"{version or 'an engine'} that neither of these packaged", expected, remedy
        )
    if found.get("rootless") and found.get("running") is None:
        remedy = "`dockerd-rootless-setuptool.sh uninstall` as the user who runs it: GPUs and folders are given by the system's"
        return row("docker", "fail", "only an engine without root runs", f"{expected}, run by root", remedy)
    source, to_come = choice.get("source"), f"{case.source_name(choice.get('source'))} to come"
    if source in (None, "", "installed"):
        remedy = "`-e docker_source=auto` replaces it"
        return judged(
            "docker", major(version) >= OLDEST_DOCKER, f"{version or 'none'} is there", expected, remedy
        )
    if not version or not origin:
        return row("docker", "ok", f"none is there, {to_come}")
    if origin == source and major(version) >= OLDEST_DOCKER:
        return row("docker", "ok", f"{version} is there")
    if running and not yes(case.settings.get("docker_replace")):
        what = f"{version} is to be replaced ({to_come}), but {running} container{'s run' if running > 1 else ' runs'}"
        remedy = "end them (`docker ps`), or `-e docker_replace=true` if they may stop"
        return row("docker", "fail", what, "no running container while the engine is replaced", remedy)
    return row("docker", "ok", f"{version} is there, {to_come}")


def network(case: Case) -> list[Row] | Row | None:
    if "unreachable" not in case.choices:
        return None
    unreachable = case.choices["unreachable"] or []
    if not unreachable:
        return row("network", "ok", "what will be fetched answers")
    remedy = "check network and proxy (`-e https_proxy=`), or name a mirror in its place"
    return [
        row(
            "network",
            "fail",
            f"no network for {each.get('for')}: {each.get('url')} ({each.get('error')})",
            "an answer",
            remedy,
        )
        for each in unreachable
    ]


# --- parts of checks ------------------------------------------------------------------------------------


def _disk_row(case: Case, folders: list[str]) -> Row:
    place, names = case.disk(folders[0]), " and ".join(folders)
    if not place:
        return row("disk", "skip", f"{names}: not measured")
    needed = sum(decimal(case.choices["disk"][folder]) or 0 for folder in folders)
    free, kind = decimal(place.get("free_gib")) or 0.0, str(place.get("kind"))
    found, expected = (
        f"{free:.1f} GiB free on {place.get('mount') or 'the disk'}",
        f"{needed:.1f} GiB for {names}",
    )
    if kind == "memory":
        found += f", which is RAM ({place.get('filesystem')})"
        return row("disk", "fail", found, f"{expected}, on a disk", f"another folder than {names}")
    if free < needed:
        return row("disk", "fail", found, expected, _more_room(case, folders))
    if kind in SLOW_KINDS:
        remedy = "it goes on: a 70B model takes minutes to load from there; from an NVMe disk, less than one"
        return row("disk", "warn", f"{found}, {SLOW_KINDS[kind]}", f"{expected}, on an SSD", remedy)
    return row("disk", "ok", f"{found}, {needed:.1f} needed for {names}")


def _more_room(case: Case, folders: list[str]) -> str:
    """What helps where these folders have too little: the variables that name others."""
    movable = [name for name in FOLDER_SETTINGS if case.settings.get(name) in folders]
    words = ["free some"]
    if movable:
        options = ", ".join(f"`-e {name}=`" for name in movable)
        words.append(f"name a folder on a larger disk ({options})")
    if "memory_swap_folder" in movable:
        words.append("take less swap (`-e memory_swap_gib=`, `-e memory_swap=none`)")
    if (case.machine.get("docker") or {}).get("data_root") in folders:
        words.append("move Docker's data (`data-root` in /etc/docker/daemon.json)")
    return ", or ".join(words)


SYSTEM: list[Check] = [release, architecture, wsl2, systemd, kernel, reboot]
MEMORY: list[Check] = [ram, swap, disk]
SOFTWARE: list[Check] = [apt_lock, dpkg_interrupted, docker, network]
