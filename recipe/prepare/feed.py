"""Brings the source files to the pipeline in the order in which it reads them, ahead of it, and takes them away again.

A source on the local disk is there already and stays. Of a source on the hub that is not kept, two files at most are on
the disk: one that is quantised and one that comes in meanwhile.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path

from recipe.files import GIB
from recipe.prepare.download import Cancelled
from recipe.prepare.hub import Repository
from recipe.prepare.rates import Stage

AT_ONCE_KEPT = 4  # one connection rarely fills a fast line
AT_ONCE_DROPPED = 1
ON_DISK_DROPPED = 2
WAIT_SECONDS = 0.1


class LocalFeed:
    """Files that lie there."""

    stages: tuple[Stage, ...] = ()
    stop = threading.Event()

    def __enter__(self) -> LocalFeed:
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def obtain(self, file: Path, stop: threading.Event) -> None:
        """Nothing to wait for."""

    def drop(self, file: Path) -> None:
        """A local file is never deleted."""


class HubFeed:
    """Files of a repository, fetched in threads from the moment the block is entered until it is left."""

    def __init__(self, repository: Repository, files: list[Path], show: Callable[[str], None]):
        """`show` is given a few words on how far it is, a few times a second."""
        self.repository, self.show = repository, show
        self.bytes = 0  # fetched so far
        self.waiting = deque(files)
        self.ready: set[Path] = set()
        self.error: BaseException | None = None
        self.stop = threading.Event()
        self.changed = threading.Condition()
        at_once = AT_ONCE_KEPT if repository.keep else AT_ONCE_DROPPED
        self.room = len(files) if repository.keep else ON_DISK_DROPPED
        self.threads = [threading.Thread(target=self._fetch, daemon=True) for _ in range(at_once)]
        self.download = Stage("download", workers=at_once)

    @property
    def stages(self) -> list[Stage]:
        return [self.download]

    def __enter__(self) -> HubFeed:
        wanted = {file.name for file in self.waiting}
        for name in self.repository.weight_files():
            if name not in wanted:  # quantised, but a kill came before it could go
                self.repository.drop(name)
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop.set()
        for thread in self.threads:
            thread.join()

    def obtain(self, file: Path, stop: threading.Event) -> None:
        """Returns when the file is there. Raises UserError where it cannot be fetched."""
        with self.changed:
            while file not in self.ready:
                if self.error:
                    raise self.error
                if stop.is_set():
                    raise Cancelled
                self.changed.wait(WAIT_SECONDS)

    def drop(self, file: Path) -> None:
        """What is quantised makes room for the next one."""
        self.repository.drop(file.name)
        with self.changed:
            self.room += 1

    def _fetch(self) -> None:
        try:
            while (file := self._next()) is not None:
                if not self.repository.there(file.name):
                    with self.download.working(self.repository.missing_bytes(file.name)):
                        self.repository.fetch([file.name], self.stop, self._received)
                with self.changed:
                    self.ready.add(file)
                    self.changed.notify_all()
        except Cancelled:
            pass
        except BaseException as error:  # raised where the file is waited for
            with self.changed:
                self.error = self.error or error
                self.changed.notify_all()

    def _received(self, size: int) -> None:
        with self.changed:
            self.bytes += size
        self.show(f"{self.bytes / GIB:.2f} GiB fetched")

    def _next(self) -> Path | None:
        while not self.stop.is_set():
            with self.changed:
                if not self.waiting or self.error:
                    return None
                if self.room > 0:
                    self.room -= 1
                    return self.waiting.popleft()
                self.changed.wait(WAIT_SECONDS)
        return None
