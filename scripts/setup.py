"""Set up .venv: the locked packages and this project, for an NVIDIA GPU or for the CPU.

    make setup                          # does nothing when all is as locked
    make setup FLAVOUR=cpu              # cpu or gpu; else: gpu if this machine has an NVIDIA GPU
    make setup PYTHON=/path/to/python3  # which Python (3.11 to 3.14) the .venv is made of
    make setup TORCH_INDEX=URL          # a mirror of PyTorch's CPU index

Needs nothing but Python's standard library, and starts on Python 3.6, so that it can say what is missing.
Exit codes: 0 ready; 2 this machine or its settings have to change first (one line says what); 1 pip failed in
a way not foreseen here (its last lines are shown); 130, 143 stopped by a signal.
"""

import hashlib
import json
import os
import re
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCKS = {"cpu": "requirements-cpu.lock", "gpu": "requirements-gpu.lock"}
DEFAULT_TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
OLDEST_PYTHON, NEWEST_PYTHON = (3, 11), (3, 14)

LAYOUT = 1  # raise it when set-up comes to do something that an existing .venv lacks

# Measured: .venv (1.7 and 5.6 GB), what pip keeps beside it while it installs, and the copy in pip's cache.
DISK_GIB = {"cpu": 2.5, "gpu": 12.0}
DOWNLOAD = {"cpu": "0.2 GB beside torch", "gpu": "2.5 GB beside torch"}
DURATION = {"cpu": "1 to 3 minutes", "gpu": "3 to 10 minutes"}


class SetupError(Exception):
    """Something that stops the set-up: one line for the user, and the exit code."""

    def __init__(self, message, code=2):
        super().__init__(message)
        self.code = code


WHO = "setup"  # who speaks; other scripts put their name


def say(message):
    print(WHO + ": " + message, file=sys.stderr, flush=True)


# --- what this machine is ---------------------------------------------------------------------------------


def check_platform(system=None, machine=None, libc=None):
    """Refuse what torch with CUDA and bitsandbytes are not built for."""
    import platform

    system = system or platform.system()
    machine = machine or platform.machine()
    if system != "Linux":
        hint = (
            "use WSL2 on Windows"
            if system == "Windows"
            else "use a Linux machine, or a Linux VM for the CPU demo"
        )
        name = {"Darwin": "macOS"}.get(system, system)
        raise SetupError(f"{name} is not supported, Linux on x86_64 or aarch64 is needed: {hint}")
    if machine not in ("x86_64", "aarch64"):
        raise SetupError(f"processor {machine} is not supported: torch is built for x86_64 and aarch64")
    libc = platform.libc_ver()[0] if libc is None else libc
    if libc != "glibc":
        raise SetupError(
            "this Linux has no glibc (Alpine?): torch is built for glibc distributions, such as Debian"
        )


def has_nvidia_gpu(sysroot="/"):
    """Whether the driver, the PCI bus or (in WSL2, which shows neither) nvidia-smi names an NVIDIA GPU."""
    base = Path(sysroot)
    if (base / "proc/driver/nvidia/version").exists():
        return True
    for device in (base / "sys/bus/pci/devices").glob("*"):
        try:
            vendor, kind = (device / "vendor").read_text(), (device / "class").read_text()
        except OSError:
            continue
        if vendor.strip() == "0x10de" and kind.startswith("0x03"):  # NVIDIA, display controller
            return True
    if (base / "dev/dxg").exists():
        import subprocess

        tool = str(base / "usr/lib/wsl/lib/nvidia-smi")
        return (
            os.path.exists(tool) and subprocess.run([tool, "-L"], stdout=subprocess.DEVNULL).returncode == 0
        )
    return False


def wanted_flavour(environ):
    flavour = environ.get("FLAVOUR", "")
    if flavour not in ("", "cpu", "gpu"):
        raise SetupError(f"FLAVOUR={flavour}: expected cpu or gpu")
    return flavour or ("gpu" if has_nvidia_gpu() else "cpu")


PROBE = """
import importlib.util, sys
missing = [m for m in ("venv", "ensurepip") if importlib.util.find_spec(m) is None]
print(*sys.version_info[:3], ",".join(missing) or "-", sys.executable)
"""


def probe_python(path):
    """(version, missing modules, real path) of a Python, or None when it does not run."""
    import subprocess

    try:
        done = subprocess.run([path, "-c", PROBE], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    except OSError:
        return None
    words = done.stdout.decode().split(None, 4)
    if done.returncode or len(words) != 5:
        return None
    return tuple(int(word) for word in words[:3]), words[3].replace("-", ""), words[4].strip()


def find_python(asked=None, candidates=None, probe=probe_python):
    """The Python for .venv: the one asked for, else this one if able, else the newest able one on PATH."""
    if asked:
        candidates = [asked]
    elif candidates is None:
        candidates = [sys.executable, "python3.14", "python3.13", "python3.12", "python3.11"]
    found = [answer for answer in map(probe, candidates) if answer]
    if not found:
        raise SetupError(f"PYTHON={candidates[0]}: this does not run as a Python")
    fitting = [answer for answer in found if OLDEST_PYTHON <= answer[0][:2] <= NEWEST_PYTHON]
    for version, missing, path in fitting:
        if not missing:
            return version, path
    if fitting:
        version, missing, path = fitting[0]
        raise SetupError(
            f"Python {version[0]}.{version[1]} ({path}) lacks {missing}: on Debian and Ubuntu, "
            f"`sudo apt install python3-venv` (or python{version[0]}.{version[1]}-venv) brings it"
        )
    version, _, path = found[0]
    raise SetupError(
        "found Python {}.{}.{} ({}), needed is 3.11 to 3.14: install one (`sudo apt install python3.11 "
        "python3.11-venv`) or name it with PYTHON=/path/to/python3".format(*version, path)
    )


def go_on_in_a_new_python(who):
    """For scripts that need Python 3.11: where this one is older, become the newest that is there, or say what is missing."""
    if sys.version_info[:2] < OLDEST_PYTHON:
        try:
            os.execv(find_python(os.environ.get("PYTHON"))[1], ["python3", *sys.argv])
        except SetupError as error:
            print(who + ": " + str(error), file=sys.stderr)
            sys.exit(error.code)


def check_disk(folder, flavour, free_bytes=None):
    import shutil

    free_gib = (shutil.disk_usage(str(folder)).free if free_bytes is None else free_bytes) / 2**30
    if free_gib < DISK_GIB[flavour]:
        raise SetupError(
            f"{folder} has {free_gib:.1f} GiB free, the {flavour.upper()} packages need "
            f"{DISK_GIB[flavour]:.1f} GiB: make room or clone onto a larger disk"
        )


# --- the stamp: what is installed -------------------------------------------------------------------------


def fingerprint(wanted, root=ROOT):
    """What a finished set-up depends on; the stamp in .venv repeats it."""
    digest = hashlib.sha256()
    for name in sorted(LOCKS.values()):
        digest.update((root / name).read_bytes())
    return {"locks": digest.hexdigest(), "wanted": wanted, "root": str(root), "layout": LAYOUT}


def finished(wanted, root=ROOT, asked=None):
    """Whether .venv is exactly what set-up would make now, of the Python asked for if one is."""
    try:
        stamp = json.loads((root / ".venv/setup.json").read_text())
        # A distribution upgrade replaces the Python that .venv points to.
        same_python = os.path.realpath(str(root / ".venv/bin/python")) == stamp.pop("python")
        same_python &= stamp.pop("asked") == asked or not asked
        return (
            same_python
            and os.path.exists(str(root / ".venv/bin/recipe"))
            and stamp == fingerprint(wanted, root)
        )
    except (OSError, ValueError, KeyError):
        return False


def write_stamp(wanted, root=ROOT, asked=None):
    python = os.path.realpath(str(root / ".venv/bin/python"))
    stamp = dict(fingerprint(wanted, root), python=python, asked=asked)
    part = root / ".venv/setup.json.part"
    part.write_text(json.dumps(stamp, indent=1))
    os.replace(str(part), str(root / ".venv/setup.json"))


# --- pip --------------------------------------------------------------------------------------------------


def host_of(url):
    from urllib.parse import urlsplit

    return urlsplit(url).hostname or url


def explain(lines, lock_name):
    """One line for what stopped pip, from its output; None when it is nothing known."""
    text = "\n".join(lines)
    mismatch = re.search(
        r"DO NOT MATCH THE HASHES.*?\n\s+(\S+)(?: from (\S+))?.*?Got\s+(\w+)", text, re.DOTALL
    )
    if mismatch:
        what, where, got = mismatch.groups()
        return (
            f"hash mismatch: {what.split(';')[0]} from {host_of(where or 'the index')} has SHA-256 {got}, "
            f"which is not in {lock_name}: a damaged download, or an index that serves another file; try another index"
        )
    if "No space left on device" in text:
        return "the disk became full while pip was installing: make room and run `make setup` again"
    network = re.search(
        r"NewConnectionError|NameResolutionError|ConnectTimeout|ReadTimeout|ProxyError|SSLError"
        r"|Connection refused|Connection broken|Failed to establish|name resolution|CERTIFICATE_VERIFY_FAILED",
        text,
    )
    if network:
        host = re.search(
            r"host='([^']+)'|https?://(?:[^/@\s]+@)?([^/:\s]+)", text[max(0, network.start() - 400) :]
        )
        name = next(filter(None, host.groups())) if host else "the package index"
        return (
            f"no network: {name} cannot be reached ({network.group(0)}); "
            "check the connection, the proxy and pip's index-url"
        )
    absent = re.findall(r"No matching distribution found for ([^\s;]+)", text)
    if absent:
        return (
            f"pip finds no file of {absent[-1]} that {lock_name} allows for this Python and processor: "
            "is pip's index a complete mirror?"
        )
    return None


class Pip:
    """pip of the new .venv: its noise goes to a log, one line of progress to a terminal."""

    def __init__(self, venv):
        self.python = str(venv / "bin/python")
        self.log = venv / "setup.log"
        self.scratch = venv / "tmp"
        self.scratch.mkdir(exist_ok=True)
        # The user's own pip settings hold, except those that would install elsewhere than into .venv.
        self.env = {
            k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "PIP_TARGET")
        }
        self.env.update(
            PIP_USER="0", PIP_DISABLE_PIP_VERSION_CHECK="1", PIP_NO_INPUT="1", TMPDIR=str(self.scratch)
        )
        self.env.update(PIP_REQUIRE_VIRTUALENV="0", PYTHONUNBUFFERED="1", PIP_PROGRESS_BAR="off")

    def run(self, args, lock_name, total=0, harmless=None):
        """Run `python ARGS`; a failure becomes one line where the cause is known, else pip's last lines.

        A failure of which every line matches `harmless` is none.
        """
        import subprocess

        lines, count = [], 0
        terminal = sys.stderr.isatty()
        with open(str(self.log), "a") as log:
            print("\n$ python", *args, file=log, flush=True)
            process = subprocess.Popen(
                [self.python, *args],
                env=self.env,
                cwd=str(ROOT),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                universal_newlines=True,
                errors="replace",
            )
            try:
                for line in process.stdout or ():
                    log.write(line)
                    lines.append(line.rstrip())
                    if terminal and total and line.startswith(("Collecting ", "Installing collected")):
                        count += line.startswith("C")
                        doing = " ".join(line.split(";")[0].split()[:2])
                        sys.stderr.write(f"\r\033[K  {count}/{total} {doing}")
                        sys.stderr.flush()
            finally:
                if process.poll() is None and sys.exc_info()[0]:
                    process.terminate()
                process.wait()
                if terminal and total:
                    sys.stderr.write("\r\033[K")
        if process.returncode and not (harmless and all(re.fullmatch(harmless, line) for line in lines)):
            known = explain(lines, lock_name)
            if known:
                raise SetupError(known)
            useful = [line for line in lines if line.strip() and not line.startswith("WARNING")][-12:]
            tail = "\n  ".join(useful)
            raise SetupError(f"pip failed; its last lines (all of them: {self.log}):\n  {tail}", code=1)
        return "\n".join(lines)

    def install(self, requirements, lock_name, extra=()):
        """Install lock entries by hash; wheels only, since a build would need packages that no lock names."""
        path = self.scratch / "requirements.txt"
        path.write_text("".join(requirements))
        args = ["-m", "pip", "install", "--no-deps", "--require-hashes", "--only-binary", ":all:"]
        self.run([*args, *extra, "-r", str(path)], lock_name, total=len(requirements))

    def locate_torch(self, version, extra=()):
        """URL of the torch file that pip would take, without downloading it."""
        report = self.scratch / "report.json"
        # Without hashes: pip downloads the file before it answers when it has to check them.
        args = ["-m", "pip", "install", "--dry-run", "--no-deps", "--ignore-installed"]
        args += ["--only-binary", ":all:", "--report", str(report), *extra, "torch==" + version]
        self.run(args, "the lock")
        return json.loads(report.read_text())["install"][0]["download_info"]["url"]


def lock_entries(name, root=ROOT):
    """Lock entries by package name (two for a package whose version depends on Python's)."""
    entries = {}  # type: dict[str, list[str]]
    for entry in re.split(r"^(?=[a-zA-Z0-9])", (root / name).read_text(), flags=re.MULTILINE)[1:]:
        entries.setdefault(re.split("[= ;]", entry, maxsplit=1)[0], []).append(entry)
    return entries


# --- which build of torch ---------------------------------------------------------------------------------


def index_answers(index, timeout_seconds=5):
    """None if this package index has a torch page, else why not (proxies are respected)."""
    from urllib.request import urlopen

    try:
        if "://" not in index:
            raise OSError("not a URL")
        with urlopen(index.rstrip("/") + "/torch/", timeout=timeout_seconds):
            return None
    except (OSError, ValueError) as error:
        return str(getattr(error, "reason", error))


def describe(url):
    """File name and size of a wheel, for example 'torch-2.13.0+cpu-….whl, 183 MB'."""
    from urllib.parse import unquote, urlsplit
    from urllib.request import Request, urlopen

    path = unquote(urlsplit(url).path)
    try:
        if url.startswith("file:"):
            size = os.path.getsize(path)
        else:
            with urlopen(Request(url, method="HEAD"), timeout=10) as answer:
                size = int(answer.headers["Content-Length"])
        return f"{os.path.basename(path)}, {size / 1e6:.0f} MB"
    except (OSError, ValueError, TypeError):
        return os.path.basename(path) + ", size unknown"


def choose_torch(pip, wanted, version, torch_index):
    """(flavour to install, pip's extra arguments for torch); says which file that is and how large."""
    if wanted == "gpu":
        say("torch: " + describe(pip.locate_torch(version)))
        return "gpu", []
    reason = index_answers(torch_index)
    if reason is None:
        extra = ["--index-url", torch_index]
        say(f"torch from {host_of(torch_index)}: {describe(pip.locate_torch(version, extra))}")
        return "cpu", extra
    say(f"TORCH_INDEX {host_of(torch_index)} does not answer ({reason}): taking the build that pip finds")
    url = pip.locate_torch(version)
    if "+cpu" in url or "%2Bcpu" in url:
        say(f"torch: {describe(url)}, the CPU build")
        return "cpu", []
    say(f"torch: {describe(url)}, the CUDA build; it runs on the CPU too, but needs its CUDA libraries")
    return "gpu", []


# --- the set-up -------------------------------------------------------------------------------------------


def make_venv(python, venv):
    import subprocess

    made = subprocess.run(
        [python, "-m", "venv", "--clear", str(venv)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    if made.returncode:
        last = (made.stdout.decode(errors="replace").strip().splitlines() or ["no output"])[-1]
        raise SetupError(f"{python} -m venv {venv} failed: {last}")


def install_all(wanted, environ):
    import resource
    import time

    started = time.monotonic()
    version, python = find_python(environ.get("PYTHON"))
    check_disk(ROOT, wanted)
    venv = ROOT / ".venv"
    if venv.is_symlink():  # python -m venv --clear would empty what it leads to, then refuse
        raise SetupError(f"{venv} is a link, expected a folder of this checkout's own: remove the link")
    say("making .venv with Python {}.{}.{}".format(*version))
    make_venv(python, venv)
    pip = Pip(venv)
    pip.install(lock_entries(LOCKS[wanted])["pip"], LOCKS[wanted])

    torch = lock_entries(LOCKS[wanted])["torch"]
    torch_version = torch[0].split()[0].partition("==")[2]
    flavour, extra = choose_torch(
        pip, wanted, torch_version, environ.get("TORCH_INDEX") or DEFAULT_TORCH_INDEX
    )
    check_disk(ROOT, flavour)
    entries = lock_entries(LOCKS[flavour])
    torch = entries.pop("torch")
    others = [entry for versions in entries.values() for entry in versions]
    say(
        f"installing {len(entries) + 1} packages by hash: {DOWNLOAD[flavour]} unless cached, "
        f"{DURATION[flavour]}; log in .venv/setup.log"
    )
    pip.install(torch, LOCKS[flavour], extra)
    pip.install(others, LOCKS[flavour])
    pip.run(
        ["-m", "pip", "install", "--no-deps", "--no-build-isolation", "--no-index", "-e", "."],
        "pyproject.toml",
    )
    # What pyproject.toml's override-dependencies leave out, lm-eval still asks for.
    pip.run(
        ["-m", "pip", "check"], LOCKS[flavour], harmless=r"lm-eval .* requires .*, which is not installed\."
    )
    built = pip.run(["-c", "import torch; print(torch.__version__)"], LOCKS[flavour]).split()[-1]

    import shutil

    shutil.rmtree(str(pip.scratch), ignore_errors=True)
    write_stamp(wanted, asked=environ.get("PYTHON"))
    peak_gib = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    say(f"ready: .venv with torch {built} ({time.monotonic() - started:.0f} s, peak RAM {peak_gib:.1f} GiB)")


def stop(signum, _frame):
    """SIGTERM takes the same way out as Ctrl-C, so that pip is ended too."""
    raise SystemExit(128 + signum)


def main(argv):
    quiet = "--quiet" in argv
    signal.signal(signal.SIGTERM, stop)
    try:
        wanted = wanted_flavour(os.environ)
        asked = os.environ.get("PYTHON")
        if finished(wanted, asked=asked):
            if not quiet:
                say("ready (nothing to do)")
            return 0
        check_platform()
        import fcntl  # absent on Windows

        # The folder itself is the lock: it is there before .venv is.
        folder = os.open(str(ROOT), os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            say("another set-up is at work here: waiting for it")
            fcntl.flock(folder, fcntl.LOCK_EX)
        if not finished(wanted, asked=asked):  # the other one may have done it
            install_all(wanted, os.environ)
        return 0
    except SetupError as error:
        say(str(error))
        return error.code
    except KeyboardInterrupt:
        say("stopped; `make setup` starts again")
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
