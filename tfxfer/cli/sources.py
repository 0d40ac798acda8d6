"""`tfxfer sources [NAME]`."""

from typing import Annotated, Any

import typer

from tfxfer.cli.show import new_table, print_json, quiet_libraries, stdout
from tfxfer.errors import InputError
from tfxfer.sources.catalog import SPELLINGS, get_source, is_available, list_sources

NAME = "sources"
HELP = "List the pretrained sources, or show the card and the blocks of one."


def run(
    name: Annotated[str | None, typer.Argument(help="Name of a source, or another spelling of one.")] = None,
    weights: Annotated[str | None, typer.Option(help="File with its weights, where they are not its own.")] = None,
    input_range: Annotated[str | None, typer.Option(help="What it wants pixels scaled to.")] = None,
    partial: Annotated[
        bool, typer.Option("--partial", help="Load weights in part where not all fit; the report says which.")
    ] = False,
    trust_custom_objects: Annotated[
        list[str] | None,
        typer.Option(help="Module of your own code that custom objects in a model file may come from."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    if name:
        quiet_libraries()
        from tfxfer.workflow.inspecting import describe_source

        card = get_source(
            name, weights=weights, input_range=input_range or "", partial=partial,
            trusted=tuple(trust_custom_objects or ()),
        )  # fmt: skip
        found = describe_source(card)
        print_json(found) if json else _print_card(name, found)
        return
    rows = [{**card.to_dict(), "available_offline": is_available(card)} for card in list_sources()]
    if weights or input_range or partial or trust_custom_objects:
        raise InputError("Options about a source need its name: tfxfer sources NAME.")
    if json:
        print_json(rows)
        return
    table = new_table("name", "kind", "parameters", "input", "blocks", "licence", "offline")
    for row in rows:
        table.add_row(
            row["name"], row["kind"], f"{row['num_parameters'] / 1e6:.2f} M",
            f"{row['image_size_px']} px", str(len(row["blocks"])), row["licence"],
            "yes" if row["available_offline"] else "no",
        )  # fmt: skip
    stdout.print(table)
    stdout.print(SPELLINGS)


def _print_card(name: str, card: dict[str, Any]) -> None:
    blocks, report = card.pop("blocks"), card.pop("load_report", None)
    table = new_table("", "", title=name, show_header=False)
    for key, value in card.items():
        if value not in ("", [], {}, 0, False):
            table.add_row(
                key, "\n".join(f"{k}: {v}" for k, v in value.items()) if isinstance(value, dict) else _text(value)
            )
    stdout.print(table)
    if report:
        stdout.print(report["text"], markup=False)
    listed = new_table("block", "layers", "parameters", "in all")
    total = 0
    for block in blocks:
        total += block["num_parameters"]
        listed.add_row(block["name"], str(block["num_layers"]), f"{block['num_parameters']:,}", f"{total:,}")
    stdout.print(listed)


def _text(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
