"""The zerofit program: find the command, run it, and leave with the right exit status."""

from __future__ import annotations

import importlib
import json
import sys
from typing import NoReturn

import click

from launcher import __version__
from launcher.commands.options import json_option
from launcher.errors import LauncherError

# In the order of the help; a command's module is imported when the command is needed.
_COMMANDS = {
    "plan": "launcher.commands.plan",
    "init": "launcher.commands.plan",
    "data": "launcher.commands.data",
    "render": "launcher.commands.train",
    "train": "launcher.commands.train",
    "resume": "launcher.commands.resume",
    "submit": "launcher.commands.submit",
    "top": "launcher.commands.top",
    "status": "launcher.commands.jobs",
    "logs": "launcher.commands.jobs",
    "cancel": "launcher.commands.jobs",
    "list": "launcher.commands.jobs",
    "report": "launcher.commands.report",
    "export": "launcher.commands.export",
    "trace": "launcher.commands.trace",
    "bench": "launcher.commands.bench",
    "calibrate": "launcher.commands.calibrate",
    "doctor": "launcher.commands.doctor",
    "hostfile": "launcher.commands.hostfile",
    "demo": "launcher.commands.train",
}


_NAMES_ELSEWHERE = {
    "--num-gpus": "--gpus-per-node", "--gpus": "--gpus-per-node",
    "--nproc-per-node": "--gpus-per-node", "--num-nodes": "--nodes", "--nnodes": "--nodes",
}  # fmt: skip
"""What deepspeed, torchrun and Slurm call our options."""


class _Commands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*_COMMANDS, *super().list_commands(ctx)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return super().get_command(ctx, cmd_name)
        module = importlib.import_module(_COMMANDS[cmd_name])
        # `list` would hide Python's own.
        command = getattr(module, "list_" if cmd_name == "list" else cmd_name)
        assert isinstance(command, click.Command)
        return command


@click.group(
    cls=_Commands,
    epilog=(
        "Exit status: 0 done, 2 bad input, 3 does not fit, 4 the job failed or was stopped, "
        "128 + the signal when something else was interrupted."
    ),
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(__version__, message="zerofit %(version)s")
def app() -> None:
    """Fine-tune language models on several GPUs with DeepSpeed ZeRO.

    Predict memory and time, choose the strategy, run it, and compare what was measured.

    Start with: zerofit plan --model llama2-7b --method lora --max-seq-len 4096
    --gpu A100-80GB --gpus-per-node 8
    """


@app.command()
@json_option
def version(*, as_json: bool) -> None:
    """Print the version of zerofit."""
    print(json.dumps({"zerofit": __version__}) if as_json else f"zerofit {__version__}")


def _with_our_name(error: click.ClickException) -> click.ClickException:
    """Return the error, of an option by another program's name with what it is called here."""
    if not isinstance(error, click.NoSuchOption) or error.ctx is None:
        return error
    theirs = error.option_name
    ours = _NAMES_ELSEWHERE.get(theirs.replace("_", "-"))
    if not any(ours in param.opts for param in error.ctx.command.params):
        return error
    return click.UsageError(f"No such option {theirs!r}. Did you mean {ours!r}?", ctx=error.ctx)


def main() -> NoReturn:
    """Run the command line; errors that a user can mend are printed without a traceback."""
    try:
        app(prog_name="zerofit", standalone_mode=False)
        sys.stdout.flush()
    except LauncherError as error:
        from launcher.console import show_error

        show_error(error)
        sys.exit(error.exit_code)
    except click.ClickException as error:
        _with_our_name(error).show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        # The reader of a pipe has enough: leave as programs in a pipe do.
        sys.stderr.close()
        sys.exit(141)
    sys.exit(0)


if __name__ == "__main__":
    main()
