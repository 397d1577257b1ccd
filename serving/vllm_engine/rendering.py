"""vLLM's own rendering of requests to prompts, without an engine."""

import json
from collections.abc import Awaitable, Callable
from typing import Any

from vllm.config import DeviceConfig, VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.anthropic.protocol import AnthropicMessagesRequest
from vllm.entrypoints.anthropic.serving import AnthropicServingMessages
from vllm.entrypoints.launchers.cli_args import resolve_default_chat_template_kwargs
from vllm.entrypoints.openai.chat_completion.protocol import (
    BatchChatCompletionRequest,
    ChatCompletionRequest,
)
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.renderers import renderer_from_config
from vllm.renderers.chat_utils import has_non_text_content, load_chat_template
from vllm.renderers.online_renderer import OnlineRenderer

from adakv_serve.serving.http.rendered import Handling, NotRendered, Rendered
from adakv_serve.serving.vllm_engine.options import server_options
from adakv_worker.byte_budgets import in_entries
from adakv_worker.config import CompressionConfig
from adakv_worker.stored_dtypes import page_tokens

_Render = Callable[[dict[str, Any]], Awaitable[Rendered]]
# Parts of a response's input that are no text.
_MEDIA = ("input_image", "input_file", "input_audio")


class VllmRenderer:
    """Renders each form of request as vLLM's server does, with the same settings."""

    def __init__(self, online: OnlineRenderer) -> None:
        self._online = online
        self._model = online.model_config
        self._merge_system = AnthropicServingMessages._should_merge_inline_system(online)
        self._forms: dict[str, _Render] = {
            "/v1/chat/completions": self._chat,
            "/v1/chat/completions/batch": self._batch,
            "/v1/completions": self._completion,
            "/v1/responses": self._response,
            "/v1/messages": self._message,
            "/invocations": self._invocation,
            "/inference/v1/generate": self._tokens,
        }

    @classmethod
    def of_model(
        cls, path: str, name: str, engine_args: dict[str, Any], server_args: dict[str, Any]
    ) -> "VllmRenderer":
        """Make the renderer of a model, in some seconds.

        Args:
            path: the model's folder or name. name: its name for clients.

        Raises:
            Exception: vLLM cannot make it.
        """
        args = AsyncEngineArgs(model=path, served_model_name=[name], **engine_args)
        options = server_options(path, name, args, server_args)
        model_config = args.create_model_config()
        # Nothing is computed here, whatever the engines' devices are.
        model_config.quantization = None
        config = VllmConfig(
            model_config=model_config,
            device_config=DeviceConfig("cpu"),
            structured_outputs_config=args.create_structured_outputs_config(),
        )
        online = OnlineRenderer(
            model_config=model_config,
            renderer=renderer_from_config(config),
            request_logger=None,
            chat_template=load_chat_template(options.chat_template),
            chat_template_content_format=options.chat_template_content_format,
            trust_request_chat_template=options.trust_request_chat_template,
            enable_auto_tools=options.enable_auto_tool_choice,
            exclude_tools_when_tool_choice_none=options.exclude_tools_when_tool_choice_none,
            tool_parser=options.tool_call_parser,
            tool_strict_level=options.tool_strict_level,
            reasoning_parser=options.reasoning_parser,
            default_chat_template_kwargs=resolve_default_chat_template_kwargs(options),
        )
        online.warmup()
        return cls(online)

    def page_tokens(self, block_size_tokens: int, cache_dtype: str, page_dtype: str) -> int:
        """Return the entries of a compressed page."""
        return page_tokens(self._model, block_size_tokens, cache_dtype, page_dtype)

    def in_entries(self, config: CompressionConfig, cache_dtype: str) -> CompressionConfig:
        """Return settings whose budgets are in entries."""
        return in_entries(config, self._model, cache_dtype)

    def takes(self, path: str) -> bool:
        return path in self._forms

    async def render(self, path: str, body: bytes) -> Rendered:
        try:
            request = json.loads(body)
            if not isinstance(request, dict):
                raise NotRendered("malformed")
        except (ValueError, RecursionError) as error:
            raise NotRendered("malformed", error) from error
        handling = _handling(request)
        try:
            rendered = await self._forms[path](request)
        except NotRendered as error:
            error.handling = handling
            raise
        except Exception as error:
            # The engine refuses it with a better message.
            raise NotRendered("malformed", error) from error
        return rendered._replace(handling=handling)

    async def _chat(self, fields: dict[str, Any]) -> Rendered:
        return await self._of_chat(ChatCompletionRequest(**fields))

    async def _of_chat(self, request: ChatCompletionRequest) -> Rendered:
        if has_non_text_content(request.messages):
            raise NotRendered("content")
        rendered = await self._online.render_chat(request, skip_mm_cache=True)
        _, inputs = _checked(rendered)
        return Rendered(
            [_ids(one) for one in inputs],
            request.n or 1,
            request.max_completion_tokens or request.max_tokens,
            request.vllm_xargs,
            request.cache_salt,
            request.model,
            takes_ids=not request.echo and request.kv_transfer_params is None,
        )

    async def _batch(self, fields: dict[str, Any]) -> Rendered:
        batch = BatchChatCompletionRequest(**fields)
        every = [
            await self._of_chat(batch.to_chat_completion_request(messages))
            for messages in batch.messages
        ]
        prompts = [ids for one in every for ids in one.prompts]
        return every[0]._replace(prompts=prompts, takes_ids=False)

    async def _completion(self, fields: dict[str, Any]) -> Rendered:
        request = CompletionRequest(**fields)
        if request.prompt_embeds is not None:
            raise NotRendered("content")
        inputs = _checked(await self._online.render_completion(request, skip_mm_cache=True))
        return Rendered(
            [_ids(one) for one in inputs], request.n or 1, request.max_tokens, request.vllm_xargs,
            request.cache_salt, request.model,
        )  # fmt: skip

    async def _response(self, fields: dict[str, Any]) -> Rendered:
        request = ResponsesRequest(**fields)
        # Before an image is fetched, which the engine would do again.
        if request.previous_response_id is not None or _has_media(fields["input"]):
            raise NotRendered("content")
        rendered = _checked(await self._online.render_responses(request, skip_mm_cache=True))
        if has_non_text_content(rendered.messages):
            raise NotRendered("content")
        return Rendered(
            [_ids(rendered.engine_input)], 1, request.max_output_tokens, request.vllm_xargs,
            request.cache_salt, request.model,
        )  # fmt: skip

    async def _message(self, fields: dict[str, Any]) -> Rendered:
        request = AnthropicServingMessages.to_chat_completion_request(
            AnthropicMessagesRequest(**fields), merge_inline_system=self._merge_system
        )
        return (await self._of_chat(request))._replace(takes_ids=False)

    async def _invocation(self, fields: dict[str, Any]) -> Rendered:
        if "messages" in fields:
            return (await self._chat(fields))._replace(takes_ids=False)
        if "prompt" in fields:
            return await self._completion(fields)
        raise NotRendered("form")

    async def _tokens(self, fields: dict[str, Any]) -> Rendered:
        ids, params = fields["token_ids"], fields.get("sampling_params") or {}
        if fields.get("features") is not None:
            raise NotRendered("content")
        return Rendered(
            [list(map(int, ids))], params.get("n") or 1, params.get("max_tokens"),
            params.get("extra_args"), fields.get("cache_salt"), fields.get("model"),
        )  # fmt: skip


def _has_media(items: Any) -> bool:
    """Return whether the input of a response has parts that are no text."""
    if not isinstance(items, list):
        return False
    contents = [item.get("content") for item in items if isinstance(item, dict)]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return any(isinstance(part, dict) and part.get("type") in _MEDIA for part in parts)


def _handling(request: dict[str, Any]) -> Handling:
    session_id = request.get("session_id")
    try:
        # vLLM takes whole numbers in other types, too, and refuses everything else.
        priority = int(request.get("priority") or 0)
    except (TypeError, ValueError, OverflowError):
        priority = 0
    return Handling(session_id if isinstance(session_id, str) else None, priority)


def _checked(rendered: Any) -> Any:
    """Return what vLLM has rendered, or raise NotRendered with its refusal."""
    if isinstance(rendered, ErrorResponse):
        raise NotRendered("malformed", rendered.error.message)
    return rendered


def _ids(engine_input: Any) -> list[int]:
    ids = engine_input.get("prompt_token_ids")
    if ids is None or engine_input.get("type") != "token":
        raise NotRendered("content")
    return list(ids)
