"""Gated delta nets in vLLM on a CPU in fp32, of which vLLM's own kernels there know bf16 only.

``add_float32`` gives vLLM transformers' own arithmetic for that dtype, one sequence after the
other; all else of the layer stays vLLM's, and so do both states, in vLLM's places. Tokens can
then be compared exactly, as those of other families are.
"""

from typing import Any


def add_float32() -> None:
    """In this process, before vLLM makes a model. What is in bf16 has vLLM's kernels as before."""
    import torch

    try:
        from vllm.model_executor.layers.mamba.ops.cpu import gdn_attention

        of_vllm, name_type = gdn_attention.cpu_gdn_attention_core, gdn_attention.LayerNameType
    except (ImportError, AttributeError):  # other releases have it elsewhere: other models run
        return
    if of_vllm.__module__ == __name__:
        return

    # vLLM makes an operator of it, by its signature: annotations must be types, not their names.
    def cpu_gdn_attention_core(
        mixed_qkv: torch.Tensor,
        b: torch.Tensor,
        a: torch.Tensor,
        core_attn_out: torch.Tensor,
        layer_name: name_type,
    ) -> None:
        if mixed_qkv.dtype != torch.float32:
            of_vllm(mixed_qkv, b, a, core_attn_out, layer_name)
            return
        context = gdn_attention.get_forward_context()
        layer = context.no_compile_layers[gdn_attention._resolve_layer_name(layer_name)]
        if context.attn_metadata is not None:
            _compute(layer, context.attn_metadata[layer.prefix], mixed_qkv, b, a, core_attn_out)

    gdn_attention.cpu_gdn_attention_core = cpu_gdn_attention_core


def _compute(layer: Any, batch: Any, mixed_qkv: Any, b: Any, a: Any, out: Any) -> None:
    """Of ``[tokens, channels]``, and ``[tokens, heads]`` of each gate, into ``out``
    ``[tokens, heads, width]``."""
    import torch
    from torch.nn.functional import conv1d, silu, softplus
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_recurrent_gated_delta_rule

    places = batch.non_spec_query_start_loc.tolist()
    slots = batch.non_spec_state_indices_tensor.tolist()
    goes_on = [True] * batch.num_decodes
    if batch.num_prefills:
        goes_on = batch.has_initial_state.tolist()
    conv_states, states = layer.kv_cache[0].transpose(1, 2), layer.kv_cache[1]
    heads, values, keys = states.shape[1:]
    states = states.view(-1, heads, keys, values)  # as vLLM's kernels have them
    weight = layer.conv1d.weight
    for slot, start, end, has_state in zip(slots, places, places[1:], goes_on, strict=False):
        if start == end:
            continue
        if not has_state:
            conv_states[slot], states[slot] = 0, 0
        inputs = torch.cat((conv_states[slot], mixed_qkv[start:end].T), 1)
        conv_states[slot] = inputs[:, -conv_states.shape[2] :]
        mixed = silu(conv1d(inputs[None], weight, layer.conv1d.bias, groups=len(weight)))
        query, key, value = layer.rearrange_mixed_qkv(mixed[0].T)
        repeated = heads // key.shape[2]
        gate = -layer.A_log.exp() * softplus(a[start:end].float() + layer.dt_bias)
        found, states[slot : slot + 1] = torch_recurrent_gated_delta_rule(
            query.repeat_interleave(repeated, 2),
            key.repeat_interleave(repeated, 2),
            value,
            g=gate[None],
            beta=b[start:end].sigmoid()[None],
            initial_state=states[slot : slot + 1],
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
        )
        out[start:end] = found[0]
