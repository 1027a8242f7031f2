"""``compile`` and ``explain``: the two calls for people who hold a model rather than a graph."""

from __future__ import annotations

import functools
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

from mmi_compile import record
from mmi_compile.backend import check_mode, compile_graph, mminference
from mmi_compile.language_model import find_language_model, takes_feature_mask, with_masks
from mmi_compile.options import Options
from mmi_compile.prompt_hook import PromptHook
from mmi_compile.recompile_limit import own_count, own_limit
from mmi_compile.report import GraphReport, Report
from mmi_compile.static_cache import counting_on_the_host, keep_masks_readable

ModelT = TypeVar("ModelT", bound=nn.Module)


def compile(
    model: ModelT, *, dynamic: bool | None = None, fullgraph: bool = False, mode: str | None = None, **options: Any
) -> ModelT:
    """Compile the language model inside ``model`` in place, so that both ``model(**inputs)`` and
    ``model.generate(**inputs)`` use it.

    ``torch.compile(model).generate()`` would compile nothing: the attribute is the original's bound method. Vision
    towers stay as they are. Where the model around the language model makes its masks, that is compiled with it. A
    pre-hook on ``model`` reads from each prompt which tokens are text, image or video. Up to 64 versions are compiled
    (PyTorch's own limit is 8) where ``torch.compile`` takes a limit, as in PyTorch 2.13.

    Args:
        model: a Hugging Face vision-language or text model, or any module with attention.
        dynamic, fullgraph: as for ``torch.compile``.
        mode: as for ``torch.compile`` with Inductor; see :func:`mmi_compile.backend.mminference`.
        **options: see :class:`mmi_compile.Options`.

    Returns:
        ``model`` itself.

    Raises:
        OptionError: an unknown option or mode, or a wrong value.

    Under ``strict=True`` the model's forward raises MMIError where grids or modality ids do not fit their prompt.
    """
    chosen = Options.from_mapping(options)
    check_mode(mode, chosen)
    backend = functools.partial(mminference, options=chosen, mode=mode)
    language_model = with_masks(model, find_language_model(model))
    language_model.compile(backend=backend, dynamic=dynamic, fullgraph=fullgraph, **own_limit())
    if takes_feature_mask(language_model):
        language_model._compiled_call_impl = _capturing_selection(language_model._compiled_call_impl)
    language_model._compiled_call_impl = counting_on_the_host(language_model._compiled_call_impl)
    keep_masks_readable(model)
    PromptHook.install(model, strict=chosen.strict)
    return model


def _capturing_selection(compiled: Any) -> Any:
    """Selecting rows by a mask gives tensors whose size depends on data, where Dynamo breaks the graph by default.

    The attentions after such a break take their mask from another graph, where its meaning cannot be proved. The
    setting holds for this language model alone: elsewhere it would turn breaks into errors.
    """

    @functools.wraps(compiled, updated=())  # its attributes tell Dynamo that it may be unwrapped
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # inside another torch.compile, whose settings hold
            return compiled(*args, **kwargs)
        with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
            return compiled(*args, **kwargs)

    return call


def explain(model: nn.Module, *args: Any, options: Mapping[str, Any] | None = None, **kwargs: Any) -> Report:
    """Run ``model(*args, **kwargs)`` once with the passes applied to every graph, and say what they did to each
    attention: where it is, what its mask means, which tokens it sees, the decision and its reason, the patterns.

    Nothing is lowered: graphs run as Dynamo captured them, with rewritten attention in place. Compiled state that the
    model already has is left alone.

    Args:
        model: any module.
        options: backend options (see :class:`mmi_compile.Options`); ``inner`` is ignored.

    Returns:
        A :class:`Report`; ``print(report)``, ``report.code()``, ``report.to_json()``.
    """
    chosen = Options.from_mapping({**(options or {}), "inner": "eager"})
    graphs: list[GraphReport] = []

    def observing(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
        return compile_graph(gm, example_inputs, chosen, None, graphs.append)

    prompt = PromptHook(model, strict=chosen.strict).read(args, kwargs)
    with torch.no_grad(), record.hooked(prompt), for_once(model, observing) as compiled:
        compiled(*args, **kwargs)
    return Report(graphs)


@contextmanager
def for_once(model: nn.Module, backend: Any) -> Iterator[Callable[..., Any]]:
    """``model`` compiled with a backend function as :func:`compile` would, for calls inside the block.

    Compiled state that the model has is set aside meanwhile and is left as it was.
    """
    with _uncompiled(model), _apart(model, backend), _unlimited(), _breaks_untold():
        yield counting_on_the_host(torch.compile(model, backend=backend, **own_count()))


def _unlimited() -> AbstractContextManager[None]:
    """Explain every time: at its limit of recompilations, Dynamo would silently run the model uncompiled."""
    patched: AbstractContextManager[None] = torch._dynamo.config.patch(
        recompile_limit=sys.maxsize, accumulated_recompile_limit=sys.maxsize
    )
    return patched


@contextmanager
def _breaks_untold() -> Iterator[None]:
    """Leave it to the report to tell of graph breaks, unless logs are asked for."""
    logger = logging.getLogger("torch._dynamo")
    level = logger.level
    if "TORCH_LOGS" not in os.environ:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def _apart(model: nn.Module, backend: Any) -> Iterator[None]:
    """Let explain see a language model that :func:`compile` captures under a setting of its own as that would."""
    language_model = find_language_model(model)
    if not takes_feature_mask(language_model):
        yield
        return
    compiled = torch.compile(language_model._call_impl, backend=backend, **own_count())
    try:
        language_model._compiled_call_impl = torch.compiler.disable(_capturing_selection(compiled))
        yield
    finally:
        language_model._compiled_call_impl = None


_COMPILE_MARK = "_is_torch_compile"
"""An attribute that torch.compile sets on the module it is given."""


@contextmanager
def _uncompiled(model: nn.Module) -> Iterator[None]:
    """Let Dynamo see through parts that ``module.compile()`` has replaced."""
    compiled = {m: m._compiled_call_impl for m in model.modules() if m._compiled_call_impl is not None}
    marked = _COMPILE_MARK in vars(model)
    try:
        for module in compiled:
            module._compiled_call_impl = None
        yield
    finally:
        for module, call in compiled.items():
            module._compiled_call_impl = call
        if not marked:
            vars(model).pop(_COMPILE_MARK, None)
