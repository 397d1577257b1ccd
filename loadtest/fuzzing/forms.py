"""Valid requests for each open endpoint, small in tokens, and fields that they may have besides."""

from typing import Any, NamedTuple

Body = dict[str, Any]

TOKENS = 3
_QUESTION = [{"role": "user", "content": "Name a harbour."}]
_TALK = [
    {"role": "system", "content": "Answer in one word."},
    {"role": "user", "content": [{"type": "text", "text": "Name a ship."}]},
    {"role": "assistant", "content": "Argo"},
    {"role": "user", "content": "Another one."},
]
# Long enough to be compressed.
_LONG = "The harbour master wrote down every ship that passed. " * 30
_PARAMETERS = {"type": "object", "properties": {"port": {"type": "string"}}, "required": ["port"]}
_TOOL = {
    "type": "function",
    "function": {"name": "weather", "description": "at a port", "parameters": _PARAMETERS},
}
_SCHEMA = {"type": "json_schema", "json_schema": {"name": "ship", "schema": _PARAMETERS}}
_SAMPLING: Body = {
    "temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "seed": 7, "stop": ["\n", "###"],
    "frequency_penalty": 0.5, "presence_penalty": -0.5, "repetition_penalty": 1.1,
    "logit_bias": {"17": 5}, "stop_token_ids": [2], "ignore_eos": True, "min_tokens": 1,
    "n": 2, "bad_words": ["ship"], "allowed_token_ids": [17, 18, 19], "skip_special_tokens": False,
    "include_stop_str_in_output": True, "spaces_between_special_tokens": False,
    "truncate_prompt_tokens": 16, "prompt_logprobs": 1, "length_penalty": 1.0,
    "use_beam_search": False, "logprob_token_ids": [17], "truncation_side": "left",
    "structured_outputs": {"choice": ["ship", "boat"]},
    "repetition_detection": {"max_pattern_size": 4, "min_count": 2},
}  # fmt: skip
_COMMON: Body = {
    "stream": True, "stream_options": {"include_usage": True}, "user": "someone",
    "request_id": "mine", "session_id": "talk-1", "priority": 1, "cache_salt": "salt",
    "return_token_ids": True, "return_tokens_as_token_ids": True, "stream_interval": 2,
    "kv_transfer_params": {"do_remote_decode": False}, "ec_transfer_params": {},
    "return_token_offsets": True, "return_prompt_text": True, "add_special_tokens": True,
    "mm_processor_kwargs": {"num_crops": 4}, "media_io_kwargs": {"image": {"a": 1}},
    "thinking_token_budget": 4, "watermarking": False, "metadata": {"a": "b"}, "store": False,
}  # fmt: skip
_CHAT: Body = {
    "logprobs": True, "top_logprobs": 2, "tools": [_TOOL], "tool_choice": "auto",
    "response_format": _SCHEMA, "parallel_tool_calls": False, "reasoning_effort": "low",
    "include_reasoning": False, "max_completion_tokens": TOKENS, "echo": True,
    "add_generation_prompt": False, "continue_final_message": False,
    "documents": [{"title": "a", "text": "b"}], "chat_template": "{{ messages[0]['content'] }}",
    "chat_template_kwargs": {"enable_thinking": False},
}  # fmt: skip
_COMPLETION: Body = {
    "logprobs": 2, "echo": True, "suffix": "end", "best_of": 2, "response_format": _SCHEMA,
    "prompt_embeds": "AAAA",
}  # fmt: skip
_RESPONSE: Body = {
    "instructions": "Be short.", "background": False, "previous_response_id": "resp_1",
    "include": ["message.output_text.logprobs"], "max_tool_calls": 1,
    "reasoning": {"effort": "low"}, "text": {"format": {"type": "text"}}, "truncation": "auto",
    "service_tier": "auto", "tool_choice": "none", "top_logprobs": 1, "prompt_cache_key": "k",
    "tools": [{"type": "function", "name": "weather", "parameters": _PARAMETERS}],
    "prompt": {"id": "pmpt_1", "variables": {"a": "b"}}, "previous_input_messages": [],
    "enable_response_messages": True,
}  # fmt: skip
_MESSAGE: Body = {
    "system": "Be short.", "stop_sequences": ["\n"], "thinking": {"type": "disabled"},
    "tools": [{"name": "weather", "input_schema": _PARAMETERS}], "tool_choice": {"type": "auto"},
    "output_config": {"effort": "low"},
}  # fmt: skip
_TOKENIZE: Body = {
    "return_token_strs": True, "add_generation_prompt": True, "tools": [_TOOL],
    "continue_final_message": False, "chat_template": "{{ messages }}",
}  # fmt: skip

# Options of the compression, as clients may give them to any request.
COMPRESSION: Body = {
    "adakv_budget_tokens": 64, "adakv_keep_ratio": 0.5, "adakv_policy": "snapkv",
    "adakv_alpha": 0.2, "adakv_window_tokens": 16, "adakv_session": "off",
    "adakv_decode_budget_tokens": 64, "adakv_decode_interval_tokens": 8,
}  # fmt: skip


class Form(NamedTuple):
    """An endpoint.

    bodies: valid requests, without the model's name.
    fields: others that this kind of request may have, with a valid value each.
    """

    path: str
    bodies: tuple[Body, ...]
    fields: Body
    method: str = "POST"


def _chat() -> tuple[Body, ...]:
    limit = {"max_tokens": TOKENS}
    return (
        {"messages": _QUESTION, **limit},
        {"messages": _TALK, **limit, "temperature": 0},
        {"messages": _QUESTION, **limit, "stream": True},
        {"messages": _QUESTION, **limit, "tools": [_TOOL]},
    )


def _completions() -> tuple[Body, ...]:
    limit = {"max_tokens": TOKENS}
    return (
        {"prompt": "Once upon", **limit},
        {"prompt": [40, 41, 42, 43], **limit, "temperature": 0},
        {"prompt": ["Once", "Twice"], **limit},
        {"prompt": "Once upon", **limit, "stream": True},
        {"prompt": _LONG, **limit, "vllm_xargs": {"adakv_budget_tokens": 64}},
    )


def _responses() -> tuple[Body, ...]:
    limit = {"max_output_tokens": TOKENS}
    return (
        {"input": "Name a harbour.", **limit},
        {"input": [{"type": "message", "role": "user", "content": "Name a ship."}], **limit},
        {"input": "Name a harbour.", **limit, "stream": True},
    )


def _messages() -> tuple[Body, ...]:
    limit = {"max_tokens": TOKENS}
    text = [{"role": "user", "content": [{"type": "text", "text": "Name a ship."}]}]
    return (
        {"messages": _QUESTION, **limit},
        {"messages": text, **limit, "system": "Be short."},
        {"messages": _QUESTION, **limit, "stream": True},
    )


_SAMPLED = {**_SAMPLING, **_COMMON}
_TOKEN_IDS = {"token_ids": [40, 41, 42], "sampling_params": {"max_tokens": TOKENS}}
_QUESTIONS = {"q": {"type": "choice", "criteria": {"yes": None, "no": "not"}}}

FORMS: tuple[Form, ...] = (
    Form("/v1/chat/completions", _chat(), {**_SAMPLED, **_CHAT}),
    Form("/v1/completions", _completions(), {**_SAMPLED, **_COMPLETION}),
    Form("/v1/responses", _responses(), {**_SAMPLED, **_RESPONSE}),
    Form("/v1/messages", _messages(), {**_SAMPLED, **_MESSAGE}),
    Form(
        "/v1/chat/completions/batch",
        ({"messages": [_QUESTION, _TALK], "max_tokens": TOKENS},),
        {**_SAMPLED, **_CHAT},
    ),
    Form("/invocations", (*_chat()[:2], *_completions()[:2]), {**_SAMPLED, **_CHAT}),
    Form("/inference/v1/generate", (_TOKEN_IDS, {**_TOKEN_IDS, "stream": True}), _COMMON),
    Form("/v1/messages/count_tokens", ({"messages": _QUESTION},), _MESSAGE),
    Form("/tokenize", ({"prompt": "Once"}, {"messages": _QUESTION}), {**_COMMON, **_TOKENIZE}),
    Form("/detokenize", ({"tokens": [40, 41, 42]},), _COMMON),
    Form("/v1/chat/completions/render", _chat()[:2], {**_SAMPLED, **_CHAT}),
    Form("/v1/completions/render", _completions()[:3], {**_SAMPLED, **_COMPLETION}),
    Form("/v1/systemone", ({"state": "A ship.", "questions": _QUESTIONS},), _COMMON),
    Form(
        "/generative_scoring",
        ({"query": "Is it a ship?", "items": ["Argo", "Rome"], "label_token_ids": [17, 18]},),
        _COMMON,
    ),
    Form("/v1/embeddings", ({"input": "Once"},), _COMMON),
    Form("/score", ({"text_1": "Once", "text_2": "Twice"},), _COMMON),
    Form("/v1/models", ({},), {}, "GET"),
    Form("/version", ({},), {}, "GET"),
)  # fmt: skip

# What these hold decides how much a request costs.
COSTS = (
    "max_tokens", "max_completion_tokens", "max_output_tokens", "min_tokens", "ignore_eos", "n",
    "best_of", "use_beam_search", "prompt", "messages", "input", "token_ids", "sampling_params",
    "items", "questions", "tools", "structured_outputs", "response_format", "text", "prompt_embeds",
    "chat_template", "documents", "background", "vllm_xargs", "state", "thinking_token_budget",
)  # fmt: skip
