"""The zerofit command: parse, call, print, and leave with the right exit status."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from launcher import __version__
from launcher.cli_options import (
    BatchOption,
    ExportKind,
    GpuOption,
    GpusPerNodeOption,
    JsonOption,
    LengthOption,
    MatrixContextsOption,
    MatrixCsvOption,
    MatrixModelsOption,
    MatrixOption,
    MatrixPngOption,
    MethodOption,
    ModelOption,
    NodesOption,
    OutputDirOption,
    RecipeArgs,
    RunArg,
    recipe_options,
)
from launcher.console import err, out, say, say_aside, show_error
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
    epilog=(
        "Exit status: 0 done, 2 bad input, 3 does not fit, 4 the job failed, "
        "130 interrupted (128 + the signal)."
    ),
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def main() -> NoReturn:
    """Run the command line; errors that a user can mend are printed without a traceback."""
    try:
        # Without standalone mode typer.Exit does not come out, nor does Ctrl-C, which typer
        # makes an Exit(130): the exit code is returned.
        exit_code = app(standalone_mode=False)
        sys.stdout.flush()
        if exit_code == 130:
            err.print("interrupted")
    except LauncherError as error:
        show_error(error)
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, typer.Abort):  # before typer has begun, or after it
        err.print("interrupted")
        sys.exit(130)
    except BrokenPipeError:
        # The reader of a pipe has enough: leave as programs in a pipe do.
        sys.stderr.close()
        sys.exit(141)
    except Exception as error:
        # Typer's vendored click raises its own errors; they know how to show themselves.
        if not hasattr(error, "show"):
            raise
        error.show()
        sys.exit(2)
    sys.exit(exit_code if isinstance(exit_code, int) else 0)


def _show_version(is_wanted: bool) -> None:
    if is_wanted:
        print(f"zerofit {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    _version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    pass


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
    matrix: MatrixOption = False,
    models: MatrixModelsOption = None,
    contexts: MatrixContextsOption = None,
    csv: MatrixCsvOption = None,
    png: MatrixPngOption = None,
) -> None:
    """Predict memory and time, choose the strategy, and say why.

    Nothing is started. Exit status 3 when no strategy fits. With --matrix: the best strategy
    for each model and each length, as a table, JSON, CSV or a picture.
    """
    if matrix or models or contexts or csv or png:
        options = recipe_options(
            model, method, max_seq_len, global_batch_size, gpu, nodes, gpus_per_node
        )
        _plan_matrix(
            args, options, models=models, contexts=contexts, csv=csv, png=png, as_json=as_json
        )
        return
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
    say(f"wrote {path}; next: zerofit plan {path}")


@app.command()
def render(
    args: RecipeArgs = None,
    output_dir: OutputDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write a run's files (DeepSpeed config, job script, plan) and start nothing.

    `bash RUN/job.sh` then tokenises the data and trains.
    """
    from launcher.launch import create_run
    from launcher.run_dir import JOB_SCRIPT

    prepared = _fitting(args, as_json=as_json)
    run_dir, _, _ = create_run(prepared, output_dir)
    script = run_dir / JOB_SCRIPT
    if as_json:
        print(json.dumps({"run_dir": str(run_dir), "job_script": str(script)}))
    else:
        say(f"wrote {run_dir}; start it with: bash {script}")


@app.command()
def train(
    args: RecipeArgs = None,
    output_dir: OutputDirOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would run; write and start nothing.")
    ] = False,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="Print JSON at the end; what the job prints goes to stderr."),
    ] = False,
) -> None:
    """Plan, write the run directory, and train on this machine or a hostfile's hosts.

    Ctrl-C ends all ranks. Exit status 3 when no strategy fits, 4 when the job failed.
    """
    from launcher.launch import describe_job

    if dry_run:
        say(describe_job(_fitting(args), output_dir))
        return
    run_dir = _train(args, output_dir, as_json=as_json)
    if as_json:
        print(json.dumps({"run_dir": str(run_dir), "state": "finished"}))
    else:
        say(f"finished; next: zerofit report {run_dir}")


@app.command()
def report(run: RunArg, as_json: JsonOption = False) -> None:
    """Compare predicted with measured memory and time, for every rank and phase.

    Also writes report.md, report.json, report.html and loss.png into the run directory.
    """
    from launcher.report.files import write_report

    made = write_report(run)
    if as_json:
        print(json.dumps(made.json_value, indent=1))
    else:
        out.print(made.terminal)
        if made.paths:
            say(f"wrote {', '.join(str(path) for path in made.paths)}")


@app.command()
def export(
    run: RunArg,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="New folder.")] = None,
    kind: Annotated[
        ExportKind, typer.Option(help="The adapter, or the base model with it merged in.")
    ] = ExportKind.adapter,
    as_json: JsonOption = False,
) -> None:
    """Write the trained weights as a Hugging Face folder, and verify them.

    Checked: every tensor is there, none is empty or NaN, the folder loads again, and the logits
    on a prompt equal the trained model's. With --kind merged there is also a folder "merged"
    below it, with the whole model.
    """
    from launcher.dispatch.worker_command import run_worker
    from launcher.run_dir import EXPORT, check_is_run

    check_is_run(run)
    target = output or run / EXPORT / kind.value
    flags = ["--run-dir", str(run), "--out", str(target)]
    flags += ["--merge"] if kind is ExportKind.merged else []
    result = run_worker("launcher.worker.export", flags)
    if as_json:
        print(json.dumps(result, indent=1))
        return
    say(f"exported and verified: {result['out']}")
    for check in result["checks"]:
        say(f"  {check['name']}: {check['result']}")


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
        out.print(render_comparison(comparison))


@app.command()
def doctor(as_json: JsonOption = False) -> None:
    """Check this machine: GPUs, driver, versions, compilers, memory, disk, limits."""
    from launcher.dispatch.doctor import render_checks, run_checks

    checks = run_checks()
    if as_json:
        print(json.dumps([check.to_json() for check in checks], indent=1))
    else:
        out.print(render_checks(checks))
    if any(check.status == "fail" for check in checks):
        raise typer.Exit(2)


@app.command()
def demo(
    output_dir: OutputDirOption = None,
) -> None:
    """Fine-tune a real model (SmolLM2-135M) on real text, on this machine, in minutes."""
    from launcher.demo import write_demo_recipe
    from launcher.prepare import resolve_cluster
    from launcher.recipe import ClusterSection

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


def _train(args: list[str] | None, output_dir: Path | None, *, as_json: bool = False) -> Path:
    from launcher.launch import train_run

    # With --json, stdout is for the result alone.
    show, stream = (say_aside, sys.stderr) if as_json else (say, sys.stdout)
    prepared = _fitting(args, as_json=as_json)
    return train_run(prepared, output_dir, say=show, console=stream.buffer)


def _fitting(args: list[str] | None, *, as_json: bool = False) -> Any:
    """Return what is prepared; when it does not fit, show the plan and leave."""
    prepared = _prepare(args)
    if not prepared.plan.fits:
        _show_plan(prepared.plan, as_json=as_json, show_all=False)
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

    options = recipe_options(
        model, method, max_seq_len, global_batch_size, gpu, nodes, gpus_per_node
    )
    recipe, source = read_recipe(args or [], {**options, "data.path": data})
    return prepare(recipe, source=source)


def _plan_matrix(
    args: list[str] | None,
    options: dict[str, str | None],
    *,
    models: str | None,
    contexts: str | None,
    csv: Path | None,
    png: Path | None,
    as_json: bool,
) -> None:
    from launcher.planning.matrix import matrix_to_csv, matrix_to_json
    from launcher.planning.matrix_view import draw_matrix, render_matrix
    from launcher.prepare_matrix import prepare_matrix, read_matrix_recipe, write_output

    recipe, source, names = read_matrix_recipe(args or [], options, models=models)
    made = prepare_matrix(recipe, source=source, models=names, contexts=contexts)
    if csv is not None:
        write_output(csv, matrix_to_csv(made).encode())
    if png is not None:
        write_output(png, draw_matrix(made))
    if as_json:
        print(json.dumps(matrix_to_json(made), indent=1))
    else:
        out.print(render_matrix(made))


def _show_plan(plan_made: Any, *, as_json: bool, show_all: bool) -> None:
    from launcher.planning.plan import plan_to_json
    from launcher.planning.view import render_plan

    if as_json:
        print(json.dumps(plan_to_json(plan_made), indent=1))
    else:
        out.print(render_plan(plan_made, show_all=show_all))


if __name__ == "__main__":
    main()
