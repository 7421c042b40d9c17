"""A settings class as options of a command and as a table: each setting is declared once.

A field's ``msgspec.Meta`` says in ``description`` what it means; ``extra`` may name its
``variable``, and the ``type`` and ``default`` that it has on a command line where those are others.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_type_hints

import msgspec

if TYPE_CHECKING:
    import typer

_Function = TypeVar("_Function", bound=Callable[..., Any])


class Option(msgspec.Struct, frozen=True):
    """One setting, as it is typed. ``default`` is msgspec.NODEFAULT where it must be given."""

    name: str
    type: Any
    default: Any
    meaning: str
    variable: str

    @property
    def flag(self) -> str:
        """Its name on a command line; what is on by default can be switched off by one."""
        name = self.name.replace("_", "-")
        return f"--{name}/--no-{name}" if self.default is True else f"--{name}"


def options(settings: type[msgspec.Struct], prefix: str) -> Iterator[Option]:
    """What can be set, in the class's order; ``prefix`` begins the variables' names."""
    hints = get_type_hints(settings, include_extras=True)
    for field in msgspec.structs.fields(settings):
        meta = hints[field.name].__metadata__[0]
        extra = meta.extra or {}
        yield Option(
            field.name,
            extra.get("type", hints[field.name].__origin__),
            extra.get("default", field.default),
            meta.description,
            extra.get("variable", prefix + field.name.upper()),
        )


def token_in(file: str) -> str:
    """The token that a file holds, without the space around it. Raises ValueError naming what is
    wrong with the file."""
    try:
        token = Path(file).expanduser().read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise ValueError(f"the token file {file} cannot be read: {reason}") from None
    if not token:
        raise ValueError(f"the token file {file} is empty")
    return token


def command(name: str, version: str, help: str) -> typer.Typer:
    """A command of that name, which tells its version and has others."""
    import typer

    app = typer.Typer(
        help=help, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
    )

    def tell(wanted: bool) -> None:
        if wanted:
            typer.echo(f"{name} {version}")
            raise typer.Exit

    told = typer.Option(False, "--version", callback=tell, is_eager=True, help="Show the version.")

    @app.callback()
    def root(version: bool = told) -> None:
        pass

    return app


def typed(
    settings: type[msgspec.Struct], prefix: str, *names: str, **defaults: Any
) -> Callable[[_Function], _Function]:
    """Give a Typer command these settings as its first options, passed by their names.

    All of them, or those in ``names``; ``defaults`` are for this command alone.
    """
    import typer

    keyword = inspect.Parameter.KEYWORD_ONLY

    def parameter(option: Option) -> inspect.Parameter:
        default = defaults.get(option.name, option.default)
        required = default is msgspec.NODEFAULT
        declared = typer.Option(
            option.flag, envvar=option.variable, help=option.meaning, show_default=default != ""
        )
        return inspect.Parameter(
            option.name,
            keyword,
            default=inspect.Parameter.empty if required else default,
            annotation=Annotated[option.type, declared],
        )

    def decorate(command: _Function) -> _Function:
        chosen = {
            option.name: parameter(option)
            for option in options(settings, prefix)
            if option.name in names or not names
        }
        own = [
            p.replace(kind=keyword)
            for name, p in inspect.signature(command, eval_str=True).parameters.items()
            if name not in chosen and p.kind is not inspect.Parameter.VAR_KEYWORD
        ]
        signature = inspect.Signature([*chosen.values(), *own])
        command.__signature__ = signature  # type: ignore[attr-defined]
        return command

    return decorate


def table(settings: type[msgspec.Struct], prefix: str, flags: bool) -> str:
    """The settings as a Markdown table, by their flags or by their names."""
    lines = ["| name | default | meaning |", "|---|---|---|"]
    for option in options(settings, prefix):
        default = option.default
        if isinstance(default, bool):
            default = str(default).lower()
        elif default is msgspec.NODEFAULT or default == "":
            default = ""
        else:
            default = f"`{default}`" if isinstance(default, str) else f"{default:g}"
        name = f"`{option.flag}`" if flags else f"`{option.name}`"
        lines.append(f"| {name} | {default} | {option.meaning} |")
    return "\n".join(lines)
