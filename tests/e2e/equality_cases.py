"""The requests of the equality battery, as plain bodies.

A value may be a function of ``Known``, what the model says undisturbed: stop strings and token
ids are then taken from the model's own text rather than fixed for one model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

#: The receiver decodes it.
HANDED_OFF = "handed off"
#: No request reaches the engine: an error, or an answer of the front end alone.
NOT_DECODED = "not decoded"

PROMPT = "The quick brown fox looks at the sea and says that"
LONG_PROMPT = " ".join(f"Item {i} of the list is worth {i * 7 % 13} coins." for i in range(30))
MESSAGES = [
    {"role": "system", "content": "Answer in one sentence."},
    {"role": "user", "content": "What is a lighthouse for?"},
]
IDS = [1200 + 37 * i for i in range(40)]
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a town",
        "parameters": {"type": "object", "properties": {"town": {"type": "string"}}},
    },
}


@dataclass(frozen=True)
class Known:
    """The greedy continuation of ``PROMPT`` and of ``MESSAGES``, 40 tokens each."""

    text: str
    token_ids: list[int]
    pieces: list[str]  # each token's text
    chat: str
    long_answer: list[int]  # the token ids of LONG_PROMPT and 140 tokens after it


@dataclass(frozen=True)
class Case:
    """One request. ``where`` is HANDED_OFF, NOT_DECODED, or the reason for decoding locally."""

    name: str
    path: str
    fields: dict[str, Any]
    where: str = HANDED_OFF
    status: int = 200

    def body(self, known: Known) -> dict[str, Any]:
        """The request's JSON."""
        return {
            key: value(known) if callable(value) else value for key, value in self.fields.items()
        }


CASES: list[Case] = []


def _add(path: str, defaults: dict[str, Any]) -> Callable[..., None]:
    def add(name: str, where: str = HANDED_OFF, status: int = 200, **fields: Any) -> None:
        full = {k: v for k, v in (defaults | fields).items() if v is not ...}
        kind = path.rsplit("/", 1)[-1]
        CASES.append(Case(f"{kind}: {name}", path, full, where, status))

    return add


completion = _add(
    "/v1/completions", {"model": "m", "prompt": PROMPT, "temperature": 0, "max_tokens": 16}
)
chat = _add(
    "/v1/chat/completions",
    {"model": "m", "messages": MESSAGES, "temperature": 0, "max_completion_tokens": 16},
)
responses = _add(
    "/v1/responses",
    {"model": "m", "input": MESSAGES[1:], "temperature": 0, "max_output_tokens": 16},
)
STREAM = {"stream": True, "stream_options": {"include_usage": True}}

# fmt: off
# --- lengths, prompts, several at once -------------------------------------------------------

completion("plain")
completion("streamed", **STREAM)
completion("streamed without usage", stream=True)
completion("streamed, usage in every chunk",
           stream=True, stream_options=STREAM["stream_options"] | {"continuous_usage_stats": True})
completion("one token", "short_output", max_tokens=1)
completion("one token, streamed", "short_output", max_tokens=1, **STREAM)
completion("two tokens", max_tokens=2)
completion("300 tokens", max_tokens=300, ignore_eos=True)
completion("300 tokens, streamed", max_tokens=300, ignore_eos=True, **STREAM)
completion("up to the context's end", prompt=IDS * 50, max_tokens=48, ignore_eos=True)
completion("no limit but the context's", prompt=IDS * 50, max_tokens=None, ignore_eos=True)
completion("room for a single token", "short_output", prompt=[*IDS * 51, *IDS[:7]], max_tokens=9)
completion("token ids", prompt=IDS)
completion("four prompts", prompt=[PROMPT, "Once", LONG_PROMPT, "And then there was"])
completion("four prompts of token ids, streamed", prompt=[IDS, IDS[:5], IDS[:1], IDS * 3], **STREAM)
completion("two samples", n=2, temperature=1, top_k=1)
completion("two samples, streamed", n=2, temperature=1, top_k=1, **STREAM)
completion("two samples of two prompts", n=2, temperature=1, top_k=1, prompt=[PROMPT, "Once"])
completion("seeded, one candidate", seed=5, temperature=0.7, top_k=1)
completion("greedy with a seed", seed=5)
completion("priority", priority=3)
completion("a prompt again", prompt=LONG_PROMPT)
completion("a longer prompt", prompt=LONG_PROMPT + " The end.")
completion("another cache salt", prompt=LONG_PROMPT, cache_salt="pepper")
completion("the prompt cut to its end", prompt=LONG_PROMPT, truncate_prompt_tokens=20,
           return_token_ids=True)
completion("an earlier answer in the prompt", prompt=lambda k: k.long_answer)

# --- where the text ends ---------------------------------------------------------------------

completion("stop string", stop=lambda k: [k.text[12:18]])
completion("stop string, streamed", stop=lambda k: [k.text[12:18]], **STREAM)
completion("stop string kept", stop=lambda k: [k.text[12:18]], include_stop_str_in_output=True)
completion("stop string kept, streamed", stop=lambda k: [k.text[12:18]],
           include_stop_str_in_output=True, **STREAM)
completion("stop string across tokens", stop=lambda k: [k.pieces[4][-1] + k.pieces[5][:1]])
completion("stop string across tokens, streamed",
           stop=lambda k: [k.pieces[4][-1] + k.pieces[5][:1]], **STREAM)
completion("stop string in the first token", stop=lambda k: [k.pieces[0].strip()])
completion("stop string that only begins", stop=lambda k: [k.text[12:18] + "\0"], **STREAM)
completion("four stop strings", stop=lambda k: ["\0", k.text[30:36], "\1", k.text[20:26]])
completion("stop token", stop_token_ids=lambda k: [k.token_ids[6]])
completion("stop token, streamed", stop_token_ids=lambda k: [k.token_ids[6]], **STREAM)
completion("stop token first", stop_token_ids=lambda k: [k.token_ids[0]])
completion("stop token held off", stop_token_ids=lambda k: [k.token_ids[3]], min_tokens=8)
completion("stop string held off", stop=lambda k: [k.text[4:8]], min_tokens=12)
completion("end of text, forced", logit_bias={"2": 100})
completion("end of text, forced later", logit_bias={"2": 100}, min_tokens=6)
completion("end of text ignored", logit_bias={"2": 60}, ignore_eos=True, skip_special_tokens=False)
completion("end of text held off although ignored", ignore_eos=True, min_tokens=5,
           logit_bias={"2": 60})

# --- what is told about the tokens -----------------------------------------------------------

completion("logprobs 0", logprobs=0)
completion("logprobs 1", logprobs=1)
completion("logprobs 5", logprobs=5)
completion("logprobs 5, streamed", logprobs=5, **STREAM)
completion("logprobs as token ids", logprobs=2, return_tokens_as_token_ids=True)
completion("logprobs of two samples", n=2, temperature=1, top_k=1, logprobs=2)
completion("logprobs and a stop string", logprobs=2, stop=lambda k: [k.text[12:18]])
completion("all logprobs a receiver does not give", "logprobs", logprobs=40)
completion("logprobs of named tokens", logprobs=1, logprob_token_ids=[100, 200])
completion("logprobs of named tokens, streamed", logprobs=1, logprob_token_ids=[7, 4321], **STREAM)
completion("logprobs of many named tokens", "logprob_token_ids", logprobs=1,
           logprob_token_ids=list(range(100, 130)))
completion("echo", echo=True)
completion("echo with logprobs", echo=True, logprobs=2)
completion("echo, streamed", echo=True, **STREAM)
completion("echo of nothing else", "short_output", echo=True, max_tokens=0)
completion("prompt logprobs", prompt_logprobs=2)
completion("token ids returned", return_token_ids=True)
completion("token ids returned, streamed", return_token_ids=True, **STREAM)
chat("logprobs", logprobs=True)
chat("top logprobs", logprobs=True, top_logprobs=5)
chat("top logprobs, streamed", logprobs=True, top_logprobs=3, **STREAM)
chat("prompt logprobs", prompt_logprobs=1)
chat("token ids returned", return_token_ids=True)

# --- which tokens are likely -----------------------------------------------------------------

completion("bias", logit_bias=lambda k: {str(k.token_ids[2]): -100, "4321": 5})
completion("allowed tokens", allowed_token_ids=list(range(1000, 1400)))
completion("bad words", bad_words=lambda k: [k.pieces[2].strip(), k.pieces[7].strip()])
completion("a bad phrase", bad_words=lambda k: [(k.pieces[4] + k.pieces[5]).strip()])
completion("repetition penalty", repetition_penalty=1.3, max_tokens=60)
completion("presence penalty", presence_penalty=1.5, max_tokens=60)
completion("frequency penalty", frequency_penalty=1.2, max_tokens=60)
completion("all penalties", repetition_penalty=0.8, frequency_penalty=0.5, presence_penalty=-0.5,
           max_tokens=60, logprobs=1)
chat("penalties and bias", frequency_penalty=0.7, logit_bias={"500": 4})

# --- chat and responses ----------------------------------------------------------------------

chat("plain")
chat("streamed", **STREAM)
chat("max_tokens by its old name", max_completion_tokens=..., max_tokens=9)
chat("two samples", n=2, temperature=1, top_k=1)
chat("two samples, streamed", n=2, temperature=1, top_k=1, **STREAM)
chat("stop string", stop=lambda k: k.chat[10:16])
chat("stop string, streamed", stop=lambda k: k.chat[10:16], **STREAM)
chat("the last message continued", add_generation_prompt=False, continue_final_message=True,
     messages=[*MESSAGES, {"role": "assistant", "content": "A lighthouse is"}],
     echo=True)
chat("several turns", messages=[*MESSAGES, {"role": "assistant", "content": "For ships."},
                                {"role": "user", "content": "And a buoy?"}])
chat("tools, none wanted", tools=[TOOL], tool_choice="none")
chat("tools, none wanted, streamed", tools=[TOOL], tool_choice="none", **STREAM)
chat("tools without a parser", NOT_DECODED, 400, tools=[TOOL], tool_choice="auto")
chat("a named tool without a parser", NOT_DECODED, 400, tools=[TOOL],
     tool_choice={"type": "function", "function": {"name": "weather"}})
responses("plain")
responses("streamed", stream=True)
responses("instructions", instructions="Be brief.", input="What is a harbour?")
responses("top logprobs", top_logprobs=2, include=["message.output_text.logprobs"])

# --- structured output -----------------------------------------------------------------------
# Where the two sides' libraries allow other white space, or other pieces of a word, texts may
# differ: tests/e2e/test_structured_output.py.

completion("choice", structured_outputs={"choice": ["perhaps", "certainly"]})
completion("choice, streamed", structured_outputs={"choice": ["perhaps", "certainly"]}, **STREAM)
completion("regular expression", structured_outputs={"regex": "[a-c]{3}-[0-9]{2}"})
completion("regular expression with an end that is ignored", ignore_eos=True,
           structured_outputs={"regex": "[a-c]{3}-[0-9]{2}"}, skip_special_tokens=False)
completion("regular expression and log-probabilities", logprobs=0,
           structured_outputs={"regex": "[a-c]{3}-[0-9]{2}"})
completion("regular expression of some length", "structured_output", min_tokens=4,
           structured_outputs={"regex": "[a-c]{3}-[0-9]{2}"})

# --- what only vLLM does ---------------------------------------------------------------------

completion("beam search", "short_output", use_beam_search=True, n=3, max_tokens=8)
completion("repetition detection", "repetition_detection",
           repetition_detection={"max_pattern_size": 3, "min_count": 4})
completion("custom arguments", "extra_args", vllm_xargs={"mine": 1})
completion("a router's parameters", "router", kv_transfer_params={"do_remote_prefill": True})

# --- errors, and answers without the engine --------------------------------------------------

completion("temperature below 0", NOT_DECODED, 400, temperature=-1)
completion("top_p of 2", NOT_DECODED, 400, top_p=2)
completion("greedy and two samples", NOT_DECODED, 400, n=2)
completion("too many logprobs", NOT_DECODED, 400, logprobs=100)
completion("too long a prompt", NOT_DECODED, 400, prompt=IDS * 60)
completion("a token beyond the vocabulary", NOT_DECODED, 400, prompt=[5, 60_000])
completion("min_tokens over max_tokens", NOT_DECODED, 400, min_tokens=20, max_tokens=10)
completion("another model", NOT_DECODED, 404, model="other")
completion("a bias beyond the vocabulary", NOT_DECODED, 400, logit_bias={"60000": 1})
completion("a number that is a word", NOT_DECODED, 400, max_tokens="many")
completion("a thinking budget without a reasoner", NOT_DECODED, 400, thinking_token_budget=5)
completion("embeddings not enabled", NOT_DECODED, 400, prompt=..., prompt_embeds="AAAA")
chat("no messages", NOT_DECODED, 400, messages=...)
chat("a message that is none", NOT_DECODED, 400, messages=["hello"])
chat("a message without content", messages=[{"role": "user"}])
responses("an unknown earlier response", NOT_DECODED, 404, previous_response_id="resp_0")
CASES += [
    Case("tokenize", "/tokenize", {"model": "m", "prompt": PROMPT}, NOT_DECODED),
    Case("tokenize: chat", "/tokenize", {"model": "m", "messages": MESSAGES}, NOT_DECODED),
    Case("detokenize", "/detokenize", {"model": "m", "tokens": IDS}, NOT_DECODED),
    Case("models", "/v1/models", {}, NOT_DECODED),
    Case("version", "/version", {}, NOT_DECODED),
    Case("health", "/health", {}, NOT_DECODED),
    Case("embeddings", "/v1/embeddings", {"model": "m", "input": "x"}, NOT_DECODED, 404),
]
