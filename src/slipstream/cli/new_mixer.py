"""slipstream new-mixer NAME --like OTHER: a file to begin from, that already keeps every law."""

from __future__ import annotations

import re
from pathlib import Path

import typer

from slipstream.core.cards import Card, card, cards
from slipstream.core.errors import InputError
from slipstream.core.files import write_text


def add(app: typer.Typer) -> None:
    app.command("new-mixer")(new_mixer)


def new_mixer(
    name: str = typer.Argument(..., help="the new registry name, in snake_case"),
    like: str = typer.Option("linear_transformer", help="the mixer to begin from; see slipstream list"),
    folder: str = typer.Option(".", "--dir", help="where to put NAME.py"),
) -> None:
    """Begin a new architecture: one file, a working copy of another's, to be changed step by step with the laws beside it.

    Examples:

      slipstream new-mixer my_rule --like gated_deltanet

      slipstream check ./my_rule.py
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise InputError(f"{name!r} is no registry name; use lower case, digits and underscores, like my_rule")
    if name in cards():
        raise InputError(f"{name!r} is taken by {cards()[name].path}; choose another name")
    target = Path(folder) / f"{name}.py"
    if target.exists():
        raise InputError(f"{target} exists; choose another name or --dir")
    write_text(target, scaffold(card(like), name))
    typer.echo(
        f"wrote {target}, begun from {like}\nnext: change its equation and its reference together, then  slipstream check {target}"
    )
    typer.echo(
        f'to use it by name, put it into a package with  [project.entry-points."slipstream.mixers"]  {name} = "your_package.{name}"'
    )


def scaffold(other: Card, name: str) -> str:
    """The other mixer's file under the new name and class."""
    class_name = "".join(word.capitalize() for word in name.split("_"))
    source = other.path.read_text(encoding="utf-8")
    source = source.replace(
        other.title, f"{class_name}: say here what it is (begun from {other.name}: {other.title})", 1
    )
    source = re.sub(rf"\b{other.class_name}\b", class_name, source)
    return source.replace(f'name="{other.name}"', f'name="{name}"')
