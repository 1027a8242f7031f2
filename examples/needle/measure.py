"""How often a policy answers as the prompt does, and what share of attention it computes."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from needle.policies import Policy, running
from needle.task import Kind, Prompt


@dataclass(frozen=True)
class Score:
    """Results of one policy on some prompts of one length.

    Attributes:
        policy: as it was written.
        frames, tokens, prompts: of the videos, of the longest prompt, and how many prompts.
        token_accuracy: share of answer tokens that are the most likely ones, by kind of needle. A token counts given
            the true ones before it.
        answer_accuracy: share of answers all of whose tokens are.
        density: pairs computed ÷ pairs of causal attention, mean over layers, heads and prompts.
        seconds: a prompt, without compilation (the first prompt is left out where there are more).
    """

    policy: str
    frames: int
    tokens: int
    prompts: int
    token_accuracy: dict[Kind, float]
    answer_accuracy: dict[Kind, float]
    density: float
    seconds: float

    def __str__(self) -> str:
        shares = [f"{kind} {self.accuracy(kind)}" for kind in self.token_accuracy]
        return f"{self.policy}: {', '.join(shares)}, density {self.density:.1%}"

    def accuracy(self, kind: Kind) -> str:
        """Tokens right / answers right."""
        return f"{self.token_accuracy[kind]:.3f} / {self.answer_accuracy[kind]:.3f}"

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@torch.inference_mode()
def answer(model: Any, prompt: Prompt) -> list[list[bool]]:
    """Which tokens of each answer the model finds most likely, in the order of ``prompt.answers``."""
    logits = model(
        input_ids=prompt.input_ids, pixel_values=prompt.pixel_values, use_cache=False, logits_to_keep=prompt.asked
    ).logits
    found = iter(logits[0].argmax(-1).tolist())
    return [[next(found) == token for token in answer.tokens] for answer in prompt.answers]


def score(model: Any, policy: Policy, prompts: Sequence[Prompt]) -> Score:
    """Ask the model every question of every prompt. ``prompts`` have the same number of frames."""
    right: list[tuple[Kind, list[bool]]] = []
    densities, seconds = [], []
    with running(model, policy) as runner:
        for prompt in prompts:
            start = time.perf_counter()
            answers = answer(runner.model, prompt)
            seconds.append(time.perf_counter() - start)
            densities.append(runner.density())
            right += [(given.kind, tokens) for given, tokens in zip(prompt.answers, answers, strict=True)]
    kinds = list(dict.fromkeys(kind for kind, _ in right))
    of_kind = {kind: [tokens for k, tokens in right if k == kind] for kind in sorted(kinds)}
    return Score(
        policy=policy.text,
        frames=prompts[0].pixel_values.shape[0],
        tokens=max(prompt.input_ids.shape[1] for prompt in prompts),
        prompts=len(prompts),
        token_accuracy={kind: _mean(ok for tokens in given for ok in tokens) for kind, given in of_kind.items()},
        answer_accuracy={kind: _mean(all(tokens) for tokens in given) for kind, given in of_kind.items()},
        density=_mean(densities),
        seconds=_mean(seconds[1:] or seconds),
    )


def scores(model: Any, policies: Sequence[Policy], prompts: Sequence[Prompt]) -> Iterator[Score]:
    """The score of each policy on the same prompts."""
    for policy in policies:
        yield score(model, policy, prompts)


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)
