"""What library/machine.py says of GPUs before there is a driver: names, links and IOMMU groups from the PCI bus."""

import re

import pytest

from tests.provision.fake_root import GIB, nvidia_device, tree

# isort: split
from ansible.module_utils import gpu_table, machine_gpus
from ansible.module_utils.hardware import Gpu


def test_two_cards_of_a_bare_host_by_their_ids(tmp_path):
    nvidia_device(tmp_path, "0000:01:00.0", "2204", boot_vga="1")
    nvidia_device(tmp_path, "0000:02:00.0", "2b85", port="0000:00:02.0", port_width=4, bar_bytes=32 * GIB)
    nvidia_device(
        tmp_path, "0000:02:00.1", "22e8", port="0000:00:02.0", port_width=4, pci_class="0x040300"
    )  # its sound
    first, second = machine_gpus.gpus(tmp_path)
    assert first == {
        "address": "0000:01:00.0",
        "device_id": "2204",
        "name": "NVIDIA GeForce RTX 3090",
        "memory_gib": 24,
        "architecture": "Ampere",
        "driver": None,
        "link_width": 16,
        "link_width_max": 16,
        "link_generation": 1,
        "link_generation_max": 4,
        "bar_gib": 0.25,
        "iommu_group": None,
        "iommu_group_size": None,
        "boot_vga": True,
        "open_modules": "possible",
    }
    assert (second["name"], second["open_modules"], second["bar_gib"]) == (
        "NVIDIA GeForce RTX 5090",
        "needed",
        32,
    )
    assert second["link_width_max"] == 4  # the slot's, not the card's


def test_cards_without_a_display_count_too(tmp_path):
    nvidia_device(tmp_path, "0000:01:00.0", "2330", pci_class="0x030200")
    assert machine_gpus.gpus(tmp_path)[0]["name"] == "NVIDIA H100 80GB HBM3"


def test_an_unknown_card_is_named_by_its_id_or_by_the_pci_database(tmp_path):
    nvidia_device(tmp_path, "0000:01:00.0", "26b7")
    gpu = machine_gpus.gpus(tmp_path)[0]
    assert (gpu["name"], gpu["memory_gib"], gpu["architecture"]) == ("NVIDIA device 10de:26b7", None, "Ada")
    tree(
        tmp_path,
        {
            "usr/share/misc/pci.ids": "# a comment\n1002  AMD\n\t26b7  no card\n10de  NVIDIA Corporation\n"
            "\t26b5  AD102GL [L40]\n\t26b7  AD102GL [L20X]\n\t\t10de 1  a board\n"
        },
    )
    assert machine_gpus.gpus(tmp_path)[0]["name"] == "NVIDIA L20X"


def test_the_drivers_word_about_memory_counts_more_than_the_table(tmp_path):
    nvidia_device(tmp_path, "0000:01:00.0", "1e07", driver="nvidia")
    nvidia_device(tmp_path, "0000:02:00.0", "2204", driver="vfio-pci")
    seen = Gpu(0, "NVIDIA GeForce RTX 2080 Ti", 22.0, 21.9, (7, 5), "580.95.05")
    rebuilt, passed = machine_gpus.gpus(tmp_path, [seen])
    assert (rebuilt["memory_gib"], passed["memory_gib"], passed["driver"]) == (22, 24, "vfio-pci")


def test_on_wsl2_the_cards_are_those_that_nvidia_smi_lists(tmp_path):
    seen = Gpu(0, "NVIDIA GeForce RTX 4090", 23.99, 22.0, (8, 9), "580.95", "GPU-abc")
    gpu = machine_gpus.gpus(tmp_path, [seen])[0]
    assert (gpu["address"], gpu["architecture"], gpu["open_modules"]) == ("GPU-abc", "Ada", "possible")
    nvidia_device(tmp_path / "bus", "0000:01:00.0", "2204")
    assert gpu.keys() == machine_gpus.gpus(tmp_path / "bus")[0].keys()


@pytest.mark.parametrize(
    "device_id, name, modules",
    [
        (0x1B06, "Pascal", "impossible"),  # GTX 1080 Ti
        (0x1DB6, "Volta", "impossible"),  # V100
        (0x2182, "Turing", "possible"),  # GTX 1660 Ti
        (0x20B5, "Ampere", "possible"),  # A100
        (0x2236, "Ampere", "possible"),  # A10
        (0x2330, "Hopper", "possible"),
        (0x2484, "Ampere", "possible"),  # RTX 3070
        (0x2684, "Ada", "possible"),
        (0x2901, "Blackwell", "needed"),  # B200
        (0x2F04, "Blackwell", "needed"),  # RTX 5070
        (0x3182, "Blackwell", "needed"),  # B300
        (0x3040, "newer", "needed"),
        (0x0FC6, "older", "impossible"),  # GTX 650
    ],
)
def test_architectures_by_id(device_id, name, modules):
    assert gpu_table.architecture(device_id) == name
    assert gpu_table.open_modules(name) == modules


def test_the_table_agrees_with_itself():
    """A name tells its generation, and the id must lie in that generation's range."""
    generations = {
        r"GeForce GTX 10|P40": "Pascal",
        r"V100|TITAN V": "Volta",
        r"GeForce RTX 20|GeForce GTX 16|Quadro RTX|T4$|TITAN RTX": "Turing",
        r"GeForce RTX 30|NVIDIA A\d|RTX A\d": "Ampere",
        r"H100|H200": "Hopper",
        r"GeForce RTX 40|Ada Generation|NVIDIA L\d": "Ada",
        r"GeForce RTX 50|Blackwell|B200": "Blackwell",
    }
    for device_id, (name, memory) in gpu_table.CARDS.items():
        told = [generation for words, generation in generations.items() if re.search(words, name)]
        assert told == [gpu_table.architecture(device_id)], name
        assert memory is None or 4 <= memory <= 192, name
    assert gpu_table.card(0x1E30, 0x129E) == ("Quadro RTX 8000", 48)
    assert gpu_table.card(0x2D04) == ("NVIDIA GeForce RTX 5060 Ti", None)  # 8 or 16 GB
    assert gpu_table.card(0x9999) == (None, None)


def test_iommu_groups(tmp_path):
    assert machine_gpus.iommu(tmp_path, []) == {"enabled": False, "acs_separated": None}
    nvidia_device(tmp_path, "0000:01:00.0", "2230", group=12)
    nvidia_device(tmp_path, "0000:02:00.0", "2230", group=13, port="0000:00:02.0")
    gpus = machine_gpus.gpus(tmp_path)
    assert (gpus[0]["iommu_group"], gpus[0]["iommu_group_size"]) == ("12", 1)
    assert machine_gpus.iommu(tmp_path, gpus) == {"enabled": True, "acs_separated": True}
    assert machine_gpus.iommu(tmp_path, gpus[:1])["acs_separated"] is None
    together = [gpu | {"iommu_group": "1"} for gpu in gpus]
    assert machine_gpus.iommu(tmp_path, together)["acs_separated"] is False


def test_nouveau(tmp_path):
    nvidia_device(tmp_path, "0000:01:00.0", "2204", driver="nouveau")
    (tmp_path / "sys/module/nouveau").mkdir(parents=True)
    found = machine_gpus.nouveau(tmp_path, machine_gpus.gpus(tmp_path))
    assert found == {"loaded": True, "bound": ["0000:01:00.0"]}
