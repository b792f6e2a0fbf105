"""``bard_vl`` for lmms-eval 0.7: answers, answers over several rounds, and likelihoods."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts  # pyright: ignore[reportMissingImports]
from lmms_eval.api.model import lmms  # pyright: ignore[reportMissingImports]
from lmms_eval.models.model_utils.gen_metrics import log_metrics  # pyright: ignore[reportMissingImports]
from loguru import logger  # pyright: ignore[reportMissingImports]
from tqdm import tqdm

from nemo_bard.checkpoints.folder import check_checkpoint
from nemo_bard.data.encode import Conversation, encode_prompts
from nemo_bard.evaluation.harness.arguments import (
    HarnessSettings,
    RequestSettings,
    cut,
    number_of_processes,
    read_generation_kwargs,
    read_model_args,
)
from nemo_bard.evaluation.harness.messages import read_messages, user_turn
from nemo_bard.evaluation.likelihood import resolve_method, response_likelihood
from nemo_bard.evaluation.responder import Answer, BlockDiffusionResponder, load_checkpoint
from nemo_bard.generation.adapters import call_settings
from nemo_bard.generation.settings import BardGenerationConfig


class Question(NamedTuple):
    """One thing to answer; its media are opened when its batch comes up."""

    place: int
    """Where its answer goes."""
    name: str
    """What errors call it."""
    open: Callable[[], Conversation]
    gen_kwargs: dict[str, Any]
    size: int
    """About how long it is."""


@dataclass
class Speed:
    """Sums over answers, for lmms-eval's throughput table."""

    tokens: int = 0
    denoising_forwards: int = 0
    commit_forwards: int = 0
    seconds: float = 0.0
    answers: int = 0

    def add(self, answers: Sequence[Answer], seconds: float) -> None:
        """Count a batch, decoded in ``seconds``."""
        self.tokens += sum(answer.num_tokens for answer in answers)
        self.denoising_forwards += sum(answer.denoising_forwards for answer in answers)
        self.commit_forwards += sum(answer.commit_forwards for answer in answers)
        self.seconds += seconds
        self.answers += len(answers)

    def log(self) -> None:
        """Hand over to lmms-eval; prompts, the processor and the reading of files are in none of the numbers."""
        if not self.answers:
            return
        log_metrics(
            total_elapsed_time=self.seconds,
            total_gen_tokens=self.tokens,
            avg_speed=self.tokens / self.seconds if self.seconds else 0.0,
            additional_metrics={
                "total_requests": self.answers,
                "tokens_per_forward": self.tokens / (self.denoising_forwards + self.commit_forwards),
                "tokens_per_denoising_forward": self.tokens / self.denoising_forwards,
            },
        )


class BardVL(lmms):
    """A BARD checkpoint behind lmms-eval's chat interface.

    Args:
        **model_args: What ``--model_args`` holds: fields of ``HarnessSettings`` and decoding settings, which go over those of
            ``generation_config.json``; ``generation_kwargs`` of a task go over both.

    Raises:
        ValueError: For an unknown key, a value that is not allowed, or a folder that holds no BARD checkpoint.
    """

    is_simple = False

    def __init__(self, **model_args: Any) -> None:
        super().__init__()
        self.settings, overrides = read_model_args(model_args)
        check_checkpoint(self.settings.pretrained, self.settings.dtype, block_diffusion=True)
        self.accelerator, device = _share_of_machine(self.settings)
        self.net, self.processor = load_checkpoint(self.settings.pretrained, device=device, dtype=self.settings.dtype)
        self.device: torch.device = self.net.device  # where lmms-eval puts what its processes exchange
        _resize_as_told(self.processor, self.settings)
        self.config: BardGenerationConfig = call_settings(self.net, overrides.get("adapter")).updated(**overrides)
        self.method = resolve_method(self.settings.loglikelihood, self.net.config.context_attention)
        self._told: set[str] = set()

    @property
    def rank(self) -> int:
        """This process among those that share the requests."""
        return 0 if self.accelerator is None else self.accelerator.process_index

    @property
    def world_size(self) -> int:
        """Processes that share the requests."""
        return 1 if self.accelerator is None else self.accelerator.num_processes

    # ------------------ answers ------------------
    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answer requests in batches of like generation settings, the longest first; results are in their order."""
        questions = [self.question(place, request) for place, request in enumerate(requests)]
        speed = Speed()
        results = self._answer(questions, speed, "answering")
        speed.log()
        return results

    def generate_until_multi_round(self, requests: list[Instance]) -> list[list[str]]:
        """Answer requests round by round, all of them at once; a request's answers, one a round, are its result.

        A round's messages are what the task makes of the rounds before; only these are the prompt.
        """
        speed, answers = Speed(), [[] for _ in requests]
        infos: list[Any] = [None] * len(requests)
        active, number = list(range(len(requests))), 0
        while True:
            questions = []
            for place in active:
                messages, infos[place] = self._round(requests[place], number, answers[place], infos[place])
                if messages is not None:
                    questions.append(self._asked(place, requests[place], messages))
            active = [question.place for question in questions]
            if not active:
                break
            found = self._answer([q._replace(place=i) for i, q in enumerate(questions)], speed, f"round {number + 1}")
            for place, result in zip(active, found, strict=True):
                answers[place].append(result.text)
            number += 1
        speed.log()
        return answers

    def question(self, place: int, request: Instance) -> Question:
        """What ``generate_until`` is to answer."""
        _, doc_to_messages, _, doc_id, task, split = request.args
        return self._asked(place, request, lambda: doc_to_messages(self.task_dict[task][split][doc_id]))

    def _asked(self, place: int, request: Instance, messages: Callable[[], Any]) -> Question:
        context, _, gen_kwargs, doc_id, task, split = request.args
        return Question(
            place,
            f"{task} {split} {doc_id}",
            lambda: read_messages(messages(), self.settings.system_prompt),
            gen_kwargs,
            len(context) if isinstance(context, str) else 0,
        )

    def _round(
        self, request: Instance, number: int, answers: list[str], info: Any
    ) -> tuple[Callable[[], Any] | None, Any]:
        """What a task asks in a round, None when it is done, and what it wants to know again in the next."""
        _, doc_to_messages, _, doc_id, task, split = request.args
        doc = self.task_dict[task][split][doc_id]
        if number == 0:
            return lambda: doc_to_messages(doc), info
        asked = doc_to_messages(doc, round_idx=number, previous_output=list(answers), previous_round_info=info)
        if not (isinstance(asked, tuple) and len(asked) == 4):
            return None, info
        messages, done, _, info = asked
        return (None if done else lambda: messages), info

    def _answer(self, questions: list[Question], speed: Speed, what: str) -> list[GenerationResult]:
        results: list[Any] = [None] * len(questions)
        with tqdm(total=len(questions), desc=what, disable=self.rank != 0) as bar:
            for settings, batch in self._batches(questions):
                responder = BlockDiffusionResponder(self.net, self.processor, self.config.updated(**settings.decoding))
                done = responder.answer([_opened(question) for question in batch])
                speed.add(done.answers, done.seconds)
                for question, answer in zip(batch, done.answers, strict=True):
                    counts = TokenCounts(output_tokens=answer.num_tokens)
                    results[question.place] = GenerationResult(cut(answer.text, settings.until), counts)
                bar.update(len(batch))
        return results

    def _batches(self, questions: list[Question]) -> Iterator[tuple[RequestSettings, list[Question]]]:
        groups: dict[str, list[Question]] = {}
        for question in questions:
            key = json.dumps(question.gen_kwargs, sort_keys=True, default=str)
            groups.setdefault(key, []).append(question)
        for group in groups.values():
            settings = read_generation_kwargs(group[0].gen_kwargs, self.config.remasking_strategy)
            for word in settings.unused:
                self._tell(f"bard_vl does not use {word}, which a task sets")
            group.sort(key=lambda question: -question.size)
            for start in range(0, len(group), self.settings.batch_size):
                yield settings, group[start : start + self.settings.batch_size]

    def _tell(self, text: str) -> None:
        """Warn, once."""
        if text not in self._told:
            self._told.add(text)
            logger.warning(text)

    # ------------------ likelihoods ------------------
    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        """How likely continuations are, and whether decoding at temperature 0 gives them.

        A continuation's leading blanks, which a task's delimiter puts there, are left out: a turn does not begin with any.
        Where a task is ``multiple_choice``, lmms-eval 0.7 chooses the continuation with the least number, so that it gets
        the negative; with ``loglikelihood`` the log-probability itself. Pairs are results' texts, because lmms-eval 0.7.3
        turns a bare pair into a string (``unwrap_generation_output``), which its scoring then cannot read.

        Raises:
            ValueError: With an adapter, or for a request of another kind.
        """
        if self.config.adapter is not None:
            raise ValueError(
                f"adapter={self.config.adapter!r}: tasks that ask for likelihoods need a whole checkpoint; make one with"
                " `nemo-bard merge DIR/adapters/NAME WHOLE`"
            )
        logger.info(self._method_line())
        results: list[GenerationResult] = []
        prompt, inputs, greedy = None, None, []
        for request in tqdm(requests, desc="likelihoods", disable=self.rank != 0):
            if len(request.args) != 6:
                raise ValueError("the metric acc_mutual_info is not supported: bard_vl answers prompts alone")
            context, target, doc_to_visual, doc_id, task, split = request.args
            doc = self.task_dict[task][split][doc_id]
            response = self._response_ids(str(target(doc) if callable(target) else target))
            with _named(f"{task} {split} {doc_id}"):
                if prompt != (prompt := (task, split, doc_id, context)):  # the choices of a question come one by one
                    turns = read_messages(user_turn(doc_to_visual(doc), context), self.settings.system_prompt)
                    inputs, greedy = encode_prompts(self.processor, [turns]), []
                value = self._log_prob(inputs, response)
            if len(greedy) < len(response):
                greedy = self._greedy(inputs, len(response))
            pair = (value if callable(target) else -value, greedy[: len(response)] == response.tolist())
            results.append(GenerationResult(pair, TokenCounts(output_tokens=len(response))))
        return results

    def _log_prob(self, inputs: Any, response: torch.Tensor) -> float:
        return response_likelihood(
            self.net,
            inputs,
            response,
            method=self.method,
            draws=self.settings.likelihood_draws,
            seed=self.settings.likelihood_seed,
        ).log_prob

    def _method_line(self) -> str:
        if self.method == "exact":
            return (
                "likelihoods are exact: next-token log-probabilities of the causal context; they mean something for a"
                " checkpoint trained with ar_loss_weight, for another one pass loglikelihood=estimated"
            )
        return (
            f"likelihoods are estimated: a lower bound from at most {self.settings.likelihood_draws} masks of each block,"
            f" seed {self.settings.likelihood_seed}"
        )

    def _response_ids(self, text: Any) -> torch.Tensor:
        ids = self.processor.tokenizer(str(text).lstrip(), add_special_tokens=False)["input_ids"]
        return torch.tensor(ids, dtype=torch.int64)

    def _greedy(self, inputs: Any, length: int) -> list[int]:
        config = self.config.updated(
            temperature=0.0, max_new_tokens=max(length, 1), return_dict_in_generate=True, return_step_stats=False
        )
        output = self.net.generate(inputs.to(self.net.device), generation_config=config)
        return output.sequences[0, : int(output.lengths[0])].tolist()


class SimpleBardVL(BardVL):
    """The same behind the simple interface (``--force_simple``): what tasks with likelihoods need."""

    is_simple = True

    def question(self, place: int, request: Instance) -> Question:
        """What ``generate_until`` is to answer: the task's media, then its text."""
        context, gen_kwargs, doc_to_visual, doc_id, task, split = request.args
        return Question(
            place,
            f"{task} {split} {doc_id}",
            lambda: read_messages(
                user_turn(doc_to_visual(self.task_dict[task][split][doc_id]), context), self.settings.system_prompt
            ),
            gen_kwargs,
            len(context),
        )

    def generate_until_multi_round(self, requests: list[Instance]) -> list[list[str]]:
        """Refuse: several rounds are for the chat interface."""
        raise ValueError("tasks of several rounds need lmms-eval's chat interface; run them without --force_simple")


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
    """Put the name of a sample before what is wrong with it."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _opened(question: Question) -> Conversation:
    with _named(question.name):
        return question.open()


def _share_of_machine(settings: HarnessSettings) -> tuple[Any, str | None]:
    """lmms-eval's processes and the device of this one."""
    if number_of_processes() == 1:
        return None, settings.device
    from accelerate import Accelerator  # pyright: ignore[reportMissingImports]

    accelerator = Accelerator(cpu=settings.device == "cpu")
    return accelerator, settings.device if settings.device == "cpu" else str(accelerator.device)


def _resize_as_told(processor: Any, settings: HarnessSettings) -> None:
    """Change what the processor resizes to, and samples of videos."""
    size = processor.image_processor.size
    edges = {"shortest_edge": settings.min_pixels, "longest_edge": settings.max_pixels}
    processor.image_processor.size = replace(size, **{name: value for name, value in edges.items() if value})
    for name in ("fps", "max_frames"):
        if (value := getattr(settings, name)) is not None:
            setattr(processor.video_processor, name, value)
