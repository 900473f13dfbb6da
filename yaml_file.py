"""Strict YAML: repeated keys and aliases are errors, and size and depth are bounded."""

from pathlib import Path

import yaml

from models import InputError, MissingFileError

MAX_BYTES = 2**20
MAX_DEPTH = 20


class _Loader(yaml.SafeLoader):
    depth = 0

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):  # a few lines of them can stand for billions of values
            raise yaml.MarkedYAMLError(problem="aliases (*name) are not supported; repeat the value",
                                       problem_mark=self.peek_event().start_mark)
        if self.depth == MAX_DEPTH:
            raise yaml.MarkedYAMLError(problem=f"values are nested more than {MAX_DEPTH} deep",
                                       problem_mark=self.peek_event().start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node, deep=False):
        names = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            name = (key.tag, str(key.value))
            if name in names:
                raise yaml.MarkedYAMLError(problem=f"the key {key.value} occurs twice", problem_mark=key.start_mark)
            names.add(name)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path):
    """The content of a YAML file.

    Raises:
        MissingFileError: there is no such file.
        InputError: it is not YAML, repeats a key, uses aliases, or is too large or too deep; the line is named.
        OSError: it cannot be read.
    """
    if not path.is_file():  # opening a pipe could block forever
        raise MissingFileError(f"{path} does not exist or is not a regular file")
    if path.stat().st_size > MAX_BYTES:
        raise InputError(f"{path} has over {MAX_BYTES} bytes, too many for a file of settings")
    try:
        return yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: bytes that are not UTF-8, a date or number out of range
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or str(error)
        where = f"line {mark.line + 1}: " if mark else ""
        raise InputError(f"{path} is not a YAML file that can be read: {where}{problem.splitlines()[0]}") from None
