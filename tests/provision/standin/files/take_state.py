"""Runs on a host: print what a removal of everything has to bring back, as JSON (see tests/provision/standin/state.py)."""

import errno
import hashlib
import json
import os
import stat
import subprocess

FOLDERS = ("/etc", "/usr/local", "/usr/lib/systemd")


def lines(*command):
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()


def entry(path):
    """[kind, mode, owner, what it holds] of a file, folder or link."""
    status = os.lstat(path)
    if stat.S_ISLNK(status.st_mode):
        holds = os.readlink(path)
    elif stat.S_ISREG(status.st_mode):
        with open(path, "rb") as file:
            holds = hashlib.sha256(file.read()).hexdigest()
    else:
        holds = ""
    kind = stat.filemode(status.st_mode)[0]
    return [kind, f"{stat.S_IMODE(status.st_mode):o}", f"{status.st_uid}:{status.st_gid}", holds]


def files():
    found = {}
    for top in FOLDERS:
        for folder, folders, names in os.walk(top):
            for name in folders + names:
                path = os.path.join(folder, name)
                found[path] = entry(path)
    return found


def accounts():
    """The lines of the account files, by file and name."""
    found = {}
    for file in ("passwd", "group", "shadow", "gshadow"):
        with open(f"/etc/{file}") as text:
            found[file] = {line.split(":")[0]: line.rstrip("\n") for line in text}
    return found


def swapped_to(path):
    """Whether it is a device or file in use as swap: of a file the kernel then refuses to set the size."""
    if not os.path.isfile(path):
        return os.path.exists(path)
    try:
        os.truncate(path, os.path.getsize(path))
    except OSError as error:
        return error.errno == errno.ETXTBSY
    return False


def swaps():
    """Files and devices of this host that are swapped to; /proc/swaps shows those of other hosts under the same names."""
    with open("/proc/swaps") as text:
        paths = [line.split()[0].replace("\\040", " ") for line in text.readlines()[1:]]
    return sorted(set(filter(swapped_to, paths)))


with open("/proc/sys/vm/swappiness") as text:
    swappiness = text.read().strip()
format_ = "${binary:Package} ${Version} ${db:Status-Status}\\n"
print(
    json.dumps(
        {
            "packages": dict(line.split(" ", 1) for line in lines("dpkg-query", "-W", "-f", format_)),
            "installed by hand": dict.fromkeys(lines("apt-mark", "showmanual"), "yes"),
            "held": dict.fromkeys(lines("apt-mark", "showhold"), "yes"),
            "files": files(),
            "accounts": accounts(),
            "units": dict(
                line.split()[:2]
                for line in lines("systemctl", "list-unit-files", "--no-legend", "--no-pager", "--full")
            ),
            "swaps": dict.fromkeys(swaps(), "on"),
            "kernel settings": {"vm.swappiness": swappiness},
        }
    )
)
