"""The ``torch.compile`` backend: run the passes on a copy of each graph, hand the result to the inner backend."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import fx
from torch._dynamo.exc import RestartAnalysis, SkipFrame

from mmi_compile._suggest import did_you_mean
from mmi_compile.decision import NO_PREFILL, MMIError, Reason
from mmi_compile.options import OptionError, Options
from mmi_compile.recompile_limit import limits_reached, watch
from mmi_compile.report import GraphReport, Report, SiteReport, remember
from mmi_compile.telemetry import announce

CompiledFn = Callable[..., Any]


def mminference(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | Options | None = None,
    mode: str | None = None,
) -> CompiledFn:
    """Backend function: ``torch.compile(model, backend="mminference", options={...})``.

    Args:
        gm, example_inputs: what Dynamo captured.
        options: see :class:`mmi_compile.options.Options`; unknown keys are refused.
        mode: as for Inductor, passed on to it. CUDA graphs that it asks for are kept for decoding: a graph in which a
            prefill was rewritten runs without them, and its report says so.

    Raises:
        OptionError: an option or an ``MMI_…`` variable is wrong, or Inductor has no such mode.
        MMIError: under ``strict=True``, where a pass failed or a causal attention could not be rewritten as asked; or
            the folder of ``dump`` cannot be written.
    """
    chosen = options if isinstance(options, Options) else Options.from_mapping(options)
    check_mode(mode, chosen)
    watch()
    return compile_graph(gm, example_inputs, chosen, mode, _tell)


def check_mode(mode: str | None, options: Options) -> None:
    """Raise OptionError for a mode that Inductor does not have, or that nobody would read."""
    if mode is None:
        return
    if options.inner != "inductor":
        raise OptionError(f'mode={mode!r} is read by inner="inductor" alone, and inner is {options.inner!r}; drop one')
    from torch._inductor import list_mode_options

    modes = list_mode_options()
    if mode not in modes:
        raise OptionError(f'unknown mode "{mode}"{did_you_mean(mode, modes)}')


def compile_graph(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    options: Options,
    mode: str | None,
    observe: Callable[[GraphReport], None],
) -> CompiledFn:
    """Rewrite one graph, report it to ``observe``, compile it with the inner backend."""
    rewritten, report = rewrite_graph(gm, options, needs_grad=_needs_grad(gm, example_inputs))
    if options.dump is not None and (report.sites or report.failure):
        report.dump(options.dump)
    started, counts = time.perf_counter(), True
    try:
        if options.strict:
            _raise_if_left(report)
        return _inner(rewritten, example_inputs, options, mode, report)
    except (RestartAnalysis, SkipFrame):
        counts = False  # Dynamo's control flow, no failure of ours: it will trace and compile this frame again
        raise
    except Exception as error:
        if rewritten is gm or options.strict:
            raise
        # Dynamo's graph without our changes may still compile; if it does not, the user sees the original error.
        report.fail("inner backend", error)
        return _inner(gm, example_inputs, options, mode, report)
    finally:
        report.seconds["inner backend"] = time.perf_counter() - started
        if counts:
            observe(report)


def _tell(report: GraphReport) -> None:
    remember(report)
    announce(report)


def rewrite_graph(
    gm: fx.GraphModule, options: Options, *, needs_grad: bool = False
) -> tuple[fx.GraphModule, GraphReport]:
    """Run the pass pipeline on a copy of ``gm``.

    Returns:
        The rewritten graph and its report, or ``gm`` itself when nothing changed or a pass raised (recorded in the
        report; raised under ``strict``).

    Raises:
        OptionError: ``skip_passes`` or ``passes_until`` names a pass that does not exist.
        MMIError: a pass failed under ``strict``.
    """
    import mmi_compile.kernels.grouped_ops
    import mmi_compile.kernels.ops  # noqa: F401  registers mmi::…
    from mmi_compile.passes import PIPELINE, PassContext, run_pipeline

    options.check_passes([step.name for step in PIPELINE])
    key = graph_key(gm, options)
    context = PassContext(options=options, graph_key=key, needs_grad=needs_grad)
    report = GraphReport(key=key, options=options, original=gm)
    copy = copy_graph(gm)
    try:
        run_pipeline(copy, context, PIPELINE, [report.observe])
    except Exception as error:
        if options.strict:
            raise MMIError(f"pass {report.current_pass!r} failed: {error}") from error
        for site in context.sites:
            site.decision = None
            site.leave(Reason.PASS_FAILED, f"{report.current_pass}: {type(error).__name__}: {error}")
        report.finish(context, gm)
        report.fail(report.current_pass, error)
        return gm, report
    for site in context.open_sites():
        site.leave(Reason.SKIPPED, "rewrite")
    if "cleanup" in context.passes_not_run:
        copy.recompile()  # its code would still be that of the captured graph
    report.finish(context, copy)
    return (copy if context.changed else gm), report


def graph_key(gm: fx.GraphModule, options: Options) -> str:
    """Name of a graph under these options. Another process gives it the same name, so that compiled code can be cached
    on disk; other options give it another, so that what ran under each is reported apart."""
    code = re.sub(r"0x[0-9a-f]+", "", gm.code) + options.digest()
    return hashlib.sha256(code.encode()).hexdigest()[:12]


def copy_graph(gm: fx.GraphModule) -> fx.GraphModule:
    """A graph of our own over the same parameters: Dynamo's graph stays as it is, for the fall-back."""
    graph = fx.Graph(tracer_cls=getattr(gm.graph, "_tracer_cls", None))
    mapping: dict[fx.Node, fx.Node] = {}
    output = graph.graph_copy(gm.graph, mapping)
    for node, twin in mapping.items():
        if hasattr(node, "_dynamo_source"):  # says which Python value an input comes from
            twin._dynamo_source = node._dynamo_source
    original = next(n for n in gm.graph.nodes if n.op == "output")
    graph.output(output).meta.update(original.meta)
    graph.set_codegen(gm.graph._codegen)
    copy = fx.GraphModule(gm, graph, gm.__class__.__name__)
    copy.meta.update(gm.meta)
    for name in ("_param_name_to_source", "compile_subgraph_reason", "torchdynamo_force_dynamic"):
        if hasattr(gm, name):
            setattr(copy, name, getattr(gm, name))
    return copy


def _needs_grad(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> bool:
    enabled = torch.is_grad_enabled() or any(
        node.target is torch._C._set_grad_enabled and node.args[0] is True for node in gm.graph.nodes
    )
    tensors = [*example_inputs, *gm.parameters()]
    return enabled and any(isinstance(x, torch.Tensor) and x.requires_grad for x in tensors)


def _raise_if_left(report: GraphReport) -> None:
    for site in report.sites:
        decision = site.decision
        if decision is not None and decision.reason is not None and decision.reason not in NO_PREFILL:
            raise MMIError(f"strict: attention {site.where or site.source}: {decision}; {decision.reason.mend}")


def _inner(
    gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options, mode: str | None, report: GraphReport
) -> CompiledFn:
    compiled: Any
    if callable(options.inner):
        compiled = options.inner(gm, example_inputs)
    elif options.inner == "eager":
        compiled = gm.forward
    elif options.inner == "aot_eager":
        from torch._dynamo.backends.debugging import aot_eager

        compiled = aot_eager(gm, list(example_inputs))
    else:
        from torch._inductor import list_mode_options
        from torch._inductor.compile_fx import compile_fx

        patches = {**(list_mode_options(mode) if mode else {}), **(options.inductor or {})}
        _keep_cuda_graphs_for_decoding(patches, report)
        compiled = compile_fx(gm, example_inputs, config_patches=patches or None)
    return cast("CompiledFn", compiled)


def _keep_cuda_graphs_for_decoding(patches: dict[str, Any], report: GraphReport) -> None:
    """Compile a rewritten prefill without CUDA graphs, if any are asked for.

    Its operators choose kernels on the host, so Inductor would split the graph at each of them (they are tagged
    ``cudagraph_unsafe``) and record every piece again for every length of a prompt.
    """
    from torch._inductor import config

    name = "triton.cudagraphs"
    if patches.get(name, config.triton.cudagraphs) and any(_is_rewritten(site) for site in report.sites):
        patches[name] = False
        report.notes.append(NO_CUDA_GRAPHS)


NO_CUDA_GRAPHS = (
    "CUDA graphs, which the mode or the options ask for, are not used for this prefill: its operators run host code"
    " between kernels, and every length of prompt would be recorded anew; decode steps have them"
)


def _is_rewritten(site: SiteReport) -> bool:
    return site.decision is not None and site.decision.rewritten


def last_report() -> Report | None:
    """What was compiled in this process so far, newest graph last; None before the first compilation."""
    from mmi_compile.report import remembered

    graphs = remembered()
    return Report(graphs, limits=limits_reached()) if graphs else None
