"""Recurrent layers in place of transformers' classes; any number of tokens continues a state.

The classes of transformers 5.5 continue a state by one token only: several tokens after a prompt,
as scoring uses them, give wrong outputs. A module here has the names and weights of the class that
it replaces, and the same outputs where that class is right. Tracers record every operation of it.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

CHUNK_TOKENS = 64  # tokens of a delta rule that are computed together
DECAY_PARAMETER = ".A_log"  # end of the name of a delta rule's logarithmic decay rates


class LayerState(Protocol):
    """The state of one recurrent layer.

    conv_states: the last inputs of the convolution, ``[batch, channels, columns]``.
    recurrent_states: matrix of a delta rule, ``[batch, heads, key size, value size]``.
    """

    conv_states: Tensor
    recurrent_states: Tensor


class StateCache(Protocol):
    """A cache of transformers, or the states of a graph. Both hold one entry per layer."""

    layers: Sequence[LayerState]

    def has_previous_state(self, layer_idx: int) -> bool:
        """Return whether the layer has seen tokens."""

    def update_conv_state(self, conv_states: Tensor, layer_idx: int) -> Tensor:
        """Replace the last inputs of the layer's convolution."""

    def update_recurrent_state(self, recurrent_states: Tensor, layer_idx: int) -> Tensor:
        """Replace the matrix of the layer's delta rule."""


class ShortConv(nn.Module):
    """The gated causal convolution of LFM2, one filter per channel."""

    def __init__(self, replaced: nn.Module):
        super().__init__()
        self.conv, self.in_proj, self.out_proj = replaced.conv, replaced.in_proj, replaced.out_proj
        self.conv.padding = (0,)  # inputs begin with the state
        self.layer_idx = replaced.layer_idx

    def forward(
        self,
        hidden_states: Tensor,
        past_key_values: StateCache | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Return outputs ``[batch, length, hidden]`` and update the state.

        :param attention_mask: ``[batch, cached + length]``, 0 at padding, which must precede the
            tokens of its row; None: no padding.
        """
        before, after, x = self.in_proj(hidden_states).transpose(1, 2).chunk(3, dim=1)
        gated = before * x
        if attention_mask is not None:
            gated = gated * attention_mask[:, None, -gated.shape[2] :].to(gated.dtype)
        window = extend_inputs(past_key_values, self.layer_idx, gated, self.conv.kernel_size[0])
        return self.out_proj((after * self.conv(window)).transpose(1, 2).contiguous())


class DeltaSteps(nn.Module):
    """The gated delta rule, token by token. Exporters replace this module by a loop.

    An exporter allows one output: the tokens' outputs and the new state, flattened.
    """

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, state: Tensor
    ) -> Tensor:
        """Return ``[outputs.numel() + state.numel()]``.

        :param query, key: ``[batch, heads, length, key size]``; query is scaled.
        :param value: ``[batch, heads, length, value size]``.
        :param g: logarithm of the decay, ``[batch, heads, length]``.
        :param beta: share of the error that is written, ``[batch, heads, length]``.
        :param state: ``[batch, heads, key size, value size]``.
        """
        outputs = []
        for token in range(key.shape[2]):
            q, k, v = query[:, :, token], key[:, :, token], value[:, :, token]
            state = state * g[:, :, token, None, None].exp()
            error = (v - (state * k[..., None]).sum(dim=-2)) * beta[:, :, token, None]
            state = state + k[..., None] * error[..., None, :]
            outputs.append((state * q[..., None]).sum(dim=-2))
        return torch.cat([torch.stack(outputs, dim=2).flatten(), state.flatten()])


class GatedDeltaNet(nn.Module):
    """The gated delta-rule layer of Qwen3.5."""

    def __init__(self, replaced: nn.Module):
        super().__init__()
        for name, module in replaced.named_children():
            self.add_module(name, module)
        self.A_log, self.dt_bias = replaced.A_log, replaced.dt_bias
        self.conv1d.padding = (0,)  # inputs begin with the state
        self.layer_idx = replaced.layer_idx
        self.key_heads, self.value_heads = replaced.num_k_heads, replaced.num_v_heads
        self.key_size, self.value_size = replaced.head_k_dim, replaced.head_v_dim
        self.steps = DeltaSteps()

    def forward(
        self,
        hidden_states: Tensor,
        cache_params: StateCache | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Return outputs ``[batch, length, hidden]`` and update the state.

        :param attention_mask: as for :class:`ShortConv`.
        """
        batch, length, _ = hidden_states.shape
        if attention_mask is not None:
            mask = attention_mask[:, -length:, None]
            hidden_states = hidden_states * mask.to(hidden_states.dtype)
        gate = self.in_proj_z(hidden_states).reshape(-1, self.value_size)
        query, key, value = self._convolve(hidden_states, cache_params)
        beta = self.in_proj_b(hidden_states).sigmoid()
        steps = self.in_proj_a(hidden_states).float() + self.dt_bias
        g = -self.A_log.float().exp() * nn.functional.softplus(steps)
        outputs = self._apply_rule(query, key, value, g, beta, cache_params)
        normed = self.norm(outputs.reshape(-1, self.value_size), gate)
        return self.out_proj(normed.reshape(batch, length, -1))

    def _convolve(self, hidden: Tensor, cache: StateCache | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values, each ``[batch, length, value heads, size]``."""
        batch, length, _ = hidden.shape
        mixed = self.in_proj_qkv(hidden).transpose(1, 2)
        window = extend_inputs(cache, self.layer_idx, mixed, self.conv1d.kernel_size[0])
        mixed = nn.functional.silu(self.conv1d(window)).transpose(1, 2)
        keys = self.key_heads * self.key_size
        query, key, value = mixed.split([keys, keys, mixed.shape[2] - 2 * keys], dim=-1)
        query = query.reshape(batch, length, -1, self.key_size)
        key = key.reshape(batch, length, -1, self.key_size)
        value = value.reshape(batch, length, -1, self.value_size)
        if self.value_heads > self.key_heads:
            repeats = self.value_heads // self.key_heads
            query = query.repeat_interleave(repeats, dim=2)
            key = key.repeat_interleave(repeats, dim=2)
        return query, key, value

    def _apply_rule(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        g: Tensor,
        beta: Tensor,
        cache: StateCache | None,
    ) -> Tensor:
        """Return outputs ``[batch, length, value heads, value size]`` and update the state."""
        query, key = _normalize(query) * self.key_size**-0.5, _normalize(key)
        query, key, value, g, beta = (
            x.transpose(1, 2).contiguous() for x in (query, key, value, g, beta)
        )
        state = None if cache is None else cache.layers[self.layer_idx].recurrent_states
        if state is None:
            state = value.new_zeros(*value.shape[:2], self.key_size, self.value_size)
        if torch.jit.is_tracing():
            both, count = self.steps(query, key, value, g, beta, state), value.numel()
            outputs, state = both[:count].reshape(value.shape), both[count:].reshape(state.shape)
        else:
            with torch.autocast(value.device.type, enabled=False):
                outputs, state = apply_delta_rule(query, key, value, g, beta, state)
        if cache is not None:
            cache.update_recurrent_state(state, self.layer_idx)
        return outputs.transpose(1, 2).contiguous()


def apply_delta_rule(
    query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Return outputs and new state of the gated delta rule; arguments as of :class:`DeltaSteps`.

    With ``D_t`` the sum of ``g`` up to token t of a chunk, the update ``u_t`` of a token solves

        u_t + beta_t sum_{j<t} exp(D_t - D_j) (k_j k_t) u_j = beta_t (v_t - exp(D_t) S k_t)

    Without gradients it is computed in float64, so that chunks add no rounding.
    """
    dtype, precise = value.dtype, torch.float32 if torch.is_grad_enabled() else torch.float64
    query, key, value, g, beta, state = (x.to(precise) for x in (query, key, value, g, beta, state))
    outputs = []
    for start in range(0, key.shape[2], CHUNK_TOKENS):
        q, k, v, one_g, one_beta = (
            x[:, :, start : start + CHUNK_TOKENS] for x in (query, key, value, g, beta)
        )
        total = one_g.cumsum(dim=-1)
        decay = (total[..., :, None] - total[..., None, :]).tril().exp().tril()
        grown, scaled = total.exp()[..., None], one_beta[..., None]
        mixed = scaled * (k @ k.transpose(-1, -2)) * decay
        wanted = scaled * (v - (k * grown) @ state)
        written = torch.linalg.solve_triangular(
            mixed.tril(-1), wanted, upper=False, unitriangular=True
        )
        outputs.append((q * grown) @ state + (q @ k.transpose(-1, -2) * decay) @ written)
        left = (total[..., -1:] - total).exp()[..., None]
        state = state * grown[..., -1:, :] + (k * left).transpose(-1, -2) @ written
    return torch.cat(outputs, dim=2).to(dtype), state.to(dtype)


def _normalize(x: Tensor) -> Tensor:
    """Return vectors of length 1 along the last axis; ``1e-6`` as in transformers."""
    return x * torch.rsqrt((x * x).sum(dim=-1, keepdim=True) + 1e-6)


def extend_inputs(cache: StateCache | None, layer: int, new: Tensor, kernel: int) -> Tensor:
    """Return the inputs of a causal convolution, and keep its last ones in the cache.

    :param new: ``[batch, channels, length]``.
    :param kernel: columns of the filter.
    :return: ``[batch, channels, kernel - 1 + length]``, zeros before the first token.
    """
    if cache is None:
        return nn.functional.pad(new, (kernel - 1, 0))
    if cache.has_previous_state(layer):
        before = cache.layers[layer].conv_states[..., 1 - kernel :]
    else:
        before = new.new_zeros(*new.shape[:2], kernel - 1)
    window = torch.cat([before, new], dim=-1)
    cache.update_conv_state(window[..., -kernel:], layer)
    return window


# Class of transformers -> module that replaces it.
_REPLACEMENTS = {
    "Lfm2ShortConv": ShortConv,
    "Lfm2MoeShortConv": ShortConv,
    "Qwen3_5GatedDeltaNet": GatedDeltaNet,
}


def replace_recurrent(model: nn.Module) -> None:
    """Replace the recurrent layers of a model whose classes continue a state by one token only."""
    for name, module in list(model.named_modules()):
        if made := _REPLACEMENTS.get(type(module).__name__):
            model.set_submodule(name, made(module))
