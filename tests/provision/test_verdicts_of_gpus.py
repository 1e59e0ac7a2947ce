"""What ansible/judging/gpus.py says of GPUs and driver: each check once good and once bad."""

from tests.provision.verdict_cases import PLAN, UBUNTU_22, one, rows

# --- the GPUs -------------------------------------------------------------------------------------------


def test_no_gpu():
    status, words = one("gpu", {"gpus": []})
    assert status == "fail" and "none on the PCI bus" in words and "`-e gpus_wanted=0`" in words
    status, words = one("gpu", {"gpus": [], "amd_gpu": True})
    assert status == "fail" and "only AMD's" in words
    status, words = one("gpu", {"gpus": [], "wsl2": True})
    assert status == "fail" and "in Windows" in words


def test_no_gpu_wanted_asks_nothing_of_gpus_and_driver():
    found = rows(
        {"gpus": [], "driver.runfile": True}, {"driver.source": "none"}, settings={"gpus_wanted": "0"}
    )
    assert found["gpu"]["status"] == "ok"
    assert not found.keys() & {"gpu memory", "gpu link", "driver", "nouveau", "kernel modules", "iommu"}


def test_one_gpu_goes_on_with_the_plans_figures():
    one_card = {"gpus": UBUNTU_22["gpus"][:1]}
    plan = PLAN | {
        "world_size": 1,
        "ram_needed_gib": 40.2,
        "placement": {"offload_layers": 45, "away_layers": 0},
    }
    status, words = one("gpu", one_card, plan=plan)
    assert status == "warn" and "(40 GiB of RAM needed, 314 tokens/s predicted)" in words
    assert one("gpu", one_card, plan=None)[0] == "warn"
    small = PLAN | {"world_size": 1}
    assert one("gpu", one_card, plan=small)[0] == "ok"  # a model that fits the card
    assert one("gpu", one_card, settings={"gpus_wanted": 2})[0] == "fail"


def test_two_gpus():
    assert one("gpu")[1].startswith("2 × NVIDIA GeForce RTX 3090;")
    status, words = one("gpu", settings={"gpus_wanted": 4})
    assert status == "fail" and "at least 4 NVIDIA GPUs" in words and "`-e gpus_wanted=2`" in words


def test_passed_through_cards():
    both = {"gpus.0.driver": "vfio-pci", "gpus.1.driver": "vfio-pci"}
    status, words = one("gpu", both)
    assert status == "fail" and "passed through to virtual machines" in words
    status, words = one("gpu", {"gpus.0.driver": "vfio-pci"})
    assert status == "warn" and "1 more passed through" in words


def test_gpu_generation():
    old = {"gpus.0.architecture": "Pascal", "gpus.0.name": "Tesla P40"}
    status, words = one("gpu generation", old)
    assert status == "warn" and "Tesla P40 (Pascal): CUDA 13 has no code" in words
    assert one("gpu generation", old | {"gpus.1.architecture": "Volta"})[0] == "fail"
    assert one("gpu generation")[0] == "ok"


def test_gpu_memory():
    assert one("gpu memory")[0] == "ok"
    status, words = one("gpu memory", {"gpus.1.memory_gib": 12})
    assert status == "fail" and "12 GiB the smallest, 36 in all; 24.0 GiB on each" in words
    reasons = ["GPU memory: 24.0 GiB needed on each GPU, 12.0 there", "disk: …"]
    ways = [{"change": "1 more GPU of 12 GiB"}, {"change": "GPUs with 16 GiB"}]
    plan = PLAN | {"reasons": reasons, "ways": ways}
    words = one("gpu memory", {"gpus.1.memory_gib": 12}, plan=plan)[1]
    assert words.endswith("12.0 there; would fit: 1 more GPU of 12 GiB, or GPUs with 16 GiB")
    assert one("gpu memory", {"gpus.1.memory_gib": None})[0] == "skip"
    assert one("gpu memory", plan=None)[0] == "ok"


def test_gpu_link():
    assert one("gpu link")[0] == "ok"
    status, words = one("gpu link", {"gpus.1.link_width_max": 1, "gpus.1.link_generation_max": 2})
    assert status == "warn" and "0000:02:00.0 PCIe 2.0 x1" in words and "x4 and PCIe 3.0" in words
    assert one("gpu link", {"gpus.1.link_generation_max": 2})[0] == "warn"
    unknown = {f"gpus.{i}.link_{what}_max": None for i in (0, 1) for what in ("width", "generation")}
    assert one("gpu link", unknown)[0] == "skip"


def test_resizable_bar():
    assert one("resizable bar")[0] == "ok"
    status, words = one("resizable bar", {"gpus.1.bar_gib": 0.25})
    assert status == "warn" and "Above 4G Decoding" in words
    assert "resizable bar" not in rows({"gpus.0.bar_gib": None, "gpus.1.bar_gib": None})


def test_iommu():
    assert "no P2P to lose" in one("iommu")[1]
    status, words = one("iommu", {"gpus.0.name": "NVIDIA RTX A6000"})
    assert status == "warn" and "P2P between cards goes through the CPU" in words
    assert one("iommu", {"gpus.0.name": "NVIDIA RTX A6000", "iommu.acs_separated": False})[0] == "ok"
    assert one("iommu", {"gpus.0.name": "NVIDIA RTX A6000", "iommu.enabled": False})[0] == "ok"


# --- the driver -----------------------------------------------------------------------------------------


def test_secure_boot():
    on = {"secure_boot": "on"}
    status, words = one("secure boot", on)
    assert status == "fail" and "`-e checks_mok=true`" in words and "Ubuntu's signed" in words
    assert "`sudo mokutil --import /var/lib/shim-signed/mok/MOK.der`" in words and "Enroll MOK" in words
    debian = on | {"release.id": "debian", "release.version": "13"}
    status, words = one("secure boot", debian)
    assert "Ubuntu" not in words and "`sudo mokutil --import /var/lib/dkms/mok.pub`" in words
    status, words = one("secure boot", debian, settings={"mok": "true"})
    assert status == "warn" and "it goes on: once they are built, `sudo mokutil --import" in words
    for signed in ({"driver.source": "installed"}, {"driver.signed": True}, {"driver.dkms": False}):
        assert one("secure boot", on, signed)[0] == "ok"
    assert one("secure boot")[1].startswith("off") and "EFI" in one("secure boot", {"secure_boot": "none"})[1]


def test_a_runfiles_driver():
    status, words = one("driver", {"driver.runfile": True, "driver.loaded": "570.1"})
    assert (
        status == "fail"
        and "570.1 that NVIDIA's .run installer put here" in words
        and "`sudo nvidia-uninstall`" in words
    )


def test_a_runfiles_driver_that_is_new_enough_stays():
    """Such as a patched one, with which GeForce cards read each other's memory."""
    there = {"driver.runfile": True, "driver.loaded": "580.95.05"}
    for source in ("installed", "none"):
        status, words = one("driver", there, {"driver.source": source})
        assert status == "warn" and "it goes on with that one" in words, words
    status, words = one("driver", there, {"driver.source": "nvidia"})
    assert status == "fail" and "apt's driver would overwrite half of it" in words


def test_a_held_old_driver():
    held = {
        "installed": {"nvidia-driver-535": "535.183.01-0ubuntu1"},
        "held": ["nvidia-driver-535", "docker.io"],
    }
    status, words = one("driver", held)
    assert status == "fail" and "`sudo apt-mark unhold nvidia-driver-535`" in words
    assert (
        one("driver", {"installed": {"nvidia-driver-580": "580.1"}, "held": ["nvidia-driver-580"]})[0] == "ok"
    )


def test_ubuntus_signed_driver_that_is_there_is_not_to_come():
    """The version of its modules' package is the kernel's."""
    names = ["linux-modules-nvidia-580-server-open-generic", "nvidia-headless-no-dkms-580-server-open"]
    there = {
        "driver.loaded": "580.95.05",
        "installed": {names[0]: "6.8.0-60.63", names[1]: "580.95.05-0ubuntu1"},
    }
    assert one("driver", there, {"driver.packages": names}) == ("ok", "580.95.05 is loaded; ; ")
    newer = [name.replace("580", "590") for name in names]
    assert "to come" in one("driver", there | {"driver.loaded": None}, {"driver.packages": newer})[1]


def test_driver_there_to_come_or_neither():
    assert one("driver") == ("ok", "none is loaded, branch 580 of Ubuntu 22.04.5 LTS to come; ; ")
    status, words = one("driver", {"driver.loaded": "535.183.01"}, {"driver.source": "nvidia"})
    assert (
        status == "warn"
        and "535.183.01 is loaded, branch 580 or the next of NVIDIA's repository to come" in words
    )
    assert "a reboot follows" in words
    old = one("driver", {"driver.loaded": "535.1"}, settings={"reboot": "no"})
    assert old[0] == "warn" and "reboot=no" in old[1]
    status, words = one(
        "driver", {"driver.loaded": "535.1"}, {"driver.source": "none", "driver.why": "driver_source is none"}
    )
    assert status == "fail" and "driver_source is none" in words
    assert one("driver", {}, {"driver.branch": 535})[0] == "fail"
    assert one("driver", {}, {"driver.source": "installed"})[0] == "warn"  # installed, not loaded


def test_nvidia_smis_complaint():
    machine = {"driver.loaded": "580.95.05", "driver.smi_error": "nvidia-smi ended with 18: version mismatch"}
    status, words = one("driver", machine, {"driver.source": "installed"})
    assert status == "warn" and "version mismatch" in words and "reboot" in words


def test_foreign_sources():
    machine = {"driver.foreign_sources": ["/etc/apt/sources.list.d/cuda.list"]}
    status, words = one("driver sources", machine)
    assert (
        status == "warn"
        and "`sudo mv /etc/apt/sources.list.d/cuda.list /etc/apt/sources.list.d/cuda.list.off`" in words
    )
    assert "driver sources" not in rows(machine, {"driver.source": "none"})


def test_kernel_modules():
    assert one("kernel modules")[0] == "ok"
    status, words = one(
        "kernel modules", {"gpus.0.open_modules": "needed"}, {"driver.modules": "proprietary"}
    )
    assert status == "fail" and "`-e driver_modules=open`" in words
    assert one("kernel modules", {"gpus.0.open_modules": "impossible"})[0] == "fail"
    assert "kernel modules" not in rows({"gpus": []})


def test_nouveau():
    assert one("nouveau")[0] == "warn"
    status, words = one("nouveau", settings={"reboot": "no"})
    assert status == "fail" and "`-e reboot=yes`" in words
    assert one("nouveau", {"nouveau.bound": []})[0] == "ok"
    assert one("nouveau", {}, {"driver.source": "none"})[0] == "ok"


def test_desktop():
    assert "desktop" not in rows()
    on = {"desktop": {"active": True, "manager": "gdm3"}}
    status, words = one("desktop", on)
    assert (
        status == "warn"
        and "gdm3 draws on NVIDIA GeForce RTX 3090 at 0000:01:00.0" in words
        and "0.3 to 1 GiB" in words
        and "`-e checks_allow_desktop=true`" in words
    )
    assert one("desktop", on, settings={"allow_desktop": True})[0] == "ok"
    assert one("desktop", on | {"gpus.0.boot_vga": False})[0] == "ok"
