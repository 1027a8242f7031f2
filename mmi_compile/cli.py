"""The command ``mmi``. Heavy modules are imported by the commands that need them, so that help is quick.

Exit codes: 0 all went well, 1 a measurement failed, 2 the command line cannot be used.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from mmi_compile.bench_rows import BenchOptions, Results
    from mmi_compile.doctor import Diagnosis

FAILURE, USAGE = 1, 2

_ABOUT = """MMInference for torch.compile: sparse prefill for vision-language models.

Begin with `mmi explain script.py:build`, where build() returns a model and a dict of its forward arguments, or with
`mmi explain config.json` for a Hugging Face config without weights: it says what happens to each attention, and why.
`mmi doctor` checks this installation.

Exit codes: 0 all went well; 1 something failed, or was found wanting; 2 the command line cannot be used.
"""

app = typer.Typer(name="mmi", no_args_is_help=True, help=_ABOUT, rich_markup_mode="markdown")


class CommandError(Exception):
    """Ends a command with a message of one to three lines and an exit code."""

    def __init__(self, message: str, code: int = USAGE):
        super().__init__(message)
        self.code = code


def run() -> None:
    """The console script: ``main`` on the process's arguments, then the exit code."""
    sys.exit(main())


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; the exit code. Errors go to stderr in at most three lines."""
    try:
        code = app(args=arguments, prog_name="mmi", standalone_mode=False)
    except CommandError as error:
        return _complain(str(error), error.code)
    except (typer.Abort, KeyboardInterrupt):
        return _complain("interrupted", FAILURE)
    except Exception as error:
        # Errors of the command line; their base class lies in a different module from version to version of typer.
        if not hasattr(error, "format_message"):
            raise
        return _complain(_message(error), USAGE)
    return code if isinstance(code, int) else 0


def _message(error: BaseException) -> str:
    text = str(getattr(error, "format_message", lambda: error)())
    context = getattr(error, "ctx", None)
    if not text.strip():  # help was shown instead of a message
        return ""
    return f"{text}\nsee {context.command_path} --help" if context is not None else text


def _complain(message: str, code: int) -> int:
    lines = [line for line in message.splitlines() if line.strip()][:3]
    if lines:
        print(f"mmi: {lines[0]}", *(f"     {line}" for line in lines[1:]), sep="\n", file=sys.stderr)
    return code


def _print_version(wanted: bool) -> None:
    if wanted:
        import mmi_compile

        print(mmi_compile.__version__)
        raise typer.Exit()


@app.callback()
def _commands(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    pass


@app.command()
def bench(
    tokens: Annotated[
        list[str] | None, typer.Option(help="Prompt lengths: 4096, 128k, 1m; several with commas.")
    ] = None,
    heads: Annotated[int | None, typer.Option(help="Query heads [28; 8 on a CPU].")] = None,
    kv_heads: Annotated[int | None, typer.Option(help="Key/value heads [4; 2 on a CPU].")] = None,
    head_dim: Annotated[int | None, typer.Option(help="Elements per head [128; 64 on a CPU].")] = None,
    dtype: Annotated[str | None, typer.Option(help="bf16, fp16 or fp32 [bf16; fp32 on a CPU].")] = None,
    batch: Annotated[int | None, typer.Option(help="Batch elements [1].")] = None,
    cases: Annotated[
        list[str] | None,
        typer.Option(help="dense, mix, adaptive, dispatch, q, 2d, 2d(SEGMENTS), or a pattern: 'a_shape(128,4096)'."),
    ] = None,
    peers: Annotated[
        list[str] | None,
        typer.Option(help="sdpa, cudnn, fa2, fa4, flex, fa4_sparse or none; ratios refer to the first dense one."),
    ] = None,
    repeats: Annotated[int | None, typer.Option(help="Timed calls for every median [7; 3 with --quick].")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the inputs [0].")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="One short length, few cases and repeats.")] = False,
    tune: Annotated[bool, typer.Option("--tune", help="Time candidate tiles of the portable kernel instead.")] = False,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Measure what work costs here, for head search, instead.")
    ] = False,
    json_file: Annotated[
        str | None, typer.Option("--json", metavar="FILE", help="Write all results; - for stdout, without the table.")
    ] = None,
    plot_file: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE.png", help="Plot time over length, log-log.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cuda, cuda:1 or cpu [a GPU if there is one].")] = None,
) -> None:
    """Time our kernels beside cuDNN, FlashAttention and FlexAttention on the same tensors."""
    from mmi_compile.bench import run_bench
    from mmi_compile.bench_table import can_plot, plot, print_table

    if plot_file is not None and not can_plot():
        raise CommandError("--plot needs matplotlib: pip install 'mmi-compile[plot]'")
    for path in (plot_file, Path(json_file) if json_file not in (None, "-") else None):
        if path is not None and not path.absolute().parent.is_dir():
            raise CommandError(f"cannot write {path}: there is no folder {path.parent}")
    where = _device(device)
    if calibrate:
        unused = {"--cases": cases, "--peers": peers, "--batch": batch, "--quick": quick, "--tune": tune}
        given = [name for name, value in {**unused, "--plot": plot_file}.items() if value]
        if given:
            raise CommandError(f"--calibrate has no use for {' and '.join(given)}: it measures cases of its own")
        _calibrate(where, tokens, json_file, heads, kv_heads, head_dim, dtype, repeats, seed)
        return
    options = _bench_options(
        where, quick, tune, tokens, cases, peers,
        heads=heads, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype, batch=batch, repeats=repeats, seed=seed,
    )  # fmt: skip
    if tune and where.type != "cuda":
        raise CommandError("--tune times GPU kernels, and there is no GPU here")

    def save(results: Results) -> None:
        # After every row, so that a run that is cut off leaves what it has measured.
        if json_file is not None and json_file != "-":
            Path(json_file).write_text(_json(results), encoding="utf-8")

    with _progress(options, where) as (on_step, show):

        def on_row(results: Results) -> None:
            save(results)
            show(results)

        results = run_bench(options, where, on_step=on_step, on_row=on_row)
    save(results)
    if json_file == "-":
        print(_json(results))
    else:
        print_table(results)
    if plot_file is not None:
        plot(results, plot_file)
    if results.failed:
        first = results.failed[0]
        more = f" ({len(results.failed)} failures in all)" if len(results.failed) > 1 else ""
        raise CommandError(f"{first.kernel}, {first.case}, {first.tokens} tokens: {first.reason}{more}", FAILURE)


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON on stdout.")] = False,
) -> int:
    """Check this installation: versions, devices, caches, and small self-tests with the numbers they should give."""
    from mmi_compile.doctor import diagnose

    diagnosis = diagnose()
    if as_json:
        print(json.dumps(diagnosis.to_json(), indent=1))
    else:
        _print_diagnosis(diagnosis)
    return 0 if diagnosis.healthy else FAILURE


def _print_diagnosis(diagnosis: Diagnosis) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False)
    for device in diagnosis.devices:
        console.print(escape(", ".join(f"{key} {value}" for key, value in device.items() if key != "type")))
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    marks = {True: "[green]ok[/]", False: "[red]broken[/]", None: "[yellow]note[/]"}
    for check in diagnosis.checks:
        table.add_row(marks[check.ok], check.name, escape(check.detail))
        if check.ok is False:
            table.add_row("", "", f"mend: {escape(check.mend)}")
    console.print(table)
    console.print("everything works" if diagnosis.healthy else "something is broken")


def _calibrate(
    device: Any, tokens: list[str] | None, json_file: str | None, heads: int | None, kv_heads: int | None,
    head_dim: int | None, dtype: str | None, repeats: int | None, seed: int | None,
) -> None:  # fmt: skip
    from mmi_compile import calibrate, cost_file
    from mmi_compile.bench_cases import CaseError, parse_tokens

    try:
        options = calibrate.CalibrationOptions.for_device(
            device, tokens=parse_tokens(tokens) if tokens else None, heads=heads, kv_heads=kv_heads,
            head_dims=None if head_dim is None else (head_dim,), dtype=dtype, repeats=repeats, seed=seed,
        )  # fmt: skip
        with _bar(calibrate.steps(options)) as on_step:
            found = calibrate.calibrate(device, options, on_step=on_step)
    except (CaseError, ValueError) as error:
        raise CommandError(str(error)) from None
    except RuntimeError as error:  # a kernel that cannot be built, or lack of memory
        raise CommandError(str(error), FAILURE) from None
    try:
        path = cost_file.save(found, device)
    except cost_file.CostFileError as error:
        raise CommandError(str(error), FAILURE) from None
    if json_file == "-":
        print(json.dumps(found.to_json(), indent=1))
        return
    if json_file is not None:
        Path(json_file).write_text(json.dumps(found.to_json(), indent=1), encoding="utf-8")
    _print(calibrate.cost_table(found))
    print(f"kept in {path}")


@app.command()
def search(
    script: Annotated[str, typer.Argument(metavar="SCRIPT.py:FUNCTION", help="A function that returns model, inputs.")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="The head config to write.")],
    budget: Annotated[float, typer.Option(help="Share of dense attention's cost for all heads.")] = 0.12,
    unit: Annotated[str, typer.Option(help="What budgets count: predicted kernel time, or tiles (density).")] = "time",
    mode: Annotated[str, typer.Option(help="share one budget among all heads, or equal for each.")] = "share",
    boundaries: Annotated[str, typer.Option(help="Some of none, q and 2d, with commas.")] = "none,q,2d",
    rows: Annotated[str, typer.Option(help="Rows that errors are measured on: all, last or both.")] = "both",
    merge: Annotated[str, typer.Option(help="Errors of several prompts: their mean or their max.")] = "mean",
    weigh: Annotated[
        str, typer.Option(help="Errors count by what layers, or heads, change in the output, or all equal.")
    ] = "layers",
    resume: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Keep measurements there, and go on from them [FILE.partial].")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the config as JSON instead of a map.")] = False,
) -> None:
    """Choose boundaries and patterns for every head of a model, from calibration prompts."""
    from mmi_compile.decision import MMIError
    from mmi_compile.model_search import search as run_search
    from mmi_compile.show import terminal_map

    if not output.absolute().parent.is_dir():
        raise CommandError(f"cannot write {output}: there is no folder {output.parent}")
    _needs_weights(script)
    model, inputs = _built(script)
    partial = resume or output.with_name(f"{output.name}.partial")
    chosen: dict[str, Any] = {"mode": mode, "unit": unit, "rows": rows, "merge": merge, "weigh": weigh}
    try:
        config = run_search(
            model,
            inputs,
            budget=budget,
            boundaries=boundaries.replace(" ", "").split(","),
            resume=partial,
            **chosen,
        )
        config.save(output)
    except KeyboardInterrupt:
        raise CommandError(f"interrupted; the same command goes on from {partial}", FAILURE) from None
    except MMIError as error:
        raise CommandError(str(error), FAILURE) from None
    except ValueError as error:
        raise CommandError(str(error)) from None
    if resume is None:
        partial.unlink(missing_ok=True)
    if as_json:
        print(json.dumps(config.to_json(), indent=1))
    else:
        _print(terminal_map(config))


_OPTION = typer.Option(
    "--option", "-o", metavar="NAME=VALUE", help="An option of the backend, as in MMI_NAME=VALUE; repeatable."
)


_IMPORT = typer.Option(
    "--import", metavar="MODULE|FILE.py", help="Import it first, for the patterns that it registers; repeatable."
)


@app.command()
def explain(
    script: Annotated[
        str,
        typer.Argument(
            metavar="SCRIPT.py:FUNCTION|CONFIG.json|FOLDER",
            help="A function that returns model, inputs; or a Hugging Face config, or a folder that holds config.json.",
        ),
    ],
    option: Annotated[list[str] | None, _OPTION] = None,
    modules: Annotated[list[str] | None, _IMPORT] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON (see docs/report.md).")] = False,
    html: Annotated[Path | None, typer.Option(metavar="FILE.html", help="Write the report as a page.")] = None,
    svg: Annotated[
        Path | None, typer.Option(metavar="FILE.svg", help="Draw the rewritten graphs around their attentions.")
    ] = None,
    code: Annotated[bool, typer.Option("--code", help="Print the rewritten graphs as well.")] = False,
    time: Annotated[
        bool, typer.Option("--time", help="Run a second time, and measure every stage of the rewritten attentions.")
    ] = False,
    tokens: Annotated[
        int | None,
        typer.Option(
            help="With a config: tokens of the prompt; more where an image or a window needs them [512].", min=2
        ),
    ] = None,
) -> None:
    """Say what happens to each attention of a model, and why.

    A Hugging Face config needs no weights: a model with few of its layers and random weights is built, one layer of
    every kind among them, with the heads, masks and token ids of the config. The report says what was shrunk.

    With `-o dump=FOLDER`, the graph after every pass is written as a Python file that runs. To find a pass at fault,
    leave passes out: `-o passes_until=prove_mask` or `-o skip_passes=find_modality,cleanup`.
    """
    _import(modules)
    report = _explained(script, option, {}, [html, svg], timed=time, tokens=tokens)
    for path, made in ((html, report.html), (svg, report.svg)):
        if path is not None:
            _write(path, made())
    if as_json:
        print(report.dumps())
    else:
        print(report)
        if code:
            print(report.code())
    if not report.sites:
        raise CommandError(_no_attention(report), FAILURE)


def _no_attention(report: Any) -> str:
    if "find_attention" in report.passes_not_run:
        return "no attention was looked for: the options leave out the pass find_attention"
    graphs = f"{len(report.graphs)} graph{'s' if len(report.graphs) != 1 else ''}"
    return f"no attention was found in {graphs}; call scaled_dot_product_attention, or softmax between two products"


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise CommandError(f"cannot write {path}: {error.strerror}", FAILURE) from None


@app.command()
def verify(
    script: Annotated[str, typer.Argument(metavar="SCRIPT.py:FUNCTION", help="A function that returns model, inputs.")],
    option: Annotated[list[str] | None, _OPTION] = None,
    rows: Annotated[int, typer.Option(help="Rows of the prompt that are compared with exact attention.", min=1)] = 64,
    least_recall: Annotated[
        float, typer.Option(help="Fail, with exit code 1, when a head keeps less.", min=0, max=1)
    ] = 0.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print recall and error of every head as JSON.")] = False,
) -> int:
    """Compare every sparse head with exact attention on some rows of the prompt."""
    _needs_weights(script)
    report = _explained(script, option, {"verify": 1.0, "guard_rows": rows}, [])
    if not report.sites:
        raise CommandError(_no_attention(report), FAILURE)
    told = [(site.layer, site.where, run) for site, run in report.runs() if run["guard"] is not None]
    if as_json:
        print(json.dumps([{"layer": layer, "where": where, **run["guard"]} for layer, where, run in told], indent=1))
    else:
        _print(
            _verify_table(told) if told else "no head ran sparse: there is nothing to verify (see option min_tokens)"
        )
    recalls = [x for _, _, run in told for x in run["guard"]["recall_per_head"]]
    return FAILURE if any(x is None or x < least_recall for x in recalls) else 0


def _verify_table(told: list[tuple[int | None, str, dict[str, Any]]]) -> Any:
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("layer", "density", "least recall", "mean recall", "largest error", "worst head"):
        table.add_column(heading, justify="right")
    for layer, where, run in told:
        recall, error = (
            [float("nan") if x is None else x for x in run["guard"][f"{name}_per_head"]] for name in ("recall", "error")
        )
        worst = min(range(len(recall)), key=lambda head: recall[head])
        table.add_row(
            where if layer is None else str(layer), f"{run['density']:.1%}", f"{recall[worst]:.3f}",
            f"{sum(recall) / len(recall):.3f}", f"{max(error):.2g}", f"{worst}: {run['patterns'][0][worst]}",
        )  # fmt: skip
    return table


def _explained(
    script: str, given: list[str] | None, more: dict[str, Any], files: list[Path | None], *, timed: bool = False,
    tokens: int | None = None,
) -> Any:  # fmt: skip
    import mmi_compile
    from mmi_compile.decision import MMIError
    from mmi_compile.options import OptionError, Options, env_name

    for path in files:
        if path is not None and not path.absolute().parent.is_dir():
            raise CommandError(f"cannot write {path}: there is no folder {path.parent}")
    pairs = [word.partition("=") for word in given or []]
    if any(not separator for _, separator, _ in pairs):
        raise CommandError("--option takes NAME=VALUE, such as --option policy=exact")
    try:
        # Text is read as that of the environment is, which these values go before.
        known = {env_name(name): value for name, _, value in pairs}
        for name, _, _ in pairs:
            if not hasattr(Options, name):
                Options.from_mapping({name: None})  # raises, and suggests the nearest name
        chosen = Options.from_mapping(None, {**os.environ, **known})
    except OptionError as error:
        raise CommandError(str(error)) from None
    options = {name: getattr(chosen, name) for name in vars(chosen)} | more
    model, inputs, subject = _subject(script, tokens)
    prompt = inputs[0] if isinstance(inputs, list | tuple) and inputs else inputs
    if not isinstance(prompt, dict):
        raise CommandError(f"{script} must return the model and a dict of its forward arguments, or a list of them")
    try:
        if timed:
            from mmi_compile.report_time import explain_timed

            report = explain_timed(model, options, prompt)
        else:
            report = mmi_compile.explain(model, options=options, **prompt)
        return replace(report, subject=subject)
    except Exception as error:
        # What a backend raises, Dynamo wraps.
        cause = getattr(error, "inner_exception", None) or error
        if isinstance(cause, MMIError | OptionError):
            raise CommandError(str(cause), USAGE if isinstance(cause, OptionError) else FAILURE) from None
        first = (str(error).strip() or "no message").splitlines()[0]
        raise CommandError(f"the model of {script} failed: {type(error).__name__}: {first}", FAILURE) from error


def _subject(place: str, tokens: int | None) -> tuple[Any, Any, str]:
    """A model, its inputs or a list of them, and what they are in words; from a script, or from a config."""
    from mmi_compile.hf_config import ConfigFileError, is_config, sample

    if not is_config(place):
        if tokens is not None:
            raise CommandError("--tokens is for configs: a script makes its own inputs")
        return *_built(place), place
    try:
        made = sample(place, **({} if tokens is None else {"tokens": tokens}))
    except ConfigFileError as error:
        raise CommandError(str(error), USAGE if error.usage else FAILURE) from None
    return made.model, made.inputs, str(made)


def _needs_weights(place: str) -> None:
    from mmi_compile.hf_config import is_config

    if is_config(place):
        raise CommandError(f"{place}: a config has no weights, so there is nothing to measure; give SCRIPT.py:FUNCTION")


def _built(place: str) -> tuple[Any, Any]:
    """What ``FUNCTION`` of ``SCRIPT.py:FUNCTION`` returns: a model, and its inputs or a list of them."""
    import runpy

    name, _, function = place.rpartition(":") if ":" in place else (place, "", "build")
    path = Path(name)
    if not path.is_file():
        raise CommandError(f"there is no script {name!r}; give SCRIPT.py:FUNCTION")
    sys.path.insert(0, str(path.absolute().parent))  # a script may import its neighbours
    try:
        found = runpy.run_path(str(path), run_name=path.stem).get(function)
        if not callable(found):
            raise CommandError(f"{name} has no function {function!r}; it must return a model and its inputs")
        built = found()
    except CommandError:
        raise
    except Exception as error:  # whatever the user's script does
        raise CommandError(f"{place} failed: {type(error).__name__}: {error}", FAILURE) from error
    finally:
        sys.path.pop(0)
    if not isinstance(built, tuple) or len(built) != 2:
        raise CommandError(f"{place} must return (model, inputs), returned {type(built).__name__}")
    return built


def _import(places: list[str] | None) -> None:
    """Import modules by name, from the current folder too, and run files, which may import their neighbours."""
    import importlib
    import runpy

    for place in places or []:
        path = Path(place)
        is_file = path.suffix == ".py"
        if is_file and not path.is_file():
            raise CommandError(f"--import: there is no file {place!r}; give a module, or the path of a Python file")
        sys.path.insert(0, str(path.absolute().parent) if is_file else str(Path.cwd()))
        try:
            runpy.run_path(str(path), run_name=path.stem) if is_file else importlib.import_module(place)
        except Exception as error:  # whatever the user's module does
            raise CommandError(f"--import {place} failed: {type(error).__name__}: {error}", FAILURE) from error
        finally:
            sys.path.pop(0)


@app.command()
def show(
    file: Annotated[Path, typer.Argument(metavar="FILE.json", help="A head config, or a report that was saved.")],
    png: Annotated[
        Path | None, typer.Option("--png", metavar="FILE.png", help="Write the map of a head config as a picture.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the file, validated, as JSON instead.")] = False,
    modules: Annotated[list[str] | None, _IMPORT] = None,
) -> None:
    """Show a head config: the pattern and boundary of every head, and how recall and density are spread.

    A report that `mmi explain --json` wrote is shown as well: what happened to each attention, and why. Patterns of
    your own are known once what registers them is imported: `mmi show heads.json --import patterns.py`.
    """
    from mmi_compile.decision import MMIError
    from mmi_compile.head_config import HeadConfig
    from mmi_compile.report_file import load_report, saved_text
    from mmi_compile.show import save_png, terminal_map

    _import(modules)
    try:
        if _holds_report(file):
            if png is not None:
                raise CommandError("--png draws head configs, and this is a report; see mmi explain --svg")
            report = load_report(file)
            print(json.dumps(report, indent=1) if as_json else saved_text(report))
            return
        found = HeadConfig.load(file)
        if png is not None:
            save_png(found, png)
    except MMIError as error:
        raise CommandError(str(error)) from None
    if as_json:
        print(json.dumps(found.to_json(), indent=1))
    else:
        _print(terminal_map(found))


def _holds_report(path: Path) -> bool:
    from mmi_compile.report_file import is_report

    try:
        return is_report(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError):
        return False  # the reader of head configs says what is wrong


def _print(what: Any) -> None:
    from rich.console import Console

    from mmi_compile.bench_table import MIN_WIDTH

    console = Console(soft_wrap=True)
    if console.width < MIN_WIDTH:  # a table that is squeezed cannot be read; one that is cut can be scrolled
        console = Console(width=MIN_WIDTH, soft_wrap=True)
    console.print(what)


@contextmanager
def _bar(steps: int) -> Iterator[Any]:
    """A callback for the next of ``steps`` steps. A bar on a terminal, on stderr; elsewhere nothing."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda what: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("starting", total=steps)
        yield lambda what: bar.update(task, advance=1, description=what)


def _json(results: Results) -> str:
    # NaN and infinity are no JSON; they can only stand in a wrong result, whose reason names them.
    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        return None if isinstance(value, float) and not abs(value) < float("inf") else value

    return json.dumps(plain(results.to_json()), indent=1, allow_nan=False)


def _device(name: str | None) -> Any:
    import torch

    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise CommandError(f"unknown device {name!r}; give cuda, cuda:1 or cpu") from None
    if device.type not in ("cuda", "cpu"):
        raise CommandError(f"no kernels for device {name!r}; give cuda or cpu")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise CommandError(f"no GPU for device {name!r}: torch.cuda.is_available() is False")
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        if device.index >= torch.cuda.device_count():
            raise CommandError(f"there are {torch.cuda.device_count()} GPUs, counted from 0; got {name!r}")
        torch.cuda.set_device(device)
    return device


def _bench_options(
    device: Any, quick: bool, tune: bool, tokens: list[str] | None, cases: list[str] | None, peers: list[str] | None,
    **given: Any,
) -> BenchOptions:  # fmt: skip
    from mmi_compile._suggest import did_you_mean
    from mmi_compile.bench_cases import parse_cases, parse_tokens
    from mmi_compile.bench_peers import PEERS
    from mmi_compile.bench_rows import BenchOptions

    names = None
    if peers:
        words = dict.fromkeys(name.strip() for value in peers for name in value.split(","))
        names = tuple(name for name in words if name != "none")
        for name in names:
            if name not in PEERS:
                raise CommandError(f"unknown peer {name!r}{did_you_mean(name, PEERS)}")
    try:
        return BenchOptions.for_device(
            device, quick=quick, tune=tune, peers=names,
            tokens=parse_tokens(tokens) if tokens else None, cases=parse_cases(cases) if cases else None, **given,
        )  # fmt: skip
    except ValueError as error:
        raise CommandError(str(error)) from None


@contextmanager
def _progress(options: BenchOptions, device: Any) -> Iterator[tuple[Any, Any]]:
    """Two callbacks, for the next step and a new row. A bar on a terminal; elsewhere one line a row, on stderr."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from mmi_compile.bench import count_steps
    from mmi_compile.bench_table import progress_line

    console = Console(stderr=True)
    if not console.is_terminal:

        def line(results: Results) -> None:
            print(progress_line(results.rows[-1]), file=sys.stderr, flush=True)

        yield (lambda what: None), line
        return
    with Progress(
        TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=console, transient=True
    ) as bar:
        task = bar.add_task("starting", total=count_steps(options, device))
        yield (lambda what: bar.update(task, advance=1, description=what)), (lambda results: None)
