"""Sees what leaves a test's process: files opened or changed, sockets, processes."""

import os
import sys


class Watch:
    """As a context, lists in ``events`` what leaves the process, but for opening the allowed files and program code.

    An audit hook cannot be removed, so it is added once and listens only inside a block.
    """

    SOCKETS_AND_PROCESSES = ("socket.", "subprocess.", "os.exec", "os.fork", "os.posix_spawn", "os.system", "os.spawn",
                             "urllib.", "http.", "ftplib.")
    CHANGES = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "shutil.")
    active = None

    def __init__(self, allowed=()):
        self.allowed, self.events = {os.devnull, *map(str, allowed)}, []

    def __enter__(self):
        if not getattr(Watch, "installed", False):
            sys.addaudithook(Watch.hear)
            Watch.installed = True
        Watch.active = self
        return self

    def __exit__(self, *exception):
        Watch.active = None

    @staticmethod
    def hear(event, args):
        self = Watch.active
        if self is None:
            return
        if event == "open":
            path = args[0].decode() if isinstance(args[0], bytes) else str(args[0])
            is_code = path.startswith((sys.prefix, sys.base_prefix)) or path.endswith((".py", ".pyc"))
            if path not in self.allowed and not isinstance(args[0], int) and not is_code:
                self.events.append((event, path))
        elif event.startswith(self.SOCKETS_AND_PROCESSES + self.CHANGES):
            self.events.append((event, str(args)[:200]))
