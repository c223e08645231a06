"""The `ldm` command.

Exit codes: 0 done, 1 failed (one line says what, which value, what to do), 2 misuse. A traceback only with --debug.
"""

import importlib
import keyword
import sys
import traceback

import click

from pipelines.errors import MisuseError, explain
from pipelines.secrets import holds_secret, refusal, without_secrets

# A command is imported when it is called, so that `ldm --help` answers at once.
COMMANDS = {
    "demo": "jobs.demo.command",
    "run": "jobs.commands.run",
    "plan": "jobs.commands.plan",
    "sample": "jobs.commands.sample",
    "import": "jobs.commands.import_",
    "export": "jobs.commands.export",
    "inspect": "jobs.commands.inspect",
    "verify": "jobs.commands.verify",
    "ls": "jobs.commands.ls",
    "gc": "jobs.commands.gc",
    "ui": "jobs.commands.ui",
    "doctor": "jobs.commands.doctor",
    "submit": "jobs.commands.submit",
    "jobs": "jobs.commands.cluster_jobs",
    "logs": "jobs.commands.cluster_jobs",
    "stop": "jobs.commands.cluster_jobs",
}
SUMMARIES = {
    "demo": "Run the whole pipeline on pictures rendered on the spot.",
    "run": "Run a recipe: every stage that is not cached yet.",
    "plan": "Show what `run` would do: keys, states, rows, bytes, time.",
    "sample": "Sample pictures for prompts from a checkpoint.",
    "import": "Convert another program's checkpoint.",
    "export": "Write a trained model for other programs to load.",
    "inspect": "Show what is in an artifact, a shard or a root.",
    "verify": "Check that artifacts and shards are whole and true.",
    "ls": "List the runs and artifacts of a root.",
    "gc": "Remove what is of no more use under a root.",
    "ui": "Serve a root's experiments with MLflow.",
    "doctor": "Check what this machine has.",
    "submit": "Run a recipe as a job on a Ray cluster.",
    "jobs": "List the jobs of a Ray cluster.",
    "logs": "Print the output of a job.",
    "stop": "Stop a job.",
}


class LazyGroup(click.Group):
    """A group of commands whose modules are imported when they are called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        name = f"{cmd_name}_" if keyword.iskeyword(cmd_name) else cmd_name
        command: click.Command = getattr(importlib.import_module(COMMANDS[cmd_name]), name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(SUMMARIES.items()))


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="ldm-pipelines", prog_name="ldm")
@click.option("--debug", is_flag=True, help="Show tracebacks and Ray's own log.")
@click.pass_context
def cli(context: click.Context, debug: bool) -> None:
    """Train latent diffusion models from raw image-text pairs, on a laptop or a Ray cluster.

    Start with `ldm demo`.
    """
    context.obj = debug


def main() -> None:
    """Run the `ldm` command and exit with its code."""
    debug = "--debug" in sys.argv[1:]
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    try:
        _refuse_secrets(arguments)
        code = cli.main(["--debug", *arguments] if debug else arguments, prog_name="ldm", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        sys.stdout.write(f"{error.ctx.get_help() if error.ctx else error.format_message()}\n")
        code = 2
    except click.exceptions.Exit as error:
        code = error.exit_code
    except click.ClickException as error:
        _complain(error.format_message())
        code = 2
    except (KeyboardInterrupt, click.Abort):
        _complain("interrupted; run the same command again to continue")
        code = 130
    except BrokenPipeError:
        code = 1
    except Exception as error:
        code = _report_failure(error, debug)
    sys.exit(code if isinstance(code, int) else 0)


def _report_failure(error: Exception, debug: bool) -> int:
    known = explain(error)
    if debug:
        sys.stderr.write(without_secrets(traceback.format_exc()))
    if known:
        _complain(str(known))
        return known.exit_code
    text = " ".join(without_secrets(str(error)).split())[:500]
    _complain(f"{type(error).__name__}: {text} (this looks like a bug: --debug shows where)")
    return 1


def _refuse_secrets(arguments: list[str]) -> None:
    """Raise MisuseError for an argument with a password or token in it, whatever command it is for."""
    for before, argument in zip(["", *arguments], arguments):
        if holds_secret(argument):
            # `--set tracking.uri=URL`, `--set=tracking.uri=URL`, `--root=URL`, `--root URL` or a URL alone.
            name, _, value = argument.removeprefix("--set=").partition("=")
            named = value and "://" not in name
            raise MisuseError(refusal(name if named else before if before.startswith("-") else "an argument"))


def _complain(message: str) -> None:
    sys.stderr.write(f"ldm: {' '.join(without_secrets(message).split())}\n")


if __name__ == "__main__":
    main()
