"""What a host gets, and from where: each decision on machines of the four releases, with what speaks for it."""

import copy
import importlib.util

import pytest

from tests.docker.calls import ROOT


def load_filters():
    spec = importlib.util.spec_from_file_location("choices", ROOT / "ansible/filter_plugins/choices.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


choices = load_filters()

CARD = {"name": "GeForce RTX 3090", "memory_gib": 24, "open_modules": "possible"}
NVIDIAS = {"nvidia-kernel-dkms": "580.95", "nvidia-kernel-open-dkms": "580.95"}
RELEASES = {
    "debian 12": {"id": "debian", "version": "12", "codename": "bookworm", "name": "Debian 12"},
    "debian 13": {"id": "debian", "version": "13", "codename": "trixie", "name": "Debian 13"},
    "ubuntu 22.04": {"id": "ubuntu", "version": "22.04", "codename": "jammy", "name": "Ubuntu 22.04"},
    "ubuntu 24.04": {"id": "ubuntu", "version": "24.04", "codename": "noble", "name": "Ubuntu 24.04"},
}
SETTINGS = {
    "driver_branch": 580, "driver_source": "auto", "driver_modules": "auto", "driver_headers": True, "driver_nvidia_key_url": "https://nvidia/key",
    "docker_source": "auto", "docker_key_url": "https://docker/gpg",
    "container_toolkit_mode": "auto", "container_toolkit_key_url": "https://toolkit/gpgkey",
    "memory_swap": "auto", "memory_swap_gib": "auto", "memory_swap_folder": "/var",
    "models_folder": "/models", "runs_folder": "/runs", "models_gib": 168, "runs_gib": 9,
    "project_build": False, "pip_index_url": "", "gpus_wanted": 1, "ram_needed_gib": 47,
}  # fmt: skip


def machine(release="debian 12", **changes):
    found = {
        "release": RELEASES[release],
        "kernel": "6.1.0-40-amd64" if "debian" in release else "6.8.0-60-generic",
        "wsl2": False, "container": "", "ram_gib": 64, "swap_gib": 0, "swaps": [], "secure_boot": "off",
        "gpus": [CARD, CARD], "nouveau": {"loaded": False, "bound": []}, "headers_for_kernel": False,
        "driver": {"loaded": None, "smi": None, "foreign_sources": []}, "installed": {}, "candidates": {},
        "docker": {"version": None, "origin": None, "settings": {}, "data_root": "/var/lib/docker"}, "desktop": {"active": False},
        "disks": {"/var": {"filesystem": "ext4"}}, "ours": {"sources": [], "packages": []},
        "apt": {"mirrors": ["http://mirror/debian"], "components": ["main"]},
    }  # fmt: skip
    return copy.deepcopy(found) | changes


def choose(release="debian 12", settings=None, **changes):
    return choices.choices(machine(release, **changes), SETTINGS | (settings or {}))


@pytest.mark.parametrize(
    "release, source, package",
    [
        ("debian 12", "nvidia", "nvidia-driver-cuda"),
        ("debian 13", "nvidia", "nvidia-driver-cuda"),
        ("ubuntu 22.04", "distribution", "nvidia-headless-580-server-open"),
        ("ubuntu 24.04", "distribution", "nvidia-headless-580-server-open"),
    ],
)
def test_the_driver_comes_from_where_it_is_new_enough(release, source, package):
    found = choose(release)["driver"]
    assert (found["source"], package in found["packages"]) == (source, True), found
    assert found["headers"] == ["linux-headers-amd64" if "debian" in release else "linux-headers-generic"]


def test_debians_own_driver_where_an_older_branch_is_enough():
    found = choose("debian 13", {"driver_branch": 535})["driver"]
    assert found["source"] == "distribution" and found["packages"][0] == "nvidia-open-kernel-dkms"


def test_apt_knows_better_than_the_table():
    """Backports, or a point release, with a newer driver."""
    found = choose("debian 13", candidates={"nvidia-kernel-dkms": "590.44-1"})["driver"]
    assert found["source"] == "distribution"


@pytest.mark.parametrize(
    "cards, wanted, expected",
    [
        (["possible"], "auto", "nvidia-kernel-open-dkms"),
        (["needed"], "auto", "nvidia-kernel-open-dkms"),
        (["impossible"], "auto", "nvidia-kernel-dkms"),
        (["possible"], "proprietary", "nvidia-kernel-dkms"),
    ],
)
def test_open_modules_where_the_cards_can(cards, wanted, expected):
    gpus = [CARD | {"open_modules": word} for word in cards]
    assert choose(settings={"driver_modules": wanted}, gpus=gpus)["driver"]["packages"][0] == expected


def test_ubuntu_with_secure_boot_gets_modules_that_are_signed_and_not_held():
    found = choose("ubuntu 24.04", secure_boot="on", installed={"linux-image-generic-hwe-24.04": "6.14"})[
        "driver"
    ]
    assert found["packages"][0] == "linux-modules-nvidia-580-server-open-generic-hwe-24.04"
    assert not found["dkms"] and not found["hold"] and not found["headers"]


@pytest.mark.parametrize(
    "changes, settings, source, word",
    [
        ({"wsl2": True, "gpus": []}, {}, "none", "Windows"),
        ({"gpus": []}, {"gpus_wanted": 0}, "none", "none is wanted"),
        ({}, {"driver_source": "none"}, "none", "driver_source"),
        ({"driver": {"loaded": "590.10", "smi": "590.10"}}, {}, "installed", "branch 590"),
        ({"driver": {"loaded": "550.10", "smi": None}}, {}, "nvidia", "580"),
    ],
)
def test_no_driver_is_installed_where_none_may_or_need_be(changes, settings, source, word):
    found = choose(settings=settings, **changes)["driver"]
    assert found["source"] == source and word in found["why"], found


def test_a_desktop_keeps_its_graphics():
    assert "nvidia-driver" in choose(desktop={"active": True})["driver"]["packages"]


def test_a_second_run_chooses_as_the_first():
    """What we brought is not taken for somebody else's, which would be left as it is."""
    ours = {"sources": ["nvidia", "docker"], "packages": ["nvidia-kernel-open-dkms", "docker-ce"]}
    first = choose()
    second = choose(
        ours=ours,
        driver={"loaded": "580.95", "smi": "580.95", "foreign_sources": []},
        docker={"version": "28.5.1", "origin": "docker", "settings": {}},
        installed={"nvidia-kernel-open-dkms": "580.95", "docker-ce": "5:28.5.1"},
        candidates={"nvidia-kernel-dkms": "580.95"},
    )
    for part in ("driver", "docker"):
        assert {k: v for k, v in second[part].items() if k != "why"} == {
            k: v for k, v in first[part].items() if k != "why"
        }


@pytest.mark.parametrize(
    "release, docker, source, first",
    [
        ("debian 12", {}, "docker", "docker-ce"),
        ("debian 13", {}, "distribution", "docker.io"),
        ("ubuntu 22.04", {}, "distribution", "docker.io"),
        ("debian 12", {"version": "29.0.1", "origin": "docker"}, "installed", "docker-ce"),
        ("debian 13", {"version": "28.0.0", "origin": "docker"}, "installed", "docker-ce"),
        ("debian 12", {"version": "20.10.24", "origin": "distribution"}, "docker", "docker-ce"),
    ],
)
def test_an_engine_that_is_new_enough_stays(release, docker, source, first):
    found = choose(release, docker={"version": None, "origin": None, "settings": {}} | docker)["docker"]
    assert (found["source"], found["packages"][0]) == (source, first), found


def test_an_old_engine_gives_way_to_dockers():
    found = choose(docker={"version": "20.10.24", "origin": "distribution", "settings": {}})["docker"]
    assert "docker.io" in found["replaces"] and "containerd" in found["replaces"]


@pytest.mark.parametrize(
    "changes, settings, kind, gib",
    [
        ({"ram_gib": 64}, {}, "file", 4),  # 47 GiB and a fifth fit: only room for a burst
        ({"ram_gib": 48}, {}, "file", 9),
        ({"ram_gib": 32}, {}, "file", 16),  # more does not help: pinned memory cannot be swapped
        ({"ram_gib": 48, "swap_gib": 8}, {}, "file", 1),
        ({"ram_gib": 64, "swap_gib": 8}, {}, "none", 0),
        ({"disks": {"/var": {"filesystem": "zfs"}}}, {}, "zram", 4),
        ({"container": "lxc"}, {}, "none", 0),
        ({}, {"memory_swap": "none"}, "none", 0),
        ({}, {"memory_swap": "zram", "memory_swap_gib": 8}, "zram", 8),
        ({"swaps": [{"path": "/var/recipe.swap", "size_gib": 9.0}], "swap_gib": 9}, {}, "file", 9),
        ({"swaps": [{"path": "/var/recipe.swap.part", "size_gib": 9}], "swap_gib": 9}, {}, "file", 4),
        ({"swaps": [{"path": "/var/recipes", "size_gib": 0.5}], "swap_gib": 0.5}, {}, "file", 4),  # not ours
    ],
)
def test_swap_is_what_the_plan_lacks(changes, settings, kind, gib):
    found = choose(settings=settings, **changes)["swap"]
    assert (found["kind"], found["gib"]) == (kind, gib), found


def test_disk_counts_what_is_to_come():
    found = choose(settings={"project_build": True})["disk"]
    assert found == {"/models": 168, "/runs": 9, "/usr": 5, "/var/lib/docker": 30, "/var": 4}
    moved = {"version": "28.0.1", "origin": "docker", "settings": {"data-root": "/big"}, "data_root": "/big"}
    made = [{"path": "/var/recipe.swap", "size_gib": 4.0}]
    found = choose(settings={"project_build": True}, docker=moved, swaps=made)["disk"]
    assert found == {"/models": 168, "/runs": 9, "/usr": 5, "/big": 30}


def test_only_what_will_be_fetched_has_to_be_reached():
    urls = {need["url"] for need in choose()["network"]}
    assert urls == {
        "http://mirror/debian",
        "https://nvidia/key",
        "https://docker/gpg",
        "https://toolkit/gpgkey",
    }
    done = choose(
        ours={"sources": ["nvidia", "docker"], "packages": ["nvidia-kernel-open-dkms", "docker-ce"]},
        installed=dict.fromkeys(
            [
                "nvidia-kernel-open-dkms",
                "nvidia-driver-cuda",
                "linux-headers-amd64",
                "nvidia-container-toolkit",
                *choices.DOCKER_CE_PACKAGES,
            ],
            "1",
        ),
    )
    assert done["network"] == []


@pytest.mark.parametrize(
    "kernel, flavour", [("6.8.0-60-generic", "generic"), ("6.8.0-60-lowlatency", "lowlatency")]
)
def test_ubuntus_metapackages_follow_the_kernel(kernel, flavour):
    assert choices.ubuntu_kernel(machine("ubuntu 24.04", kernel=kernel)) == flavour


def test_a_run_that_was_cut_off_is_gone_on_with_from_where_it_came():
    """NVIDIA's repository is there, its driver only half: Debian has no such branch all the same."""
    ours = {"sources": ["nvidia"], "packages": []}
    assert choose(ours=ours, candidates=NVIDIAS)["driver"]["source"] == "nvidia"


@pytest.mark.parametrize(
    "pins, installed, branch",
    [
        ([], {}, 580),  # apt does not know it yet
        (["575", "580", "580.95.05", "590"], {}, 580),
        (["590", "610", "590.48.01"], {}, 590),  # Debian 13's repository
        (["580", "590", "610"], {"nvidia-driver-pinning-590": "590.48.01-1"}, 590),  # an older one came later
        (
            ["575", "580", "590"],
            {"nvidia-driver-pinning-575": "575.57.08-1"},
            580,
        ),  # the lock asks for more now
    ],
)
def test_the_branch_that_nvidias_repository_is_held_at(pins, installed, branch):
    names = [f"nvidia-driver-pinning-{pin}" for pin in pins]
    assert choices.pinned_branch(names, installed, 580) == branch


def test_kernels_that_a_reboot_brings():
    files = [
        f"/lib/modules/{kernel}/updates/dkms/nvidia.ko.xz" for kernel in ("6.1.0-9-amd64", "6.1.0-40-amd64")
    ]
    assert choices.newer_kernels(files, "6.1.0-18-amd64") == ["6.1.0-40-amd64"]
    assert choices.newer_kernels(files, "6.1.0-40-amd64") == []


def test_ubuntus_signed_modules_bring_the_newest_kernel_whole():
    installed = {
        "linux-image-generic": "6.8.0-60.63",
        "linux-modules-nvidia-580-server-open-generic": "6.8.0-60.63",
    }
    found = choose("ubuntu 24.04", secure_boot="on", installed=installed)["driver"]
    assert found["source"] == "installed" and found["kernel"] == [], "their version is the kernel's"
    del installed["linux-modules-nvidia-580-server-open-generic"]
    found = choose("ubuntu 24.04", secure_boot="on", installed=installed)["driver"]
    assert found["source"] == "distribution" and found["kernel"] == ["linux-image-generic"]
    assert choose("ubuntu 24.04", installed=installed)["driver"]["kernel"] == [], (
        "DKMS builds for the one that runs"
    )


def test_a_mirror_of_nvidias_repository_is_not_debian():
    """Whatever address a company gives it: it has a package of a name that Debian never had."""
    assert choose(candidates=NVIDIAS)["driver"]["source"] == "nvidia"


def test_nvidias_repository_beside_the_distributions_driver():
    """With host_cuda it is there for the toolkit."""
    ours = {"sources": ["nvidia"], "packages": ["nvidia-headless-580-server-open"]}
    assert choose("ubuntu 24.04", ours=ours)["driver"]["source"] == "distribution"


def test_headers_may_be_the_users():
    assert choose(settings={"driver_headers": False})["driver"]["headers"] == []


def test_debians_cloud_kernel_gets_its_own_headers():
    assert choose(kernel="6.1.0-40-cloud-amd64")["driver"]["headers"] == ["linux-headers-cloud-amd64"]
