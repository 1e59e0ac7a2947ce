"""The role `project`: this commit on the host and nothing of the user's lost, folders on other disks, a token nobody sees."""

import shutil
import subprocess

import pytest

from tests.provision.lab import ROOT
from tests.provision.plays import settings

pytestmark = [pytest.mark.docker, pytest.mark.provision, pytest.mark.slow]

THERE = "/home/owner/qlora-70b-recipe"
TOKEN = "hf_aVerySecretTokenOfNobody"


def git(folder, *arguments):
    author = ["-c", "user.name=owner", "-c", "user.email=owner@example.org"]
    return subprocess.check_output(["git", "-C", folder, *author, *arguments], text=True).strip()


@pytest.fixture
def mine(tmp_path):
    """A checkout on this side, with the playbook as it is now, whose commits this test makes."""
    folder = tmp_path / "mine"
    subprocess.run(["git", "clone", "--quiet", "--shared", ROOT, folder], check=True)
    shutil.rmtree(folder / "ansible")
    shutil.copytree(
        ROOT / "ansible",
        folder / "ansible",
        ignore=shutil.ignore_patterns(".venv", ".ansible", "inventory.hosts.ini"),
    )
    return folder


def provision(host, mine, *options, check=True, **more):
    extra = settings(host.mirror, host.release, **more)
    return host.play(mine / "ansible/provision.yml", "--tags", "project", *options, extra=extra, check=check)


def words(text):
    """As it was before Ansible broke its lines."""
    return " ".join(text.split())


def test_this_commit_is_brought_and_work_on_the_host_is_never_overwritten(host, mine):
    machine, models = host("bookworm"), "/mnt/disk/models"

    def on_host(command):
        return machine.run(f"cd {THERE} && {command}", user="owner").stdout.strip()

    # A model lies in the checkout, and another folder is asked for.
    machine.run(
        f"mkdir -p {THERE}/models/a {THERE}/runs && chown -R owner: {THERE} && echo model >{THERE}/models/a/b"
    )
    refused = provision(machine, mine, check=False, models_folder=models)
    said = f"{THERE}/models is a folder with files, expected a link to {models} (models_folder) or nothing; move what"
    assert said in words(refused.stdout), refused.stdout
    assert on_host("cat models/a/b") == "model" and machine.run(f"ls {models}", check=False).returncode != 0
    assert on_host("git rev-parse HEAD") == git(mine, "rev-parse", "HEAD")
    assert on_host("git status --porcelain") == ""

    # Moved there, in what is left of it; the token, in all that the play can say.
    machine.run(
        f"mkdir -p /mnt/disk && mv {THERE}/models {models} && mkdir {THERE}/models && chown owner: {THERE}/models"
    )
    first = provision(machine, mine, "-vvv", "--diff", models_folder=models, project_hf_token=TOKEN)
    assert (
        on_host("readlink models && cat models/a/b && stat -c '%F %U' runs")
        == f"{models}\nmodel\ndirectory owner"
    )
    file = "/home/owner/.cache/huggingface/token"
    assert machine.run(f"stat -c '%a %U:%G' {file}; cat {file}").stdout == f"600 owner:owner\n{TOKEN}"
    assert TOKEN not in first.stdout + first.stderr
    assert (
        machine.run(
            f"journalctl --sync; journalctl | grep -c {TOKEN}; grep -rl {TOKEN} /tmp /var", check=False
        ).stdout
        == "0\n"
    )
    second = provision(machine, mine, models_folder=models, project_hf_token=TOKEN)
    assert second.recap["changed"] == 0, second.tasks_changed
    assert machine.run(f"ls -d {THERE}.bundle /home/owner/.ansible/tmp/*", check=False).stdout == ""

    # A new commit changes what the user has changed too.
    (mine / "README.md").write_text("another\n")
    git(mine, "commit", "--quiet", "--message", "Another", "README.md")
    on_host("echo theirs >README.md; echo theirs >notes")
    refused = provision(machine, mine, check=False, models_folder=models)
    new = git(mine, "rev-parse", "HEAD")
    said = f"{THERE}: {new[:10]} would overwrite files that were changed there (README.md); commit them, `git stash` them"
    assert said in words(refused.stdout), refused.stdout
    assert on_host("cat README.md notes") == "theirs\ntheirs" and on_host("git rev-parse HEAD") != new

    # Kept as a commit, it is not left without a name either.
    on_host("git -c user.name=owner -c user.email=owner@example.org commit --quiet --all --message Theirs")
    theirs = on_host("git rev-parse HEAD")
    refused = provision(machine, mine, check=False, models_folder=models)
    assert f"{THERE}: the commit {theirs[:10]} is on no branch and would be lost" in words(refused.stdout)
    assert on_host("git rev-parse HEAD") == theirs
    on_host("git branch theirs")
    provision(machine, mine, models_folder=models)
    assert on_host("git rev-parse HEAD theirs; cat README.md notes") == f"{new}\n{theirs}\nanother\ntheirs"

    # What is taken back is not the user's work.
    machine.play("unprovision.yml", "--tags", "project", extra=settings(machine.mirror, "bookworm"))
    assert on_host("git rev-parse HEAD; cat models/a/b") == f"{new}\nmodel" and machine.read(file) == TOKEN


def test_for_another_user_than_the_one_who_logs_in(host, mine):
    """Whose files sudo's owner may not touch; a bare Debian has no `setfacl` for Ansible to help itself with."""
    machine, there = host("trixie"), "/home/guest/qlora-70b-recipe"
    machine.run("mkdir -p /srv/models /srv/runs/theirs && chmod 2775 /srv/runs")
    mounted = {"models_folder": "/srv/models", "runs_folder": "/srv/runs"}
    refused = provision(machine, mine, check=False, project_user="guest", project_hf_token=TOKEN, **mounted)
    said = "/srv/runs is not empty, and guest may not write there; `sudo chown -R guest /srv/runs`"
    assert said in words(refused.stdout), refused.stdout
    machine.run("chown -R guest /srv/runs")
    provision(machine, mine, project_user="guest", project_hf_token=TOKEN, **mounted)
    wrong = f"find {there} /home/guest/.cache ! -user guest"
    assert machine.run(wrong).stdout == ""
    assert machine.run(f"git -C {there} rev-parse HEAD", user="guest").stdout.strip() == git(
        mine, "rev-parse", "HEAD"
    )
    assert machine.run("stat -c '%a %U' /srv/models /srv/runs").stdout == "755 guest\n2775 guest\n"
