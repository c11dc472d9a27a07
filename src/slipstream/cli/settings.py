"""One schema for Python, YAML and the command line: a verb's options are the fields of its Config.

Every such verb also takes -c FILE.yaml, --set key=value and --print-config; later ones win: file, --set, options.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_origin

import typer
import yaml

from slipstream.core.config import Config
from slipstream.core.errors import InputError

GIVEN = {
    "config_file": typer.Option(None, "-c", "--config", help="settings from a YAML file; options win over it"),
    "set_": typer.Option([], "--set", metavar="KEY=VALUE", help="set any field by its name; may be repeated"),
    "print_config": typer.Option(
        False, "--print-config", help="print the settings this call would use, as YAML, and stop"
    ),
}


def verb(
    app: typer.Typer, name: str, config: type[Config], run: Callable[[Any], None], positional: tuple[str, ...] = ()
) -> None:
    """Add `name` to the app: options from the config's fields (their descriptions are the help), then run(settings)."""

    def command(**values: Any) -> None:
        file, pairs, show = values.pop("config_file"), values.pop("set_"), values.pop("print_config")
        settings = resolve(config, file, pairs, {k: v for k, v in values.items() if v is not None})
        if show:
            typer.echo(yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False), nl=False)
        else:
            run(settings)

    parameters = [_parameter(n, f, n in positional) for n, f in config.model_fields.items()]
    parameters.sort(key=lambda p: p.name not in positional)
    types = {"config_file": Path | None, "set_": list[str], "print_config": bool}
    parameters += [_keyword(n, types[n], option) for n, option in GIVEN.items()]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    command.__doc__ = inspect.cleandoc(run.__doc__ or "")
    app.command(name)(command)


def _keyword(name: str, type_: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=type_)


def _parameter(name: str, field: Any, positional: bool) -> inspect.Parameter:
    """An option that is left to pydantic to read; bools become flags, lists may be repeated."""
    flag, help_ = "--" + name.removeprefix("as_").replace("_", "-"), field.description or ""
    if positional:
        return _keyword(name, str | None, typer.Argument(None, help=help_, show_default=False))
    if field.annotation is bool:
        return _keyword(
            name, bool | None, typer.Option(None, f"{flag}/--no-{flag[2:]}", help=help_, show_default=False)
        )
    if get_origin(field.annotation) is list:
        repeated = typer.Option(None, flag, help=f"{help_} (may be repeated)", show_default=False)
        return _keyword(name, list[str] | None, repeated)
    shown = "" if field.default is None or field.is_required() else f" (default: {_plain(field.default)})"
    return _keyword(name, str | None, typer.Option(None, flag, help=help_ + shown, show_default=False))


def _plain(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def resolve(config: type[Config], file: Path | None, pairs: list[str], options: dict[str, Any]) -> Config:
    """Settings from a YAML file, then key=value pairs, then options. Raises InputError for what is unknown or malformed."""
    values = _read_yaml(file) if file else {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise InputError(f"--set takes key=value; got {pair!r}")
        values[key.strip()] = yaml.safe_load(value)
    return config(**(values | options))


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except FileNotFoundError:
        raise InputError(f"no settings file {file}; --print-config > {file} writes one") from None
    except yaml.YAMLError as error:
        raise InputError(f"{file} is no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise InputError(f"{file} must hold key: value lines; it holds a {type(values).__name__}")
    return values
