"""An extension of griffe, which reads the sources for the API pages."""

from __future__ import annotations

import re
from typing import Any

import griffe

# :class:`name`, :func:`~module.name`, … → `name`; a code block is announced by one colon.
_ROLE = re.compile(r":(?:class|func|meth|mod|attr|data|exc):`~?([^`]+)`")
_ANNOUNCED = re.compile(r"(?<=\S)::$", re.MULTILINE)


class PublicNames(griffe.Extension):
    """The few signs of reStructuredText in our docstrings as Markdown, and public names as Python
    sees them."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring:
            text = _ROLE.sub(r"`\1`", obj.docstring.value)
            obj.docstring.value = _ANNOUNCED.sub(":", text)

    def on_package(self, *, pkg: griffe.Module, loader: griffe.GriffeLoader, **kwargs: Any) -> None:
        """``ops.attention`` is the function that the package imports, not its module."""
        loader.resolve_aliases(implicit=True, external=False)
        for module in [m for m in pkg.modules.values() if m.exports]:
            for name in map(str, module.exports or ()):
                member = module.members.get(name)
                if member is not None and member.is_module and name in member.members:
                    alias = griffe.Alias(name, member.members[name], parent=module)
                    module.set_member(name, alias)
