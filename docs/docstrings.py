"""Griffe extensions: what the sources say once, in their own way, is put where the API reference looks for it."""

import ast
import re
from typing import Any

import griffe


class FieldHelp(griffe.Extension):
    """Give each `x: int = field(metadata={"help": "..."})` its help as a docstring."""

    def on_attribute_instance(
        self, *, node: ast.AST | griffe.ObjectNode, attr: griffe.Attribute, **kwargs: Any
    ) -> None:
        """Called by griffe for every attribute that it finds."""
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.value, ast.Call) or attr.docstring:
            return
        given = {keyword.arg: keyword.value for keyword in node.value.keywords}
        metadata = given.get("metadata")
        if not isinstance(metadata, ast.Dict) or ast.unparse(node.value.func) != "field":
            return
        for key, value in zip(metadata.keys, metadata.values, strict=True):
            if isinstance(key, ast.Constant) and key.value == "help" and (text := _text(value, attr.module)):
                # argparse writes a percent sign as two.
                attr.docstring = griffe.Docstring(text.replace("%%", "%"), parent=attr)
        if "default" in given:
            attr.value = ast.unparse(given["default"])
        elif "default_factory" in given:
            attr.value = ast.unparse(given["default_factory"]).removeprefix("lambda: ")


def _text(node: ast.expr, module: griffe.Module) -> str | None:
    """A text that is written out, or the name of one that the module has further up.

    None where it comes from elsewhere, as in options of commands, which the reference does not show.
    """
    if isinstance(node, ast.Name):
        named = module.members[node.id]
        node = ast.parse(str(named.value), mode="eval").body if isinstance(named, griffe.Attribute) else node
    return node.value if isinstance(node, ast.Constant) else None


class Doctests(griffe.Extension):
    """Show a doctest under `Example:` as code: griffe knows the heading in the plural alone."""

    def on_instance(self, *, node: ast.AST | griffe.ObjectNode, obj: griffe.Object, **kwargs: Any) -> None:
        """Called by griffe for every object that it finds."""
        if obj.docstring:
            obj.docstring.value = re.sub(r"^( *)Example:$", r"\1Examples:", obj.docstring.value, flags=re.MULTILINE)
