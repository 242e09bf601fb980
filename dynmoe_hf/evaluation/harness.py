"""lm-evaluation-harness on a model of this family: its scores, and the experts that each task's tokens used.

What counts as a token of the prompt or of the continuation:

* a request that scores a continuation: the model reads context and continuation but for the last token, which it only
  predicts. The tokens read of the continuation are its own, so an answer of a single token has none;
* a text whose likelihood is taken as a whole: every token read is continuation, also one read again by the last window;
* a generation: the prompt is what the first call reads, without left padding; the continuation is what is read
  afterwards, up to the first end-of-sequence token or stop sequence of that row. As above, the last token is not read.

Requests that read the same tokens are computed once by the harness, and counted once for each of them. So the figures
are those of one request after the other, whatever the batch size.
"""

from __future__ import annotations

import contextlib
import difflib
import logging
import random
import sys
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lm_eval import evaluate
from lm_eval.api.instance import Instance
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.models.utils_hf import stop_sequences_criteria
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, pattern_match
from torch import Tensor

from dynmoe_hf.evaluation.task_compute import TaskCounts
from dynmoe_hf.model.routing import shown

if TYPE_CHECKING:
    from lm_eval.api.task import Task
    from lm_eval.tasks.manager import TaskDict
    from transformers import PreTrainedTokenizerBase

    from dynmoe_hf import DynMoeForCausalLM


class CountingLM(HFLM):
    """A loaded model as the harness asks it, which notes what is routed: `counts`, by the name of the task.

    Scores are those of `HFLM`, on which `lm_eval --model hf` runs, at the same batch size. Answers that come out of a
    cache of responses are not counted.

    Args:
        model: a language model; it is put in evaluation mode.
        tokenizer: its tokenizer. The harness gives it a padding token if it has none.
        batch_size: rows in one call, at least 1.
    """

    def __init__(self, model: DynMoeForCausalLM, tokenizer: PreTrainedTokenizerBase, batch_size: int = 8) -> None:
        with _errors_only("lm_eval.models.huggingface"):  # it warns of every loaded model
            super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        self.counts: dict[str, TaskCounts] = defaultdict(TaskCounts)
        self._owners: Iterator[tuple[str, bool]] = iter(())  # task of each row to come, and whether it has no prompt
        self._readers: dict[tuple[int, ...], list[tuple[str, int]]] = {}  # tokens read -> (task, tokens of the prompt)
        self._rows: Iterator[tuple[list[int], Tensor]] = iter(())  # tokens and counts (S, L) of the last batch
        self._askers: dict[str, deque[str]] = {}  # prompt -> tasks that still wait for its continuation
        self._prompts: Sequence[str] = ()  # of the batch that is generated

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        self._owners = iter([(request.task_name, False) for request in requests])
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        owners = []
        for request in requests:
            windows = get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, context_len=1
            )
            owners += [(request.task_name, True) for _ in windows]
        self._owners = iter(owners)
        return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **options: Any
    ) -> list[tuple[float, bool]]:
        self._readers = defaultdict(list)
        for _, context, continuation in requests:
            task, has_no_prompt = next(self._owners)
            read = tuple((context + continuation)[-(self.max_length + 1) : -1])
            self._readers[read].append((task, 0 if has_no_prompt else len(read) - len(continuation) + 1))
        return super()._loglikelihood_tokens(requests, **options)

    def _model_call(self, inps: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        with _selected_experts(self.model) as calls:
            logits = super()._model_call(inps, *args, **kwargs)
        self._rows = zip(inps.tolist(), calls[0], strict=True)
        return logits

    def _select_cont_toks(self, logits: Tensor, contlen: int | None = None, inplen: int | None = None) -> Tensor:
        # The harness comes here with one row after the other, and it alone knows where the padding of a row begins.
        row, counts = next(self._rows)
        for task, num_prompt in self._readers.pop(tuple(row[:inplen]), ()):
            self.counts[task].add(counts[:inplen], num_prompt)
        return super()._select_cont_toks(logits, contlen=contlen, inplen=inplen)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        # Prompts come back as strings, in the order of their options. Two tasks may ask the same with other options.
        by_options = defaultdict(list)
        for request in requests:
            by_options[repr(sorted(request.args[1].items()))].append(request)
        self._askers = defaultdict(deque)
        for request in chain.from_iterable(by_options.values()):
            self._askers[request.args[0]].append(request.task_name)
        return super().generate_until(requests, disable_tqdm=disable_tqdm)

    def tok_batch_encode(self, strings: list[str], *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self._prompts = strings
        return super().tok_batch_encode(strings, *args, **kwargs)

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **options: Any) -> Tensor:
        with _selected_experts(self.model) as calls:
            tokens = super()._model_generate(context, max_length, stop, **options)
        length = context.shape[1]
        is_real = options["attention_mask"].bool().cpu()
        for prompt, row, counts, real in zip(self._prompts, tokens, torch.cat(calls, dim=1), is_real, strict=True):
            num_read = self._num_generated(row[length:], stop) - 1
            own = torch.cat([counts[:length][real], counts[length : length + num_read]])
            self.counts[self._askers[prompt].popleft()].add(own, int(real.sum()))
        return tokens

    def _num_generated(self, tokens: Tensor, stop: list[str]) -> int:
        """Tokens until a row would have stopped alone; in a batch it goes on until the last one does."""
        ends = self.model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        criteria = stop_sequences_criteria(self.tokenizer, stop, 0, 1)
        for number, token in enumerate(tokens.tolist(), 1):
            if token in ends or any(criterion(tokens[None, :number], None) for criterion in criteria):
                return number
        return len(tokens)


def load_tasks(
    names: Sequence[str],
    include_path: str | None = None,
    num_fewshot: int | None = None,
    gen_kwargs: dict[str, Any] | None = None,
    seed: int | None = None,
    max_length: int | None = None,
) -> TaskDict:
    """Find tasks, load their data and set them up as `lm_eval` does.

    The index of all tasks of the harness is read only if a name is not that of a task in `include_path`: it takes half
    a minute.

    Args:
        names: of tasks, groups and tags; `*` stands for any text.
        include_path: folder of further tasks, which come before those of the harness.
        num_fewshot: examples in the prompt, for tasks that do not insist on none; None leaves it to the task.
        gen_kwargs: changes to the generation options of tasks that generate.
        seed: of the choice of these examples; None is that of the harness.
        max_length: positions of the model, to refuse a task that generates more tokens.

    Raises:
        ValueError: a task is unknown, cannot be loaded, or cannot be run and counted here.
    """
    manager = TaskManager(include_path=include_path, include_defaults=False)
    # A group or a tag may name tasks of the harness; a task stands for itself.
    if any(not pattern_match([name], manager.all_subtasks) for name in names):
        manager = TaskManager(include_path=include_path)
    tasks: TaskDict = {"tasks": {}, "groups": {}, "group_map": {}}
    for name in dict.fromkeys(chain.from_iterable(_known(manager, name) for name in names)):
        try:
            loaded = manager.load(name)
        # What the libraries behind it raise without network, or for a broken file, is anything.
        except Exception as error:
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            raise ValueError(
                f"cannot load the data of task {name!r}: {reason}. Without network, --include-path names a folder of "
                "tasks over local files."
            ) from error
        for part, found in loaded.items():
            tasks[part] |= found
    for task in tasks["tasks"].values():
        _refuse_unsafe(task)
        if task.get_config("output_type") == "generate_until":
            task.set_config("generation_kwargs", gen_kwargs or {}, update=True)
            _refuse_generation(task, max_length)
        if num_fewshot is not None and task.get_config("num_fewshot") != 0:
            task.set_config("num_fewshot", num_fewshot)
        elif task.get_config("num_fewshot") is None:
            task.set_config("num_fewshot", 0)
        task.set_fewshot_seed(DEFAULT_OTHER_SEED if seed is None else seed)
    return tasks


def run_tasks(
    model: DynMoeForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    tasks: TaskDict,
    batch_size: int = 8,
    limit: int | None = None,
    seed: int | None = None,
    bootstrap_iters: int = 100,
    apply_chat_template: bool = False,
) -> tuple[dict[str, Any], dict[str, TaskCounts]]:
    """Run loaded tasks on a model as it routes now.

    The random generators of Python, numpy and torch are seeded, as `lm_eval` does.

    Args:
        tasks: of `load_tasks`.
        batch_size: rows in one call.
        limit: examples of each task, the first ones; None takes all.
        seed: None is the seeds of the harness.
        bootstrap_iters: resamples for the standard errors of metrics that are no means; 0 leaves out all of them.

    Returns:
        The results of `lm_eval.evaluate` without samples; and what each task, and each group of tasks, routed.
    """
    lm = CountingLM(model, tokenizer, batch_size)
    random.seed(DEFAULT_RANDOM_SEED if seed is None else seed)
    np.random.seed(DEFAULT_OTHER_SEED if seed is None else seed)
    torch.manual_seed(DEFAULT_OTHER_SEED if seed is None else seed)
    # The harness prints its progress where a reader of --json looks.
    with contextlib.redirect_stdout(sys.stderr):
        results = evaluate(
            lm,
            tasks,
            limit=limit,
            bootstrap_iters=bootstrap_iters,
            log_samples=False,
            apply_chat_template=apply_chat_template,
            fewshot_as_multiturn=apply_chat_template,
        )
    counts = dict(lm.counts)
    for name, group in tasks["groups"].items():
        counts[name] = TaskCounts.pooled(counts[task.task_name] for task in group.get_all_tasks())
    return results, counts


@contextlib.contextmanager
def _selected_experts(model: DynMoeForCausalLM) -> Iterator[list[Tensor]]:
    """The experts used by every token of every call inside the block: one tensor (B, S, L) int64 a call."""
    calls: list[Tensor] = []

    def ask(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, kwargs | {"output_routing": True}

    def note(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        shape = (args[0] if args else kwargs["input_ids"]).shape
        counts = [routing.num_selected.view(shape).cpu() for routing in output.routing if routing is not None]
        calls.append(torch.stack(counts, -1) if counts else torch.zeros(*shape, 0, dtype=torch.long))

    hooks = (
        model.register_forward_pre_hook(ask, with_kwargs=True),
        model.register_forward_hook(note, with_kwargs=True),
    )
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def _known(manager: TaskManager, name: str) -> list[str]:
    """The tasks, groups and tags that a name stands for. Raises ValueError if there are none."""
    matches = pattern_match([name], manager.all_tasks)
    if not matches:
        close = difflib.get_close_matches(name[:100], manager.all_tasks, n=3)
        hint = (
            f"Did you mean {' or '.join(map(repr, close))}?" if close else "`lm_eval ls tasks` lists those there are."
        )
        raise ValueError(f"unknown task {shown(name)}. {hint}")
    return matches


def _refuse_unsafe(task: Task) -> None:
    if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
        what = "needs images" if getattr(task, "MULTIMODAL", False) else "runs code that the model writes"
        raise ValueError(f"task {task.task_name!r} {what}; that is left to `lm_eval --model hf`.")


def _refuse_generation(task: Task, max_length: int | None) -> None:
    options = normalize_gen_kwargs(task.get_config("generation_kwargs"))
    if max_length is not None and options["max_gen_toks"] >= max_length:
        raise ValueError(
            f"task {task.task_name!r} generates {options['max_gen_toks']} tokens, and the model has {max_length} "
            "positions; --gen-kwargs max_gen_toks=N asks for fewer."
        )
    if options.get("num_beams", 1) > 1:
        raise ValueError(f"task {task.task_name!r} searches with beams, and the experts of a beam are not counted.")


@contextlib.contextmanager
def _errors_only(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
