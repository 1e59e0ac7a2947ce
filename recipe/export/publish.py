"""A finished export to a repository of the model hub: private unless asked otherwise, shown first, checked afterwards.

Only what export.json lists is sent, after its hashes were checked again. What the hub has already, by hash, is not sent a
second time: an interrupted call is simply repeated.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipe.container import require_network
from recipe.errors import Refused, UserError
from recipe.export.contents import README, Item, check, contents, size_text
from recipe.export.licence import Licence, front_matter, licence_of
from recipe.prepare.download import one_line

UNASKED = (".gitattributes",)  # what hubs put into every repository


@dataclass(frozen=True)
class Plan:
    """What would be sent, where to, and what the base's licence says of it."""

    repo: str
    public: bool
    items: list[Item]
    licence: Licence

    @property
    def bytes(self) -> int:
        return sum(item.size for item in self.items)

    def to_dict(self, dry_run: bool) -> dict[str, Any]:
        return {
            "repository": self.repo,
            "public": self.public,
            "dry_run": dry_run,
            "files": [{"name": item.name, "bytes": item.size, "sha256": item.sha256} for item in self.items],
            "bytes": self.bytes,
            "terms": self.terms,
        }

    @property
    def terms(self) -> str:
        licence = self.licence
        parts = [licence.name]
        if licence.attribution:
            parts.append(f"the card says “{licence.attribution}”, as it asks")
        if licence.name_prefix:
            parts.append(f"the name begins with “{licence.name_prefix}”, as it asks")
        if licence.must_travel and not any(item.name.lower().startswith("licen") for item in self.items):
            parts.append(
                "its text has to travel along and is not among these files: put it into the base's folder and export again"
            )
        return "; ".join(parts)


def publish(
    folder: Path,
    repo: str,
    public: bool = False,
    dry_run: bool = False,
    assume_yes: bool = False,
    say: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True),
) -> dict[str, Any]:
    """Upload a finished export to `repo` (owner/name). A dry run asks nobody and sends nothing.

    Raises UserError where it cannot be done as asked, Refused where the answer to --public is no or what the hub then has
    is something else.
    """
    plan = plan_of(folder, repo, public)
    if public and not dry_run and not assume_yes and not sys.stdin.isatty():
        raise UserError(
            f"--public: everybody could read {repo}, and there is no terminal to ask at; add --yes if that is meant, or "
            "leave out --public"
        )
    check(plan.items, "checking")
    if dry_run:
        return plan.to_dict(dry_run)
    require_network(f"--publish {repo}: the model hub is needed", "use RUNTIME=host, or --archive FILE.tar")
    token = _token(repo)
    say(describe(plan.to_dict(dry_run)))
    if public and not assume_yes:
        _ask(repo)
    with _hub_errors(repo), _quiet():
        return plan.to_dict(dry_run) | _upload(folder, plan, token, say)


def plan_of(folder: Path, repo: str, public: bool = False) -> Plan:
    """Raises UserError where the folder is no finished export or the name cannot be taken."""
    _check_name(repo)
    items = contents(folder)
    readme = folder / README
    text = readme.read_text(encoding="utf-8", errors="replace") if readme.is_file() else ""
    base = front_matter(text).get("base_model")
    licence = licence_of(folder, str((base[0] if base else "") if isinstance(base, list) else base or ""))
    owner, _, name = repo.partition("/")
    if not licence.allows(name):
        raise UserError(
            f"--publish {repo}: name not allowed: the {licence.name} wants names of derived models to begin with "
            f"`{licence.name_prefix}`, such as {owner}/{licence.named(name)}"
        )
    return Plan(repo, public, items, licence)


def describe(found: dict[str, Any]) -> str:
    """File by file with sizes, then where to and under which terms."""
    width = max(len(file["name"]) for file in found["files"])
    seen = "PUBLIC: everybody can read it" if found["public"] else "private"
    go = "would go" if found["dry_run"] else "go"
    return "\n".join(
        [
            f"{len(found['files'])} files, {size_text(found['bytes'])}, {go} to {found['repository']} ({seen}):",
            *(f"  {file['name']:<{width}}  {size_text(file['bytes']):>12}" for file in found["files"]),
            f"licence of the base: {found['terms']}",
        ]
    )


def render(result: dict[str, Any]) -> str:
    """What is printed at the end."""
    if result["dry_run"]:
        return f"{describe(result)}\nhashes checked; nothing was sent (dry run)"
    others = result["others"]
    kept = f"{', '.join(others[:3])}{', …' if len(others) > 3 else ''}"
    return (
        f"{result['url']}: {'public' if result['public'] else 'private'}, {len(result['files'])} files "
        f"({size_text(result['sent_bytes'])} sent, {size_text(result['bytes'] - result['sent_bytes'])} were there), each "
        f"verified by its hash" + (f"; {len(others)} other files stay there ({kept})" if others else "")
    )


def _check_name(repo: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
        good = repo.count("/") == 1
    except HFValidationError:
        good = False
    if not good:
        raise UserError(
            f"--publish {repo}: expected OWNER/NAME, of letters, digits, `-`, `_` and `.`, neither `--` nor `..` in it, 96 at "
            "most"
        )


def _token(repo: str) -> str:
    from huggingface_hub import get_token

    token = get_token()
    if not token:
        raise UserError(
            f"--publish {repo}: no token of the hub, expected HF_TOKEN in the environment or `hf auth login` before; a token "
            "that may write is made at https://huggingface.co/settings/tokens"
        )
    return token


def _ask(repo: str) -> None:
    """Raises Refused where the answer is not the repository's name or `yes`."""
    print(
        f"Everybody will be able to read {repo}. Type its name or `yes` to go on: ",
        end="",
        file=sys.stderr,
        flush=True,
    )
    if sys.stdin.readline().strip() not in (repo, repo.partition("/")[2], "yes"):
        raise Refused(f"--public: not confirmed; nothing was sent to {repo}")


# -- the hub ------------------------------------------------------------------------------------------------------------


def _upload(folder: Path, plan: Plan, token: str, say: Callable[[str], None]) -> dict[str, Any]:
    from huggingface_hub import HfApi, constants

    api = HfApi(endpoint=constants.ENDPOINT, token=token)
    api.whoami()  # a token that is not valid shows here; elsewhere it looks like a missing repository
    _open(api, plan)
    there = _files(api, plan.repo)
    missing = [item for item in plan.items if not _same(item, there.get(item.name))]
    sent_bytes = sum(item.size for item in missing)
    if missing:
        say(f"{len(missing)} of {len(plan.items)} files to send, {size_text(sent_bytes)}")
        _send(api, folder, plan.repo, missing)
        there = _files(api, plan.repo)
    unlike = [item.name for item in plan.items if not _same(item, there.get(item.name))]
    if unlike:
        raise Refused(
            f"--publish {plan.repo}: {len(unlike)} of {len(plan.items)} files are not there as sent (first: {unlike[0]}); run it "
            "again"
        )
    names = {item.name for item in plan.items}
    return {
        "url": f"{constants.ENDPOINT}/{plan.repo}",
        "sent": [item.name for item in missing],
        "sent_bytes": sent_bytes,
        "others": sorted(name for name in there if name not in names and name not in UNASKED),
        "verified": True,
    }


def _open(api: Any, plan: Plan) -> None:
    """Make the repository, or see that the one which is there is as private as asked."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        private = bool(api.model_info(plan.repo).private)
    except RepositoryNotFoundError:
        api.create_repo(plan.repo, private=not plan.public)
        # Some organisations have a default of their own.
        private = bool(api.model_info(plan.repo).private)
    if not private and not plan.public:
        raise UserError(
            f"--publish {plan.repo}: is a public repository, and a private one was asked for; nothing was sent; add --public, or "
            "choose another name"
        )
    if private and plan.public:
        raise UserError(
            f"--publish {plan.repo}: is a private repository, and --public was asked for; nothing was sent; make it public in "
            "its settings on the hub, or leave out --public"
        )


def _files(api: Any, repo: str) -> dict[str, Any]:
    return {
        entry.path: entry
        for entry in api.list_repo_tree(repo, recursive=True)
        if hasattr(entry, "blob_id")  # a folder has none
    }


def _same(item: Item, there: Any) -> bool:
    """Whether the hub's file has the content that was verified here: by sha256, or by git's hash where it is a small one."""
    if there is None or there.size != item.size:
        return False
    if there.lfs is not None:
        return there.lfs.sha256 == item.sha256
    digest = hashlib.sha1(b"blob %d\0" % item.size)
    digest.update(item.path.read_bytes())
    return there.blob_id == digest.hexdigest()


def _send(api: Any, folder: Path, repo: str, items: list[Item]) -> None:
    """By the library's own way, which shows its progress, tries again, and goes on where an earlier call was cut."""
    api.upload_folder(
        repo_id=repo,
        folder_path=folder,
        allow_patterns=[glob.escape(item.name) for item in items],
        commit_message=f"{folder.name} by recipe export",
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The library logs addresses that are signed, and draws bars where there is no terminal."""
    from huggingface_hub.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
        logging,
    )

    before, bars = logging.get_verbosity(), not are_progress_bars_disabled()
    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(before)
        if bars:
            enable_progress_bars()


@contextlib.contextmanager
def _hub_errors(repo: str) -> Iterator[None]:
    """What the library raises, in one line and without the token. Our own refusals pass."""
    try:
        yield
    except (UserError, Refused):
        raise
    except Exception as error:  # a dozen kinds: of HTTP, of the network, of Xet, of its own checks
        raise _refusal(repo, error) from None


def _refusal(repo: str, error: BaseException) -> UserError:
    while error.__cause__ is not None and getattr(error, "response", None) is None:
        error = error.__cause__  # `Error while uploading` says what, its cause says why
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    said = one_line(getattr(error, "server_message", None) or str(error).strip() or type(error).__name__)
    owner = repo.partition("/")[0]
    reason = {
        401: "the hub does not take the token; set HF_TOKEN to a valid one or run `hf auth login`",
        403: f"the token may not write there ({said}); it needs the right to write to {owner}",
        404: f"the hub knows no such owner or repository ({said}); check the spelling, and whether the token may write to {owner}",
        409: f"the hub refuses it now ({said}); run it again",
        413: f"too large for the hub ({said})",
        429: f"the hub asks to wait ({said}); run it again later, it goes on where it was",
    }.get(status or 0)
    if reason is None and status is not None:
        reason = f"the hub answered {status} ({said}); run it again, it goes on where it was"
    return UserError(
        f"--publish {repo}: {reason or f'the hub was not reached, or the upload was cut ({said}); run it again, it goes on where it was'}"
    )
