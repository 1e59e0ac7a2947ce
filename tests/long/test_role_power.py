"""The role `power`: a limit that the cards allow, and a run that goes on by itself until it is finished."""

import re

import pytest

from tests.provision import standins
from tests.provision.plays import TWO_CARDS, provision, unprovision

pytestmark = [pytest.mark.docker, pytest.mark.provision, pytest.mark.slow]

LIMITS = "nvidia-smi --query-gpu=power.limit --format=csv,noheader"
THERE = "/home/owner/qlora-70b-recipe"
# In place of scripts/run.py, which would want the image or .venv: says how it was called and which signals come, and has
# a child, as compose or torchrun is one.
RUN = """
import os, pathlib, signal, subprocess, sys, time

if sys.argv[1] == "child":
    note = pathlib.Path("child")
else:
    note = pathlib.Path("called")
    child = subprocess.Popen([sys.executable, __file__, "child"], process_group=0)


def stop(number, frame):
    with note.open("a") as file:
        file.write(f" signal {number}")
    if sys.argv[1] != "child":
        time.sleep(1)  # saves
        file = pathlib.Path("child").read_text()
        note.write_text(note.read_text() + " saved")
        child.terminate()
        child.wait()
        sys.exit(130)
    sys.exit(1)


signal.signal(signal.SIGINT, stop)
signal.signal(signal.SIGTERM, stop)
note.write_text(f"{' '.join(sys.argv[1:])} as {os.getuid()} in {os.getcwd()}")
while True:
    time.sleep(0.1)
"""


def test_a_limit_for_every_card_now_and_after_a_reboot_and_the_cards_own_again(host):
    machine = host("bookworm")
    standins.kernel(machine)
    standins.gpus(machine, TWO_CARDS)
    provision(machine, "--tags", "driver")

    refused = provision(machine, "--tags", "power", check=False, power_limit_watts=400)
    said = "power_limit_watts is 400, GPU 0 allows 100.00 to 366.00 W; choose a value between; nothing was changed"
    assert said in " ".join(refused.stdout.split()), refused.stdout
    assert machine.run(LIMITS).stdout == "350.00 W\n350.00 W\n"
    assert machine.run("ls /etc/systemd/system/recipe-power.service", check=False).returncode != 0

    first = provision(machine, "--tags", "power", power_limit_watts=280)
    assert "GPU 1: limit 280 W of 350.00 W, 35 °C now" in first.stdout
    assert machine.run(LIMITS).stdout == "280.00 W\n280.00 W\n"
    second = provision(machine, "--tags", "power", power_limit_watts=280)
    assert second.recap["changed"] == 0, second.tasks_changed

    machine.run("rm /opt/standin/power/*")  # a start of the machine forgets it
    machine.reboot()
    assert machine.run(LIMITS).stdout == "280.00 W\n280.00 W\n"

    unprovision(machine, "--tags", "power")
    assert machine.run(LIMITS).stdout == "350.00 W\n350.00 W\n"
    assert machine.run("ls /etc/systemd/system | grep recipe-power", check=False).stdout == ""


def test_a_run_goes_on_after_a_reboot_until_it_is_finished(host):
    machine = host("trixie")
    machine.put(f"{THERE}/scripts/run.py", RUN)
    machine.put(f"{THERE}/runs/first/config.yaml", "")
    machine.run(f"mkdir {THERE}/models; chown -R owner: {THERE}")
    provision(machine, "--tags", "power", power_resume_run="first")
    second = provision(machine, "--tags", "power", power_resume_run="first")
    assert second.recap["changed"] == 0, second.tasks_changed
    checked = machine.run(
        "systemd-analyze verify /etc/systemd/system/recipe-resume@.service 2>&1 | grep recipe-", check=False
    )
    assert checked.stdout == ""
    assert machine.run(f"ls {THERE}").stdout.split() == ["models", "runs", "scripts"], (
        "nothing was started yet"
    )

    machine.reboot()
    assert machine.run("systemctl is-active recipe-resume@first").stdout == "active\n"
    machine.run(f"for i in 1 2 3 4 5 6 7 8 9; do [ -e {THERE}/child ] && break; sleep 0.3; done")
    called = f"train --config runs/first/config.yaml --run first as 1000 in {THERE}"
    assert machine.read(f"{THERE}/called") == called
    main = machine.run("systemctl show --property MainPID --value recipe-resume@first").stdout.strip()
    locked = re.search(r"Max locked memory +(\S+)", machine.read(f"/proc/{main}/limits"))
    assert locked and locked[1] in ("unlimited", "8388608")  # where the lab's root may not raise it
    assert (
        machine.run("systemctl show --property LimitMEMLOCK --value recipe-resume@first").stdout
        == "infinity\n"
    )

    machine.run("systemctl stop recipe-resume@first")
    assert machine.read(f"{THERE}/called") == f"{called} signal 2 saved"
    assert " signal 2" not in machine.read(f"{THERE}/child"), "that is the first process's to tell"
    assert machine.run("systemctl is-failed recipe-resume@first", check=False).stdout == "inactive\n"

    machine.run(f"rm {THERE}/called; touch {THERE}/runs/first/summary.json")
    machine.reboot()
    assert (
        machine.run("systemctl show --property ConditionResult --value recipe-resume@first").stdout == "no\n"
    )
    assert machine.run(f"ls {THERE}/called", check=False).returncode != 0

    unprovision(machine, "--tags", "power")
    left = machine.run("ls -R /etc/systemd/system | grep recipe-resume", check=False).stdout
    assert left == ""
