"""The zerofit command: parse, call, print, and leave with the right exit status."""

from __future__ import annotations

import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console

from launcher import __version__
from launcher.errors import DoesNotFitError, LauncherError
from launcher.strategy import Method

app = typer.Typer(
    name="zerofit",
    help=(
        "Fine-tune language models on several GPUs with DeepSpeed ZeRO: predict memory and "
        "time, choose the strategy, run it, and compare what was measured.\n\n"
        "Start with: zerofit plan --model llama2-7b --method lora --max-seq-len 4096 "
        "--gpu A100-80GB --gpus-per-node 8"
    ),
    epilog="Exit status: 0 done, 2 bad input, 3 does not fit, 4 the job failed.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

_out = Console(highlight=False, soft_wrap=False)
_err = Console(stderr=True, highlight=False)

RecipeArgs = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[RECIPE] [KEY=VALUE]...",
        help="A recipe file, and values that override it: strategy.zero_stage=2",
        show_default=False,
    ),
]
ModelOption = Annotated[
    str | None,
    typer.Option("--model", help="Catalogue name, local folder or hub id.", show_default=False),
]
MethodOption = Annotated[
    Method | None, typer.Option("--method", help="What to train.", show_default=False)
]
LengthOption = Annotated[
    str | None,
    typer.Option("--max-seq-len", metavar="TOKENS", help="Longest sequence.", show_default=False),
]
BatchOption = Annotated[
    str | None,
    typer.Option(
        "--global-batch-size",
        metavar="N",
        help="Samples per optimizer step, all GPUs together.",
        show_default=False,
    ),
]
GpuOption = Annotated[
    str | None,
    typer.Option("--gpu", help="V100-32GB, A100-80GB, H100 …; default: this machine's."),
]
NodesOption = Annotated[
    str | None, typer.Option("--nodes", metavar="N", help="Nodes.", show_default=False)
]
GpusPerNodeOption = Annotated[
    str | None,
    typer.Option("--gpus-per-node", metavar="N", help="GPUs on each.", show_default=False),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]
RunArg = Annotated[Path, typer.Argument(help="A run directory.", show_default=False)]


class ExportKind(StrEnum):
    """What ``zerofit export`` writes."""

    adapter = "adapter"
    merged = "merged"


def main() -> NoReturn:
    """Run the command line; errors that a user can mend are printed without a traceback."""
    try:
        app(standalone_mode=False)
    except LauncherError as error:
        _err.print(f"[bold red]error:[/] {_escape(str(error))}", soft_wrap=True)
        sys.exit(error.exit_code)
    except typer.Exit as leaving:
        sys.exit(leaving.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        _err.print("interrupted")
        sys.exit(130)
    except BrokenPipeError:
        # The reader of a pipe has enough: leave as programs in a pipe do.
        sys.stderr.close()
        sys.exit(141)
    except Exception as error:
        if not _is_usage_error(error):
            raise
        error.show()  # type: ignore[attr-defined]
        sys.exit(2)
    sys.exit(0)


@app.command()
def plan(  # noqa: PLR0917
    args: RecipeArgs = None,
    model: ModelOption = None,
    method: MethodOption = None,
    max_seq_len: LengthOption = None,
    global_batch_size: BatchOption = None,
    gpu: GpuOption = None,
    nodes: NodesOption = None,
    gpus_per_node: GpusPerNodeOption = None,
    as_json: JsonOption = False,
    show_all: Annotated[bool, typer.Option("--all", help="Show every rejected kind.")] = False,
) -> None:
    """Predict memory and time, choose the strategy, and say why.

    Nothing is started. Exit status 3 when no strategy fits.
    """
    prepared = _prepare(
        args, model, method, max_seq_len, global_batch_size, gpu, nodes, gpus_per_node
    )
    _show_plan(prepared.plan, as_json=as_json, show_all=show_all)
    if not prepared.plan.fits:
        raise typer.Exit(DoesNotFitError.exit_code)


@app.command()
def init(  # noqa: PLR0917
    path: Annotated[Path, typer.Argument(help="Recipe file to write.")] = Path("recipe.yaml"),
    model: ModelOption = None,
    method: MethodOption = None,
    max_seq_len: LengthOption = None,
    global_batch_size: BatchOption = None,
    gpu: GpuOption = None,
    nodes: NodesOption = None,
    gpus_per_node: GpusPerNodeOption = None,
    data: Annotated[str | None, typer.Option(help="Training data: a JSON Lines file.")] = None,
) -> None:
    """Write a recipe for a model, a length and hardware; edit it, then plan or train it."""
    from launcher.init_recipe import new_recipe_text
    from launcher.run_dir import create_file

    prepared = _prepare(
        None, model, method, max_seq_len, global_batch_size, gpu, nodes, gpus_per_node, data=data
    )
    create_file(path, new_recipe_text(prepared.recipe, prepared.plan))
    _out.print(f"wrote {_escape(str(path))}; next: zerofit plan {_escape(str(path))}")


@app.command()
def render(
    args: RecipeArgs = None,
    output_dir: Annotated[
        Path | None, typer.Option("--output-dir", help="Run directory to create.")
    ] = None,
) -> None:
    """Write a run's files (DeepSpeed config, job script, plan) and start nothing.

    `bash RUN/job.sh` then runs it, with or without zerofit.
    """
    from launcher.launch import create_run

    run_dir, _, _ = create_run(_prepare(args), output_dir)
    _out.print(f"wrote {_escape(str(run_dir))}; start it with: bash {_escape(str(run_dir))}/job.sh")


@app.command()
def train(
    args: RecipeArgs = None,
    output_dir: Annotated[
        Path | None, typer.Option("--output-dir", help="Run directory to create.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would run; write and start nothing.")
    ] = False,
) -> None:
    """Plan, write the run directory, and train on this machine or a hostfile's hosts."""
    from launcher.launch import describe_job

    if dry_run:
        _out.print(describe_job(_fitting(args), output_dir), markup=False, soft_wrap=True)
        return
    run_dir = _train(args, output_dir)
    _out.print(f"finished; next: zerofit report {_escape(str(run_dir))}")


@app.command()
def report(
    run: RunArg,
    as_json: JsonOption = False,
) -> None:
    """Compare predicted with measured memory and time, for every rank and phase.

    Also writes report.md, report.json, report.html and loss.png into the run directory.
    """
    from launcher.report.files import write_report

    made = write_report(run)
    if as_json:
        print(json.dumps(made.json_value, indent=1))
    else:
        _out.print(made.terminal)
        _out.print(f"wrote {', '.join(_escape(str(path)) for path in made.paths)}")


@app.command()
def export(
    run: RunArg,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="New folder.")] = None,
    kind: Annotated[
        ExportKind, typer.Option(help="The adapter, or the base model with it merged in.")
    ] = ExportKind.adapter,
) -> None:
    """Write the trained weights as a Hugging Face folder, and verify them.

    Checked: every tensor is there, none is empty or NaN, the folder loads again, and the
    logits on a prompt equal the trained model's.
    """
    from launcher.dispatch.worker_command import run_worker
    from launcher.run_dir import EXPORT

    target = output or run / EXPORT / kind.value
    flags = ["--merge"] if kind is ExportKind.merged else []
    result = run_worker(
        "launcher.worker.export", ["--run-dir", str(run), "--out", str(target), *flags]
    )
    _out.print(f"exported and verified: {_escape(str(target))}")
    for name, value in result.items():
        if isinstance(value, str | int | float | bool):
            _out.print(f"  {name}: {value}", markup=False)


@app.command()
def trace(
    args: RecipeArgs = None,
    rank: Annotated[int, typer.Option(help="Which rank of the planned job.", min=0)] = 0,
    scale: Annotated[
        int, typer.Option(help="Divide the model's widths by this; bytes are scaled back.", min=1)
    ] = 16,
    as_json: JsonOption = False,
) -> None:
    """Run the real DeepSpeed engine as one rank of the job, on this processor, and count bytes.

    No GPU is needed. It shows how far the closed form of `plan` is from the engine itself.
    """
    from launcher.engine_trace import render_comparison, trace_engine_of

    comparison = trace_engine_of(_prepare(args), rank=rank, scale=scale)
    if as_json:
        print(json.dumps(comparison.to_json(), indent=1))
    else:
        _out.print(render_comparison(comparison))


@app.command()
def doctor(as_json: JsonOption = False) -> None:
    """Check this machine: GPUs, driver, versions, compilers, memory, disk, limits."""
    from launcher.dispatch.doctor import render_checks, run_checks

    checks = run_checks()
    if as_json:
        print(json.dumps([check.to_json() for check in checks], indent=1))
    else:
        _out.print(render_checks(checks))
    if any(check.status == "fail" for check in checks):
        raise typer.Exit(2)


@app.command()
def demo(
    output_dir: Annotated[
        Path | None, typer.Option("--output-dir", help="Run directory to create.")
    ] = None,
) -> None:
    """Fine-tune a real model (SmolLM2-135M) on real text, on this machine, in minutes."""
    from launcher.demo import write_demo_recipe
    from launcher.prepare import resolve_cluster
    from launcher.recipe import ClusterSection

    def say(line: str) -> None:
        _out.print(line, markup=False, soft_wrap=True)

    world_size = resolve_cluster(ClusterSection()).world_size
    recipe = str(write_demo_recipe(world_size=world_size, say=say))
    say(f"\n$ zerofit plan {recipe}")
    plan([recipe])
    say(f"\n$ zerofit train {recipe}")
    run = _train([recipe], output_dir)
    say(f"\n$ zerofit report {run}")
    report(run)
    say(f"\n$ zerofit export {run}")
    export(run)


@app.command()
def version(as_json: JsonOption = False) -> None:
    """Print the version of zerofit."""
    print(json.dumps({"zerofit": __version__}) if as_json else f"zerofit {__version__}")


def _train(args: list[str] | None, output_dir: Path | None) -> Path:
    from launcher.launch import create_run, start_run

    run_dir, backend, request = create_run(_fitting(args), output_dir)
    _out.print(f"run directory: {_escape(str(run_dir))}", soft_wrap=True)
    start_run(
        run_dir,
        backend,
        request,
        say=lambda line: _out.print(line, markup=False, soft_wrap=True),
    )
    return run_dir


def _fitting(args: list[str] | None) -> Any:
    """Return what is prepared; when it does not fit, show the plan and leave."""
    prepared = _prepare(args)
    if not prepared.plan.fits:
        _show_plan(prepared.plan, as_json=False, show_all=False)
        raise typer.Exit(DoesNotFitError.exit_code)
    return prepared


def _prepare(  # noqa: PLR0917
    args: list[str] | None,
    model: str | None = None,
    method: Method | None = None,
    max_seq_len: str | None = None,
    global_batch_size: str | None = None,
    gpu: str | None = None,
    nodes: str | None = None,
    gpus_per_node: str | None = None,
    *,
    data: str | None = None,
) -> Any:
    from launcher.prepare import prepare, read_recipe

    options = {
        "model.name_or_path": model,
        "method": method.value if method else None,
        "max_seq_len": max_seq_len,
        "optim.global_batch_size": global_batch_size,
        "cluster.gpu": gpu,
        "cluster.num_nodes": nodes,
        "cluster.gpus_per_node": gpus_per_node,
        "data.path": data,
    }
    recipe, source = read_recipe(args or [], options)
    return prepare(recipe, source=source)


def _show_plan(plan_made: Any, *, as_json: bool, show_all: bool) -> None:
    from launcher.planning.plan import plan_to_json
    from launcher.planning.view import render_plan

    if as_json:
        print(json.dumps(plan_to_json(plan_made), indent=1))
    else:
        _out.print(render_plan(plan_made, show_all=show_all))


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def _is_usage_error(error: Exception) -> bool:
    """Typer's vendored click raises its own errors; they know how to show themselves."""
    return hasattr(error, "show") and hasattr(error, "exit_code")


if __name__ == "__main__":
    main()
