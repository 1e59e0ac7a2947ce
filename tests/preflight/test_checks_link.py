"""Checks of the ways between host and GPUs and between the GPUs: each fails once for each thing it is there for."""

import dataclasses

import pytest

from recipe import hostenv
from recipe.preflight import link, measured_copies
from tests.preflight.situation import COPY, GOOD, PAIR, PAIRS, PATH, RANKS, SENSORS, context, found_broken

DIRECT = [pair | {"access": True} for pair in PAIRS]
NO_REDUCE = {"stage": "all_reduce", "error": "all_reduce: no answer within 40 s", "log": ""}
FAILED_STEP = {
    "stage": "shard_step", "error": "rank 1: loss after the sharded step is 0.31, unsharded 0.30",
    "all_reduce": RANKS["all_reduce"], "all_gather": RANKS["all_gather"], "settings": {},
}  # fmt: skip
SLOW = {"gib_per_second": 0.4, "seconds": 1.0}


def card(**changes) -> dict:
    return {"sensors": {"cards": [SENSORS, dataclasses.replace(SENSORS, index=1, **changes)]}}


BROKEN = {
    "narrow slot": (link.pcie, {"copies": {"cards": [COPY, COPY | {"index": 1, "width": 4}]}}, "warn",
                    "GPU 1: 4.0 x4 of 4.0 x16", "wider slot"),
    "old slot": (link.pcie, {"copies": {"cards": [COPY | {"generation": 1}]}}, "warn", "1.0 x8", "BIOS"),
    "replays": (link.pcie_errors, card(pcie_replays=5000), "warn", "5000 replays on GPU 1", "riser"),
    "slow copies": (link.host_copies, {"copies": {"cards": [COPY | {"pinned_from": 1.4}]}}, "warn", "1.4 GiB/s pinned",
                    "pcie link"),
    "slow memory": (link.host_copies, {"copies": {"cards": [COPY | {"pageable_to": 0.4}]}}, "warn", "0.4 not pinned",
                    "NUMA"),
    "copies die": (link.host_copies, {"copies": {"error": "the test process ended with -11"}}, "fail", "-11", "dmesg"),
    "damaged p2p": (link.peer_copies, {"peers": {"pairs": [DIRECT[0], DIRECT[1] | {"right": False}]}}, "warn",
                    "from GPU 1 to GPU 0 arrived damaged", "host.env now tells NCCL"),
    "hanging p2p": (link.peer_copies, {"peers": {"trying": "GPU 0 to GPU 1", "error": "no answer within 20 s"}}, "warn",
                    "did not end", "host.env"),
    "damaged on the way": (link.peer_copies, {"peers": {"pairs": [PAIR | {"right": False}]}}, "fail",
                           "through the host", "memtest86+"),
    "loose bridge": (link.nvlink, card(nvlinks_active=4), "warn", "0 links, 4 links", "bridge"),
    "acs": (link.acs, {"peers": {"pairs": DIRECT}, "host": {"gpu_paths": [PATH | {"acs_redirect": True}]}}, "warn",
            "ACS redirect on", "BIOS"),
    "iommu": (link.acs, {"peers": {"pairs": DIRECT}, "host": {"iommu": "translated"}}, "warn", "IOMMU translated",
              "iommu=pt"),
    "small window": (link.bar1, {"peers": {"pairs": DIRECT}, "host": {"gpu_paths": [PATH | {"bar1_gib": 0.25}]}}, "warn",
                     "0.25 GiB", "Resizable BAR"),
    "nccl hangs": (link.all_reduce, {"ranks": NO_REDUCE | {"log_file": "runs/nccl.log"}}, "fail", "no answer",
                   "runs/nccl.log has what NCCL said"),
    "slow nccl": (link.all_reduce, {"ranks": {"all_reduce": SLOW}}, "warn", "0.4 GiB/s", "topo -m"),
    "slow gather": (link.all_gather, {"ranks": {"all_gather": SLOW}}, "warn", "0.4 GiB/s", "topo -m"),
    "wrong gather": (link.all_gather, {"ranks": {"stage": "all_gather", "error": "3 of 9 are wrong", "settings": {},
                                                 "all_reduce": RANKS["all_reduce"]}}, "fail", "3 of 9", "NCCL_P2P_DISABLE"),
    "wrong step": (link.shard_step, {"ranks": FAILED_STEP}, "fail", "unsharded 0.30", "versions"),
}  # fmt: skip


@pytest.mark.parametrize(("check", "broken", "status", "found", "remedy"), BROKEN.values(), ids=BROKEN.keys())
def test_what_is_broken_is_found(check, broken, status, found, remedy, tmp_path, monkeypatch):
    found_broken(check, broken, status, found, remedy, tmp_path, monkeypatch)


@pytest.mark.parametrize("check", [*link.WITH_GPUS, *link.ALWAYS], ids=lambda check: check.__name__)
def test_what_was_not_measured_is_skipped_with_the_reason(check):
    why = {"skipped": "not measured with --quick"}
    measured = dict.fromkeys(("copies", "peers", "ranks", "sensors"), why)
    result = check(context(host="no probe", **measured))
    assert result.status == "skip" and result.found in (why["skipped"], "no probe")


def test_what_lies_behind_a_failure_is_skipped():
    hung = context(ranks=NO_REDUCE)
    assert link.all_gather(hung).found == link.shard_step(hung).found == "all-reduce failed before it"
    assert (
        link.all_reduce(context(ranks=FAILED_STEP)).status
        == link.all_gather(context(ranks=FAILED_STEP)).status
        == "ok"
    )


def test_without_peer_access_acs_and_a_small_window_do_not_matter():
    path = PATH | {"acs_redirect": True, "bar1_gib": 0.25}
    made = context(host={"gpu_paths": [path, path], "iommu": "translated"})
    assert link.acs(made).status == link.bar1(made).status == "ok"


def test_a_damaged_copy_ends_in_host_env_and_stays_until_it_is_measured_again(tmp_path):
    wrong = context(peers={"pairs": [DIRECT[0] | {"right": False}]})
    path = tmp_path / hostenv.FILE
    hostenv.write(tmp_path, GOOD, *measured_copies(wrong))
    assert hostenv.read(path)["NCCL_P2P_DISABLE"] == "1"
    assert "a copy from GPU 0 to GPU 1 arrived damaged" in path.read_text()
    before = path.read_text()
    hostenv.write(tmp_path, GOOD)  # as `python3 -m recipe.hostenv` does
    quick = context(peers={"skipped": "not measured with --quick"})
    hostenv.write(tmp_path, GOOD, *measured_copies(quick))
    assert path.read_text() == before
    hostenv.write(tmp_path, GOOD, *measured_copies(context(peers={"pairs": DIRECT})))
    assert "NCCL_P2P_DISABLE" not in hostenv.read(path)
