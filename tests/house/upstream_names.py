"""Names of vLLM and other libraries that an upgrade may change, by the room that uses them.

They are methods that we override and private attributes that we read. After an upgrade run
`pytest tests/house/test_upstream_names.py`: each name that is gone fails a test.
"""

# Room -> class -> names.
UPSTREAM_NAMES = {
    "adakv_worker": {
        "torch.cpu": "_is_amx_tile_supported _is_avx512_supported",
        "vllm.v1.kv_cache_interface.AttentionSpec": "max_num_blocks_per_req",
        "vllm.v1.kv_cache_interface.FullAttentionSpec": "merge",
        "vllm.v1.kv_cache_spec_registry.KVCacheSpecRegistry": "_ensure_registered",
    },
    "adakv_worker.attention": {
        "vllm.model_executor.layers.attention.Attention": (
            "_k_scale _k_scale_float _v_scale _v_scale_float"
        ),
        "vllm.v1.attention.backend.AttentionBackend": (
            "customize_spec get_builder_cls get_impl_cls supported_kv_cache_layouts"
        ),
        "vllm.v1.attention.backend.AttentionImpl": "forward fused_output_quant_supported",
        "vllm.v1.attention.backend.AttentionMetadataBuilder": (
            "build build_for_cudagraph_capture get_cudagraph_support"
        ),
    },
    "adakv_worker.core": {
        "vllm.v1.core.sched.scheduler.Scheduler": (
            "_free_request _get_local_prefix_cache_hit _inflight_prefills _preempt_request "
            "add_request finish_requests has_requests make_stats reset_prefix_cache schedule "
            "update_from_output"
        ),
        "vllm.v1.core.single_type_kv_cache_manager.FullAttentionManager": "cache_blocks",
        "vllm.v1.core.single_type_kv_cache_manager.SingleTypeKVCacheManager": (
            "allocate_new_blocks get_num_blocks_to_allocate new_step_starts pop_blocks_for_free"
        ),
        "vllm.v1.request.Request": "_all_token_ids _output_token_ids",
    },
    "adakv_worker.frontend": {
        "vllm.v1.engine.async_llm.AsyncLLM": "_add_request _run_output_handler",
        "vllm.v1.engine.input_processor.InputProcessor": "assign_request_id",
        "vllm.v1.metrics.loggers.StatLoggerBase": "log_engine_initialized record",
        "vllm.v1.sample.logits_processor.interface.LogitsProcessor": (
            "apply is_argmax_invariant update_state validate_params"
        ),
        "vllm.v1.worker.gpu.sample.logits_processor.interface.LogitsProcessor": "add_request",
    },
    "adakv_worker.worker": {
        "vllm.model_executor.layers.attention.Attention": "_k_scale _k_scale_float _v_scale_float",
        "vllm.v1.attention.backends.triton_attn.TritonAttentionImpl": "_ensure_scale_caches",
        "vllm.v1.worker.cpu_worker.CPUWorker": "init_device",
        "vllm.v1.worker.gpu.model_runner.GPUModelRunner": (
            "_remove_request add_requests gather_batch_req_state initialize_kv_cache "
            "prepare_attn prepare_inputs sample_tokens update_requests"
        ),
        "vllm.v1.worker.gpu_model_runner.GPUModelRunner": (
            "_bookkeeping_sync _build_attention_metadata "
            "_determine_batch_execution_and_padding _may_reorder_batch _sample _update_states "
            "_warmup_and_capture sample_tokens"
        ),
        "vllm.v1.worker.gpu_worker.Worker": (
            "_make_model_runner compile_or_warm_up_model execute_model init_device"
        ),
        "vllm.v1.worker.worker_base.WorkerBase": (
            "execute_model get_supported_kv_cache_layouts sample_tokens"
        ),
    },
    "evals.answering": {
        "vllm.v1.sample.logits_processor.AdapterLogitsProcessor": "new_req_logits_processor",
        "vllm.v1.sample.logits_processor.interface.LogitsProcessor": "is_argmax_invariant",
    },
    "loadtest.engines": {
        "vllm.v1.metrics.loggers.StatLoggerBase": "log_engine_initialized record",
    },
    "serving.ingress": {
        (
            "ray.llm._internal.serve.routing_policies.prefix_aware.prefix_aware_router."
            "PrefixCacheAffinityRouter"
        ): "_extract_text_from_request choose_replicas on_request_routed",
        "ray.serve._private.client.ServeControllerClient": "_http_config get_serve_details",
        "ray.serve._private.request_router.request_router.RequestRouter": (
            "choose_replicas on_request_routed update_replicas"
        ),
    },
    "serving.vllm_engine": {
        "vllm.entrypoints.anthropic.serving.AnthropicServingMessages": (
            "_should_merge_inline_system"
        ),
        "vllm.v1.metrics.loggers.StatLoggerBase": "log_engine_initialized record",
    },
}
