"""An extension of griffe, which reads the sources for the API pages."""

from __future__ import annotations

import re
from typing import Any

import griffe

# :class:`name`, :func:`~module.name`, … → `name`; a code block is announced by one colon.
_ROLE = re.compile(r":(?:class|func|meth|mod|attr|data|exc):`~?([^`]+)`")
_ANNOUNCED = re.compile(r"(?<=\S)::$", re.MULTILINE)


def as_markdown(obj: griffe.Object) -> None:
    """The docstrings of an object and of what stands in it."""
    if obj.docstring:
        obj.docstring.value = _ANNOUNCED.sub(":", _ROLE.sub(r"`\1`", obj.docstring.value))
    for member in obj.members.values():
        if isinstance(member, griffe.Object):  # an alias is another module's
            as_markdown(member)


class PublicNames(griffe.Extension):
    """The few signs of reStructuredText in our docstrings as Markdown, and public names as Python
    sees them."""

    def on_package(self, *, pkg: griffe.Module, loader: griffe.GriffeLoader, **kwargs: Any) -> None:
        loader.resolve_aliases(implicit=True, external=False)
        as_markdown(pkg)
        # `ops.attention` is the function that the package imports, not its module.
        for module in [m for m in pkg.modules.values() if m.exports]:
            for name in map(str, module.exports or ()):
                member = module.members.get(name)
                if member is not None and member.is_module and name in member.members:
                    alias = griffe.Alias(name, member.members[name], parent=module)
                    module.set_member(name, alias)
