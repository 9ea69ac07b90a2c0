"""The judge of a difference: a model reads the question, the answer so far and both branches, and says whether they
differ in meaning, reasoning, logic or conclusion (R2R, arXiv 2505.21600, section 3.2: Qwen2.5-72B-Instruct at
temperature 0).

The reply's last line must be exactly `VERDICT: SAME` or `VERDICT: DIFFERENT`. Everything else is invalid, never
neutral: a broken judge must show, not turn into labels. Judges tend to prefer the branch in one place. They can be
asked in both orders; a disagreement is then invalid, and is counted.

Judge prompts are data: JSON files `{"system", "user", "same", "different"}`, those in `judge_templates/` (`general`) or
one's own by path. Fields are replaced as text, once, so a brace in an answer stays a brace, and a special token that is
spelled in a text stays text.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from tokalign.generation import EngineArguments, load_engine
from tokalign.generation.protocol import Engine, SamplingParams
from tokalign.prompts import read_template, render_prompt
from tokalign.routing.labels.arguments import VerdictArguments
from tokalign.routing.labels.classes import DIVERGENT, INVALID, NEUTRAL
from tokalign.routing.labels.verdicts import DISAGREE, NO_VERDICT, Verdict
from tokalign.stage.errors import ContractError
from tokalign.stage.hashes import weights_hash

BUILT_IN = Path(__file__).parent / "judge_templates"
FIELDS = ("question", "context", "first", "second")
_FIELD = re.compile(r"\{([A-Za-z_]\w*)\}")

Messages = list[dict[str, str]]
Ask = Callable[[list[Messages]], list[str | None]]  # a reply for each; None where there is no finished one


@dataclass(frozen=True)
class JudgeTemplate:
    """The judge's prompt.

    Attributes:
        name: what to call it in messages.
        system: text of the system message; empty for models that have none.
        user: text with the fields `{question}`, `{context}` (answer so far), `{first}`, `{second}` (the branches).
        same, different: the two words of a verdict.

    Raises:
        ContractError: a text that is missing, lacks a field or has another one, or two equal words.
    """

    name: str
    system: str
    user: str
    same: str
    different: str

    def __post_init__(self) -> None:
        where = f"Judge template {self.name!r}:"
        for part in ("system", "user", "same", "different"):
            if not isinstance(getattr(self, part), str):
                raise ContractError(f"{where} `{part}` is missing or not a text; write system, user, same, different.")
        fields = _FIELD.findall(self.user)
        listed = ", ".join(f"{{{field}}}" for field in FIELDS)
        if missing := [field for field in FIELDS if field not in fields]:
            raise ContractError(f"{where} `user` lacks the field {{{missing[0]}}}; put in all of {listed}.")
        if unknown := [field for field in fields if field not in FIELDS]:
            raise ContractError(f"{where} `user` has the unknown field {{{unknown[0]}}}; the fields are {listed}.")
        if not self.same or not self.different or self.same == self.different:
            raise ContractError(f"{where} `same` and `different` must be two different words.")


def load_judge_template(name_or_path: str | Path) -> JudgeTemplate:
    """A template by name (`general`) or from a JSON file.

    Raises:
        ContractError: neither a name nor a readable file, not a JSON object, or what `JudgeTemplate` refuses.
    """
    name, content = read_template(
        name_or_path, BUILT_IN, absent="There is no judge template", parts="system, user, same and different"
    )
    return JudgeTemplate(name, *(content.get(part) for part in ("system", "user", "same", "different")))  # type: ignore[arg-type]


def judge_template_hash(template: JudgeTemplate) -> str:
    """Identity of what the template says, whatever it is called."""
    content = {key: value for key, value in asdict(template).items() if key != "name"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


class Comparison(NamedTuple):
    """Two branches behind one prefix, as text."""

    question: str
    context: str
    llm: str
    slm: str


def judge_messages(template: JudgeTemplate, comparison: Comparison, *, swapped: bool = False) -> Messages:
    """The judge's prompt; the LLM's branch comes first unless `swapped`."""
    branches = (comparison.slm, comparison.llm) if swapped else (comparison.llm, comparison.slm)
    values = dict(zip(FIELDS, (comparison.question, comparison.context, *branches), strict=True))
    # One pass over the template, so that nothing inside a filled-in text counts as a field
    user = {"role": "user", "content": _FIELD.sub(lambda match: values[match[1]], template.user)}
    return [{"role": "system", "content": template.system}, user] if template.system else [user]


def parse_verdict(reply: str | None, template: JudgeTemplate) -> int | None:
    """NEUTRAL or DIVERGENT by the reply's last line that is not blank, None if that is not exactly a verdict."""
    lines = (reply or "").strip().splitlines()
    last = lines[-1].strip() if lines else ""
    return {f"VERDICT: {template.same}": NEUTRAL, f"VERDICT: {template.different}": DIVERGENT}.get(last)


def judge_verdicts(
    ask: Ask, template: JudgeTemplate, comparisons: Sequence[Comparison], *, swap_order: bool = False
) -> list[Verdict]:
    """What a judge says about each pair of branches.

    Args:
        ask: the judge, `engine_judge(…)` or `server_judge(…)`.
        swap_order: ask in both orders; both must give the same verdict.
    """
    # One call for all, so that an engine batches them; the replies to the orders of a pair lie side by side
    orders = (False, True) if swap_order else (False,)
    replies = ask([judge_messages(template, one, swapped=swapped) for one in comparisons for swapped in orders])
    parsed = [parse_verdict(reply, template) for reply in replies]
    verdicts = []
    for k in range(0, len(parsed), len(orders)):
        opinions = parsed[k : k + len(orders)]
        if opinions[0] is None or None in opinions:
            verdicts.append(Verdict(INVALID, NO_VERDICT))
        elif len(set(opinions)) > 1:
            verdicts.append(Verdict(INVALID, DISAGREE))
        else:
            verdicts.append(Verdict(opinions[0]))
    return verdicts


def engine_judge(engine: Engine, *, max_tokens: int = 512) -> Ask:
    """A judge that an engine runs, greedily. A prompt that does not fit the model gets no reply."""
    tokenizer = engine.tokenizer
    positions = getattr(engine, "max_length", None)
    specials = [str(token.content) for token in tokenizer.added_tokens_decoder.values() if token.special]

    def ask(conversations: list[Messages]) -> list[str | None]:
        prompts = [render_prompt([_harmless(m, specials) for m in one], tokenizer) for one in conversations]
        fits = [i for i, ids in enumerate(prompts) if positions is None or len(ids) + max_tokens <= positions]
        params = SamplingParams(temperature=0, max_tokens=max_tokens)
        replies: list[str | None] = [None] * len(prompts)
        for i, (completion,) in zip(fits, engine.generate([prompts[i] for i in fits], params), strict=True):
            if completion.finish_reason == "stop":  # what was cut off may end in a line that looks like a verdict
                replies[i] = branch_text(completion.token_ids, tokenizer)
        return replies

    return ask


def _harmless(message: dict[str, str], specials: Sequence[str]) -> dict[str, str]:
    """The message with special tokens that its text spells taken apart, so that they end no turn of the judge's."""
    text = message["content"]
    for special in specials:
        text = text.replace(special, f"{special[:1]} {special[1:]}")
    return {**message, "content": text}


def server_judge(
    base_urls: Sequence[str],
    model: str,
    *,
    max_tokens: int = 512,
    api_key_env: str = "OPENAI_API_KEY",
    concurrency: int = 64,
    timeout: float = 600.0,
    max_retries: int = 6,
    http_client: Any = None,
) -> Ask:
    """A judge behind any server of the OpenAI chat API: its reply is text, so it need not know token ids.

    Raises (when asked):
        ConnectionError: one sentence, when a request has failed for good.
    """
    import openai

    key = os.environ.get(api_key_env) or "none"  # the client insists on some key
    clients = [
        openai.OpenAI(base_url=url, api_key=key, timeout=timeout, max_retries=max_retries, http_client=http_client)
        for url in base_urls
    ]

    def one(number: int, messages: Messages) -> str | None:
        url = base_urls[number % len(clients)]
        chat: Any = clients[number % len(clients)].chat
        try:
            answer = chat.completions.create(model=model, messages=messages, temperature=0, max_tokens=max_tokens)
        except openai.OpenAIError as error:
            reason = " ".join(str(error).split())[:300]
            if isinstance(error, openai.BadRequestError) and "context" in reason.lower():
                return None  # this comparison is longer than the judge reads; asked again it would be too
            raise ConnectionError(
                f"The judge {model} at {url} failed ({reason}): check that the server runs, then start again."
            ) from error
        choice = answer.choices[0]
        return choice.message.content if choice.finish_reason == "stop" else None

    def ask(conversations: list[Messages]) -> list[str | None]:
        with ThreadPoolExecutor(concurrency) as pool:
            return list(pool.map(one, range(len(conversations)), conversations))

    return ask


def question_text(prompt: str | Messages) -> str:
    """A problem's prompt as the judge reads it: the text, or what every message says."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return prompt[0]["content"]
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def branch_text(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """A branch or a prefix as the judge reads it."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=True))


# ------------------------------------------------------------------------------------------------- the judge of a job


class Judge:
    """The judge that the arguments describe, started by the first difference that it is asked about.

    Args:
        arguments: which model, where it runs, its template and order.
        engine_arguments: the LLM's; a local judge takes its engine's options, a server its key, patience and pace.
    """

    def __init__(self, arguments: VerdictArguments, engine_arguments: EngineArguments):
        self.arguments, self.engine_arguments = arguments, engine_arguments
        self.template = load_judge_template(arguments.judge_template)
        self.engine: Engine | None = None

    def verdicts(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
        """See `judge_verdicts`."""
        return judge_verdicts(self._ask, self.template, comparisons, swap_order=self.arguments.swap_order)

    def identity(self) -> dict[str, Any]:
        """What makes other verdicts than another judge's: a job refuses to go on if it has changed."""
        arguments = self.arguments
        name = arguments.judge or ""
        local = arguments.judge_engine != "server" and Path(name).is_dir()
        return {
            "engine": arguments.judge_engine,
            "max_tokens": arguments.judge_max_tokens,
            "context": arguments.judge_context,
            "judge": weights_hash(name) if local else arguments.judge,
            "template": judge_template_hash(self.template),
            "swap_order": arguments.swap_order,
        }

    def close(self) -> None:
        """Free its engine, if it has been started."""
        if self.engine is not None:
            self.engine.close()

    @cached_property
    def _ask(self) -> Ask:
        arguments, shared = self.arguments, self.engine_arguments
        model = arguments.judge or ""
        if arguments.judge_engine == "server":
            return server_judge(
                arguments.judge_base_urls or [],
                model,
                max_tokens=arguments.judge_max_tokens,
                api_key_env=shared.api_key_env,
                concurrency=shared.concurrency,
                timeout=shared.timeout,
                max_retries=shared.max_retries,
            )
        # The LLM's options but those that name a model
        own: dict[str, Any] = {"adapter": None, "tokenizer": None, "served_model": None}
        own |= {"base_urls": arguments.judge_base_urls}
        self.engine = load_engine(replace(shared, model=model, engine=arguments.judge_engine, **own))
        return engine_judge(self.engine, max_tokens=arguments.judge_max_tokens)
