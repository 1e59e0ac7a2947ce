"""Run `recipe COMMAND …` where RUNTIME says: in the container, or in .venv on the host.

    RUNTIME=auto     the container if Docker answers and the image of these sources and locks is built, else the host
    RUNTIME=docker   the container, or one line that says why not
    RUNTIME=host     .venv, which is set up first if need be

Either way the same files and the same exit code. In the container the checkout lies at its own path, to be read only
but for models/, runs/, data/ and .cache/; a path outside it that an argument or the config names is mounted too.
`run.py --image` only prints the digest of that image, or says what is missing. Standard library only.
"""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from setup import SetupError, go_on_in_a_new_python, wanted_flavour
from setup import main as set_up

go_on_in_a_new_python("runtime")

import engine
import serving

import image

ROOT = Path(__file__).resolve().parent.parent
RUNTIMES = ("auto", "docker", "host")
# Which service of compose.yaml has the rights that a command needs; others need no more than export does.
SERVICES = {name: name for name in ("preflight", "prepare", "train", "export", "chat")} | {
    "reproduce": "train"
}
WRITTEN = {"models": "RECIPE_MODELS", "runs": "RECIPE_RUNS", "data": "RECIPE_DATA", ".cache": "RECIPE_CACHE"}
WRITING = (
    "--output",
    "--checkpoint",
    "--figure",
    "--bundle",
    "--archive",
)  # options whose value is a folder or file that is written
WRITING_FILES = ("--figure", "--bundle", "--archive")
OUTPUT_FILES = ("report", "compare")  # commands whose --output is a file
CERTIFICATES = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "PIP_CERT", "CURL_CA_BUNDLE")
PROBE = "host-probe.json"
PROBE_SECONDS = 15  # it ends within 5
POLL_SECONDS = 0.1
SOON_SECONDS = 10  # a container that ends with 1 so early may never have started
DEMO_CONFIG = "recipe/configs/smollm2-135m.yaml"


def say(text):
    print(text, file=sys.stderr, flush=True)


def main(arguments):
    asked = os.environ.get("RUNTIME") or "auto"
    try:
        if asked not in RUNTIMES:
            raise SetupError(f"RUNTIME={asked}: expected auto, docker or host")
        flavour = wanted_flavour(os.environ)
        if arguments == ["--image"]:
            print(usable_image(flavour))
            return 0
        digest = None
        if "--watch" in arguments:  # a container has no network on which it could be seen
            if asked == "docker":
                raise SetupError("--watch serves a page, and the container has no network: use RUNTIME=host")
            asked = "host"
        if arguments[:1] == ["serve"] and asked != "host":
            try:
                request = serving.vllm_request(arguments[1:], flavour)
                say(f"runtime: container {serving.IMAGE}; {serving.address(request)}")
                return in_vllm(request)
            except SetupError as error:
                if asked == "docker":
                    raise
                say(f"runtime: host, on the CPU ({error})")
                asked = "host"  # our own image has no network on which it could be reached
        if asked != "host":
            try:
                digest = usable_image(flavour)
                say(f"runtime: container {image.NAME}:{flavour} ({digest[:19]})")
            except SetupError as error:
                if asked == "docker":
                    raise
                say(f"runtime: host, in .venv ({error})")
        return in_container(arguments, flavour, digest) if digest else on_host(arguments)
    except SetupError as error:
        say(f"runtime: {error}")
        return error.code


def usable_image(flavour):
    """Digest of the image of these sources and locks. Raises SetupError with what is missing."""
    if flavour == "gpu":
        engine.require_gpus()
    name = f"{image.NAME}:{flavour}"
    found = engine.image(name)
    if found is None:
        raise SetupError(f"there is no image {name}: `make build FLAVOUR={flavour}` makes it")
    digest, labels = found
    for label, now, what in (
        ("recipe.lock", image.lock_sha256(flavour), "other packages than the locks"),
        ("recipe.sources", image.sources_sha256(), "other sources than this checkout"),
    ):
        if labels.get(label) != now:
            raise SetupError(f"the image {name} holds {what}: `make build FLAVOUR={flavour}` renews it")
    engine.require_compose()
    return digest


def on_host(arguments):
    code = set_up(["--quiet"])
    if code:
        return code
    python = str(ROOT / ".venv/bin/python")
    os.execv(python, [python, "-m", "recipe", *arguments])


# --- the container ----------------------------------------------------------------------------------------


def in_container(arguments, flavour, digest):
    uid, gid = caller(os.environ)
    environ = container_environment(uid, gid) | {"RECIPE_IMAGE_DIGEST": digest}
    command = arguments[0] if arguments else "preflight"
    if command in ("preflight", "demo", "doctor"):
        environ |= host_probe(Path(environ["RECIPE_CACHE"]), uid, gid)
    if command == "demo":  # its first stage needs the network, the others shall not have it
        code = start(["prepare", "--config", DEMO_CONFIG], "prepare", flavour, environ)
        if code:
            return code
    return start(arguments, SERVICES.get(command, "export"), flavour, environ)


def in_vllm(request):
    environ = container_environment(*caller(os.environ)) | serving.environment(request)
    return start(request["words"], "vllm", "gpu", environ, "--service-ports")


def container_environment(uid, gid):
    """What compose.yaml is told of this checkout and its caller."""
    environ = {**os.environ, "RECIPE_FOLDER": str(ROOT), "RECIPE_USER": f"{uid}:{gid}"}
    for name, variable in WRITTEN.items():
        environ[variable] = str(own_folder(ROOT / name, uid, gid))
    return environ


def host_probe(cache, uid, gid):
    """What a container cannot see of this host, in a file of .cache for preflight and doctor, which are told where it lies.

    Only the caller may read it: a kernel log may be in it. Where it cannot be made, preflight's checks say so.
    """
    command = [sys.executable, "-m", "recipe.probe"]
    file = cache / PROBE
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=PROBE_SECONDS, check=True)
        file.unlink(missing_ok=True)
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "wb") as out:
            out.write(done.stdout)
        if os.getuid() == 0:
            os.chown(file, uid, gid)
    except (OSError, subprocess.SubprocessError) as error:
        say(
            f"runtime: the host could not be probed ({type(error).__name__}); preflight skips what it needs of it"
        )
        return {}
    return {"RECIPE_HOST_PROBE": f"/cache/{PROBE}"}


def caller(environ, uid=None, gid=None):
    """(user, group) that the files shall belong to: who called, also through sudo."""
    uid, gid = os.getuid() if uid is None else uid, os.getgid() if gid is None else gid
    if uid == 0 and environ.get("SUDO_UID", "").isdigit():
        uid = int(environ["SUDO_UID"])
        gid = int(environ["SUDO_GID"]) if environ.get("SUDO_GID", "").isdigit() else gid
    return uid, gid


def own_folder(folder, uid, gid):
    """A folder that the container writes to as this user, made if need be; it may be a link to another disk."""
    try:
        missing = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        if os.getuid() == 0:
            for path in missing:
                os.chown(path, uid, gid)
    except OSError as error:
        raise SetupError(
            f"{folder}: cannot be made ({error.strerror}); the container needs it for what it writes"
        ) from None
    found = folder.stat()
    # In the container root has no privilege over other people's files either.
    may = 0o200 * (found.st_uid == uid) | 0o020 * (found.st_gid == gid) | 0o002
    if not found.st_mode & may:
        import pwd

        try:
            owner = pwd.getpwuid(found.st_uid).pw_name
        except KeyError:
            owner = f"user {found.st_uid}"
        raise SetupError(
            f"{folder} belongs to {owner}, and user {uid} may not write there: `sudo chown -R {uid}:{gid} {folder}`, "
            "or make it a link to a folder of yours"
        )
    return folder.resolve()


def start(arguments, service, flavour, environ, *more):
    """`docker compose run` of a service; its exit code. Signals reach the run, which saves before it ends."""
    container = f"{image.NAME}-{service}-{os.getpid()}"
    options = ["run", "--rm", "--no-deps", "--name", container, *more]
    terminal = sys.stdin.isatty() and sys.stdout.isatty() and sys.stderr.isatty()
    if not terminal:
        options.append("-T")  # a terminal would mix results and messages into one stream
    # What the caller has set wins over host.env.
    options += [word for name in sorted(environ) if name.startswith("NCCL_") for word in ("--env", name)]
    for path, writable in outside_paths(arguments, *map(int, environ["RECIPE_USER"].split(":"))):
        options += ["--volume", f"{path}:{path}{'' if writable else ':ro'}"]
    if service == "prepare":
        environ = {**environ, **hub_token(environ)}
        bundle = next(
            (os.environ[name] for name in CERTIFICATES if os.path.isfile(os.environ.get(name, ""))), None
        )
        if bundle:  # a company's own certificates
            options += ["--volume", f"{os.path.realpath(bundle)}:/etc/ssl/host.pem:ro"]
            options += [word for name in CERTIFICATES for word in ("--env", f"{name}=/etc/ssl/host.pem")]
    compose = ["docker", "compose", "--project-directory", str(ROOT), "--file", str(ROOT / "compose.yaml")]
    command = [*compose, *options, service if flavour == "gpu" else f"{service}-cpu"]

    # Compose without a terminal would leave the container behind at a signal: it gets none, and the container all.
    signals = []
    previous = {
        n: signal.signal(n, lambda got, _frame: signals.append(got)) for n in (signal.SIGINT, signal.SIGTERM)
    }
    started = time.monotonic()
    process = subprocess.Popen(
        [*command, *arguments],
        env=environ,
        stdin=subprocess.DEVNULL if sys.stdin.isatty() and not terminal else None,
        process_group=None if terminal else 0,
    )
    while (code := process.poll()) is None:
        if signals and engine.call("kill", f"--signal={signals[0]}", container).returncode == 0:
            del signals[0]  # else it is not there yet, or just gone
        time.sleep(POLL_SECONDS)
    for number, handler in previous.items():
        signal.signal(number, handler)
    if code not in (0, 2, 130, 143) and time.monotonic() - started < SOON_SECONDS:
        explain_start(command, environ)
    return code


def hub_token(environ):
    """The model hub's token for a container, which does not see the home that `hf auth login` keeps it in."""
    if environ.get("HF_TOKEN"):
        return {}
    home = Path(environ.get("HF_HOME") or Path.home() / ".cache/huggingface")
    try:
        token = Path(environ.get("HF_TOKEN_PATH") or home / "token").read_text().strip()
    except (OSError, UnicodeDecodeError):
        return {}
    return {"HF_TOKEN": token} if token else {}


def explain_start(command, environ):
    """Where the container did not even start, say why in a line of ours."""
    engine.call("rm", "--force", command[command.index("--name") + 1])
    probe = subprocess.run(
        [*command, "--version"],
        env=environ,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )
    known = engine.explain(probe.stderr) if probe.returncode else None
    if known:
        raise SetupError(known)


def outside_paths(arguments, uid, gid, root=ROOT):
    """(path, writable) of what is mounted beside the usual: what lies outside the checkout and is named by an argument
    or by the config, at its own place, to be read; and folders elsewhere that the command writes to.
    """
    found: dict[str, bool] = {}
    for name, written in named_paths(arguments):
        path = Path(os.path.normpath(root / name))
        usual = [root / folder for folder in WRITTEN] if written else [root]
        if path == Path("/") or any(place == path or place in path.parents for place in usual):
            continue
        if path == root:
            raise SetupError(
                f"{name}: the container may not write there; name a place in runs/, or use RUNTIME=host"
            )
        try:
            if written:
                own_folder(path, uid, gid)
            if not path.exists():
                continue
        except OSError:  # words of a chat that only look like a path
            continue
        if ":" in str(path):
            raise SetupError(
                f"{path}: docker cannot mount a path with a colon; make a link to it, or use RUNTIME=host"
            )
        found[str(path)] = found.get(str(path), False) or written
    return sorted(found.items())


def named_paths(arguments):
    """(path, whether it is a folder that is written to) of words like /x, ../x, a=/x and, in the config, `a: /x`."""
    config = ""
    for option, argument in zip(["", *arguments], arguments, strict=False):
        if argument.startswith("--") and "=" in argument:
            option, _, value = argument.partition("=")
        else:
            value = argument
        if option == "--config":
            config = value
        if option == "--run" and arguments[0] == "reproduce":  # which reads the run's data again
            config = f"runs/{value}/config.yaml"
        if option in WRITING:
            file = option in WRITING_FILES or (option == "--output" and arguments[0] in OUTPUT_FILES)
            yield (os.path.dirname(value) or "." if file else value), True
            continue
        own = re.search(r"(?:^|[=.])(?:models|runs)=([^\0]+)$", argument)
        word = own or re.fullmatch(r"(?:(?!/)[^\0]*?=)?((?:/|\.\./)[^\0]+)", argument)
        if word:
            yield word[1], bool(own)
    if config and Path(config).is_file():
        for line in Path(config).read_text(errors="replace").splitlines():
            line = re.sub(r"(?:^|\s)#.*", "", line)
            own = re.match(r"\s*[\"']?(?:models|runs)[\"']?\s*:\s*[\"']?([^\"'{]+)", line)
            word = own or re.search(r"(?:^|[\s:])[\"']?((?:/|\.\./)[^\"']+)", line)
            if word:
                yield word[1].rstrip(" },]"), bool(own)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
