"""Griffe extensions: what the sources say once, in their own way, is put where the API reference looks for it."""

import ast
import re
from typing import Any

import griffe


class OptionHelp(griffe.Extension):
    """Give each `x: int = option(3, "...")` its default as its value, and its help as a docstring."""

    def on_attribute_instance(
        self, *, node: ast.AST | griffe.ObjectNode, attr: griffe.Attribute, **kwargs: Any
    ) -> None:
        """Called by griffe for every attribute that it finds."""
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.value, ast.Call) or attr.docstring:
            return
        if ast.unparse(node.value.func) == "option":
            default, help_text, *_ = node.value.args
            # Options of commands, which the reference does not show, have texts that are written elsewhere.
            if isinstance(help_text, ast.Constant):
                # argparse writes a percent sign as two.
                attr.docstring = griffe.Docstring(help_text.value.replace("%%", "%"), parent=attr)
            attr.value = ast.unparse(default)


class Doctests(griffe.Extension):
    """Show a doctest under `Example:` as code: griffe knows the heading in the plural alone."""

    def on_instance(self, *, node: ast.AST | griffe.ObjectNode, obj: griffe.Object, **kwargs: Any) -> None:
        """Called by griffe for every object that it finds."""
        if obj.docstring:
            obj.docstring.value = re.sub(r"^( *)Example:$", r"\1Examples:", obj.docstring.value, flags=re.MULTILINE)
