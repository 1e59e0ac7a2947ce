"""Run `recipe COMMAND …` where RUNTIME says: in the container, or in .venv on the host.

    RUNTIME=auto     the container if Docker answers and the image of these sources and locks is built, else the host
    RUNTIME=docker   the container, or one line that says why not
    RUNTIME=host     .venv, which is set up first if need be

Either way the same files and the same exit code. In the container the checkout lies at its own path, to be read only
but for models/, runs/, data/ and .cache/; a path outside it that an argument or the config names is mounted too.
Standard library only.
"""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

from setup import SetupError, find_python, wanted_flavour
from setup import main as set_up

if sys.version_info < (3, 11):  # the newest that is there, or set-up's word on what is missing
    try:
        os.execv(find_python(os.environ.get("PYTHON"))[1], ["python3", *sys.argv])
    except SetupError as error:
        sys.exit(f"runtime: {error}")

import engine
import image

ROOT = Path(__file__).resolve().parent.parent
RUNTIMES = ("auto", "docker", "host")
# Which service of compose.yaml has the rights that a command needs; others need no more than export does.
SERVICES = {name: name for name in ("preflight", "prepare", "train", "export", "chat")}
WRITTEN = {"models": "RECIPE_MODELS", "runs": "RECIPE_RUNS", "data": "RECIPE_DATA", ".cache": "RECIPE_CACHE"}
CERTIFICATES = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "PIP_CERT", "CURL_CA_BUNDLE")
DEMO_CONFIG = "recipe/configs/smollm2-135m.yaml"


def say(text):
    print(text, file=sys.stderr, flush=True)


def main(arguments):
    asked = os.environ.get("RUNTIME") or "auto"
    try:
        if asked not in RUNTIMES:
            raise SetupError(f"RUNTIME={asked}: expected auto, docker or host")
        flavour = wanted_flavour(os.environ)
        digest = None
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
    if flavour == "gpu":
        engine.require_gpus()
    return digest


def on_host(arguments):
    code = set_up(["--quiet"])
    if code:
        return code
    python = str(ROOT / ".venv/bin/python")
    os.execv(python, [python, "-m", "recipe", *arguments])


# --- the container ----------------------------------------------------------------------------------------


def in_container(arguments, flavour, digest):
    environ = {**os.environ, "RECIPE_FOLDER": str(ROOT), "RECIPE_IMAGE_DIGEST": digest, "RECIPE_USER": caller(os.environ)}
    for name, variable in WRITTEN.items():
        environ[variable] = str(own_folder(name))
    command = arguments[0] if arguments else "preflight"
    if command == "demo":  # its first stage needs the network, the others shall not have it
        code = start(["prepare", "--config", DEMO_CONFIG], "prepare", flavour, environ)
        if code:
            return code
    return start(arguments, SERVICES.get(command, "export"), flavour, environ)


def caller(environ, uid=None, gid=None):
    """user:group that the files shall belong to: who called, also through sudo."""
    uid, gid = os.getuid() if uid is None else uid, os.getgid() if gid is None else gid
    if uid == 0 and environ.get("SUDO_UID", "").isdigit():
        uid, gid = environ["SUDO_UID"], environ.get("SUDO_GID", gid)
    return f"{uid}:{gid}"


def own_folder(name):
    """A folder of the checkout that the container writes to; it may be a link to another disk."""
    folder = ROOT / name
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise SetupError(f"{name}: cannot be made ({error.strerror}); the container needs it for what it writes") from None
    if not os.access(folder, os.W_OK):
        import pwd

        try:
            owner = pwd.getpwuid(folder.stat().st_uid).pw_name
        except KeyError:
            owner = f"user {folder.stat().st_uid}"
        raise SetupError(
            f"{name}/ belongs to {owner}, and you may not write there: `sudo chown -R $(id -u):$(id -g) {folder}`, "
            "or make it a link to a folder of yours"
        )
    return folder.resolve()


def start(arguments, service, flavour, environ):
    """`docker compose run` of a service; its exit code. Signals reach the run, which saves before it ends."""
    container = f"{image.NAME}-{service}-{os.getpid()}"
    options = ["run", "--rm", "--no-deps", "--name", container]
    terminal = sys.stdin.isatty() and sys.stdout.isatty() and sys.stderr.isatty()
    if not terminal:
        options.append("-T")  # a terminal would mix results and messages into one stream
    for path, writable in outside_paths(arguments):
        options += ["--volume", f"{path}:{path}{'' if writable else ':ro'}"]
    if service == "prepare":
        bundle = next((os.environ[name] for name in CERTIFICATES if os.path.isfile(os.environ.get(name, ""))), None)
        if bundle:  # a company's own certificates
            options += ["--volume", f"{os.path.realpath(bundle)}:/etc/ssl/host.pem:ro"]
            options += [word for name in CERTIFICATES for word in ("--env", f"{name}=/etc/ssl/host.pem")]
    name = service if flavour == "gpu" else f"{service}-cpu"
    command = ["docker", "compose", "--project-directory", str(ROOT), "--file", str(ROOT / "compose.yaml"), *options, name]

    # Compose without a terminal would leave the container behind at a signal: it gets none, and the container all.
    def forward(number, _frame):
        engine.call("kill", f"--signal={number}", container)

    previous = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    process = subprocess.Popen(
        [*command, *arguments],
        env=environ,
        stdin=subprocess.DEVNULL if sys.stdin.isatty() and not terminal else None,
        process_group=None if terminal else 0,
    )
    code = process.wait()
    for number, handler in previous.items():
        signal.signal(number, handler)
    if code not in (0, 1, 2, 130, 143):
        explain_start(command, environ)
    return code


def explain_start(command, environ):
    """Where the container did not even start, say why in a line of ours."""
    probe = subprocess.run([*command, "--version"], env=environ, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    known = engine.explain(probe.stderr) if probe.returncode else None
    if known:
        raise SetupError(known)


def outside_paths(arguments, root=ROOT):
    """(path, writable) of what lies outside the checkout and is named by an argument or by the config.

    Only whole words that begin with / count, and what exists: a file or folder is mounted at its own place, to be read.
    The folders of models and runs, if they are elsewhere, are made and can be written.
    """
    texts = list(arguments)
    for option, value in zip(arguments, arguments[1:]):
        config = Path(value)
        if option == "--config" and config.is_file():
            texts += config.read_text(errors="replace").splitlines()
    found = {}
    for text in texts:
        own = re.match(r"\s*(?:paths\.)?(?:models|runs)\s*[:=]\s*[\"']?(/[^\"'#]+)", text)
        named = own or re.search(r"(?:^|[\s=:])[\"']?(/[^\"'#]+)", text)
        path = Path(named[1].strip()) if named else None
        if path is None or path == root or root in path.parents:
            continue
        if own:
            path.mkdir(parents=True, exist_ok=True)
        if path.exists():
            found[str(path)] = found.get(str(path), False) or bool(own)
    return sorted(found.items())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
