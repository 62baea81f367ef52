"""The commands: arguments in, tables or JSON out. What they do is elsewhere."""

from __future__ import annotations

import contextlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer
from rich.console import Console
from rich.table import Table

import jaxq
from jaxq.cli import formats, grouping, machine
from jaxq.reports import Report
from jaxq.spec import QuantSpec

if TYPE_CHECKING:
    from jaxq.checkpoints import Checkpoint

app = typer.Typer(
    name="jaxq",
    help="Group-wise quantized weights for JAX.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_ERRORS = (ValueError, TypeError, OSError, ImportError)
_WIDE = 1000
# From here on a conversion takes about a second, and shows a bar.
_PROGRESS_BYTES = 1 << 28

Json = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, to stdout.")]
All = Annotated[
    bool, typer.Option("--all", help="A row for every tensor, also for those that differ only in a layer's number.")
]


@contextlib.contextmanager
def _told(as_json: bool) -> Iterator[None]:
    """Errors that are the user's to mend, as one line on stderr (or JSON on stdout), with exit code 1."""
    try:
        yield
    except BrokenPipeError:
        raise
    except _ERRORS as error:
        # What the library calls an argument is an option here.
        text = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error)
        message = re.sub(r"\b(overwrite|dequantize)=True\b", r"--\1", text)
        message = re.sub(r"\b(scale_dtype|groups_of_16)='?(\w+)'?", _as_option, message)
        if as_json:
            print(json.dumps({"error": message}))
        else:
            typer.secho(f"error: {message}", err=True, fg=typer.colors.RED)
        raise typer.Exit(1) from None


def _as_option(found: re.Match[str]) -> str:
    return f"--{found[1].replace('_', '-')} {found[2]}"


def _print(table: Table) -> None:
    """As wide as the terminal; as wide as it is where something else reads it."""
    Console(width=None if sys.stdout.isatty() else _WIDE).print(table)


def _usage(option: str, parse: Any, *values: Any) -> Any:
    """A parsed option; a wrong one ends with exit code 2."""
    try:
        return parse(*values)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=option) from None


def _version(asked: bool) -> None:
    if asked:
        print(f"jaxq {jaxq.__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="Safetensors, MLX, GPTQ or AWQ directory, or a GGUF file.")],
    target: Annotated[Path, typer.Argument(help="The MLX directory to write.")],
    bits: Annotated[int | None, typer.Option(help="Bits of dense weights: 2, 3, 4, 5, 6 or 8.")] = None,
    group_size: Annotated[int | None, typer.Option(help="Weights that share a scale: 32, 64 or 128.")] = None,
    mode: Annotated[str, typer.Option(help="affine, mxfp4, mxfp8 or nvfp4.")] = "affine",
    rule: Annotated[
        list[str] | None,
        typer.Option(help="PATTERN=FORMAT, a regular expression and int4g64, mxfp4 or none; the first that is found."),
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="Cast dense floats: float32, float16 or bfloat16.")] = None,
    scale_dtype: Annotated[
        str | None, typer.Option(help="Scales read from GGUF, GPTQ and AWQ; exact unless given.")
    ] = None,
    requantize: Annotated[
        bool, typer.Option(help="Quantize anew what is quantized otherwise; loses accuracy.")
    ] = False,
    groups_of_16: Annotated[
        str, typer.Option(help="GGUF's groups of 16, which MLX has not: refuse, requantize or keep.")
    ] = "refuse",
    dequantize: Annotated[bool, typer.Option(help="Take formats that are no groups (IQ*, desc_act) as dense.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace TARGET.")] = False,
    show_all: All = False,
    as_json: Json = False,
) -> None:
    """Convert a checkpoint to MLX's format; without --bits, --mode and --rule nothing is quantized anew."""
    from jaxq import checkpoints

    rules = [_usage("--rule", formats.parse_rule, text) for text in rule or []]
    cast_to, scales_to = _usage("--dtype", _dtype, dtype), _usage("--scale-dtype", _dtype, scale_dtype)
    wanted = None
    if bits is not None or group_size is not None or mode != "affine":
        wanted = _usage("--bits, --group-size, --mode", lambda: QuantSpec(bits, group_size, mode))  # type: ignore[arg-type]
    if requantize and wanted is None:
        raise typer.BadParameter("says to what with --bits or --mode", param_hint="--requantize")
    if groups_of_16 not in (choices := get_args(checkpoints.conversion.GroupsOf16)):
        raise typer.BadParameter(f"{groups_of_16!r} is none of {', '.join(choices)}", param_hint="--groups-of-16")
    with _told(as_json):
        opened = checkpoints.open(source, scale_dtype=scales_to, dequantize=dequantize)
        report = checkpoints.convert(
            opened,
            target,
            wanted,
            rules=rules,
            dtype=cast_to,
            requantize=requantize,
            groups_of_16=groups_of_16,  # type: ignore[arg-type]
            overwrite=overwrite,
            progress=not as_json and sys.stderr.isatty() and _stored_bytes(opened) >= _PROGRESS_BYTES,
        )
        _show_report(report, {"source": str(source), "format": opened.format, "target": str(target)}, show_all, as_json)


def _stored_bytes(opened: Checkpoint) -> int:
    return sum(entry.stored_bytes for entry in opened.entries.values())


def _dtype(name: str | None) -> Any:
    if name is None:
        return None
    if name not in ("float32", "float16", "bfloat16"):
        raise ValueError(f"dtype {name!r} is none of float32, float16 and bfloat16")
    return jaxq.checkpoints.safetensors.DTYPES[{"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[name]]


def _show_report(report: Report, about: dict[str, Any], show_all: bool, as_json: bool) -> None:
    totals = {
        "tensors": len(report.rows),
        "quantized": len(report.quantized),
        "weights": report.weights,
        "nbytes": report.nbytes,
        "dense_nbytes": report.dense_nbytes,
        "bits_per_weight": report.bits_per_weight,
    }
    if as_json:
        print(json.dumps(about | totals | {"rows": report.to_dicts()}))
        return
    rows = report.rows
    names = _grouped([row.path for row in rows], [(row.shape, row.format, row.note) for row in rows], show_all)
    columns = *_right("tensors"), "shape", "format", *_right("bytes", "bits/weight", "error"), "note"
    table = Table(_name(), *columns, title=about["target"])
    for name, indices in names:
        row, size = rows[indices[0]], sum(rows[i].nbytes for i in indices)
        errors = sorted({f"{error:.4f}" for i in indices if (error := rows[i].relative_error) is not None})
        shown = " to ".join(errors[:1] + errors[1:][-1:])
        shape, bits = "x".join(map(str, row.shape)), f"{row.bits_per_weight:.2f}"
        table.add_row(name, str(len(indices)), shape, row.format, f"{size:,}", bits, shown, row.note)
    _print(table)
    print(
        f"{totals['quantized']} of {totals['tensors']} tensors quantized: {report.nbytes:,} bytes, "
        f"{report.bits_per_weight:.2f} bits per weight (dense: {report.dense_nbytes:,} bytes)"
    )


def _grouped(names: list[str], like: list[Any], show_all: bool) -> list[tuple[str, list[int]]]:
    """Rows of a table: a name, or several as one, and their indices."""
    return [(name, [i]) for i, name in enumerate(names)] if show_all else grouping.group(names, like)


def _name() -> Any:
    """The column of names, which are never cut."""
    from rich.table import Column

    return Column("tensor", overflow="fold")


def _right(*names: str) -> list[Any]:
    from rich.table import Column

    return [Column(name, justify="right") for name in names]


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="A checkpoint: a directory or a file.")],
    select: Annotated[str | None, typer.Option(help="Only names in which this regular expression is found.")] = None,
    show_all: All = False,
    as_json: Json = False,
) -> None:
    """List a checkpoint's tensors, their formats and sizes. Reads no tensor."""
    from jaxq import checkpoints

    with _told(as_json):
        checkpoint = checkpoints.open(path)
        rows = [machine.entry_row(name, checkpoint.entries[name]) for name in checkpoint.select(select)]
        total = {
            "tensors": len(rows),
            "weights": sum(row["weights"] for row in rows),
            "stored_bytes": sum(row["stored_bytes"] for row in rows),
        }
        if as_json:
            print(json.dumps({"path": str(path), "format": checkpoint.format} | total | {"rows": rows}))
            return
        _print(_inspected(rows, str(path), show_all))
        bits = 8 * total["stored_bytes"] / max(total["weights"], 1)
        print(f"{checkpoint.format}: {len(rows)} tensors, {total['stored_bytes']:,} bytes, {bits:.2f} bits per weight")


def _inspected(rows: list[dict[str, Any]], title: str, show_all: bool) -> Table:
    columns = *_right("tensors"), "shape", "stored as", "loads as", *_right("bytes", "bits/weight")
    table = Table(_name(), *columns, title=title)
    shown = [("x".join(map(str, row["shape"])), row["stored_as"], row["problem"] or row["loads_as"]) for row in rows]
    for name, indices in _grouped([row["name"] for row in rows], shown, show_all):
        size, bits = sum(rows[i]["stored_bytes"] for i in indices), f"{rows[indices[0]]['bits_per_weight']:.2f}"
        table.add_row(name, str(len(indices)), *shown[indices[0]], f"{size:,}", bits)
    return table


@app.command()
def doctor(as_json: Json = False) -> None:
    """Tell what runs here: versions, devices, implementations and instruction sets, and why not."""
    with _told(as_json):
        found = machine.examine()
        if as_json:
            print(json.dumps(found))
            return
        for title, rows in found.items():
            table = Table("", "", title=title, title_justify="left", show_header=False)
            for key, value in machine.flat(rows):
                table.add_row(key, value)
            _print(table)


@app.command()
def bench(
    shape: Annotated[str, typer.Option(help="The weight: OUTxIN.")] = "4096x4096",
    batch: Annotated[list[int] | None, typer.Option(help="Rows of x; several times for several.")] = None,
    format: Annotated[list[str] | None, typer.Option(help="Formats, as in rules; several times for several.")] = None,
    implementation: Annotated[list[str] | None, typer.Option(help="Only these; default: all that are usable.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each, interleaved.")] = 20,
    as_json: Json = False,
) -> None:
    """Time the quantized matrix product on this machine, against the dense one in float32 and bfloat16."""
    specs = [_usage("--format", formats.parse_spec, text) for text in format or ["int4g64", "int8g64", "mxfp4"]]
    n, k = _usage("--shape", machine.parse_shape, shape)
    with _told(as_json):
        rows = machine.bench(n, k, batch or [1, 16], [spec for spec in specs if spec], implementation, repeats)
        if as_json:
            print(json.dumps({"shape": [n, k], "repeats": repeats, "rows": rows}))
            return
        columns = _right("rows of x", "median us", "GB/s of weights", "of dense bfloat16")
        table = Table("weight", "implementation", *columns, title=f"x @ w.T, w {n}x{k}, x bfloat16")
        for row in rows:
            speed, ratio = f"{row['gigabytes_per_second']:.1f}", f"{row['speedup_over_bfloat16']:.2f}x"
            name = row["implementation"]
            table.add_row(row["weight"], name, str(row["batch"]), f"{row['microseconds']:.0f}", speed, ratio)
        _print(table)


if __name__ == "__main__":
    app()
