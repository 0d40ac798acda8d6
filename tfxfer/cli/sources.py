"""`tfxfer sources [NAME]`."""

from typing import Annotated

import typer

from tfxfer.cli.show import new_table, print_json, stdout
from tfxfer.sources.catalog import get_source, list_sources

NAME = "sources"
HELP = "List the pretrained sources, or show the card of one."


def run(
    name: Annotated[str | None, typer.Argument(help="Name of a source.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    cards = [get_source(name)] if name else list(list_sources())
    if json:
        rows = [card.to_dict() for card in cards]
        print_json(rows[0] if name else rows)
        return
    if name:
        table = new_table("", "", title=name, show_header=False)
        for key, value in cards[0].to_dict().items():
            table.add_row(
                key, "\n".join(f"{k}: {v}" for k, v in value.items()) if isinstance(value, dict) else _text(value)
            )
        stdout.print(table)
        return
    table = new_table("name", "what", "input", "blocks", "licence")
    for card in cards:
        table.add_row(card.name, card.title, f"{card.image_size_px} px", str(len(card.blocks)), card.licence)
    stdout.print(table)


def _text(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
